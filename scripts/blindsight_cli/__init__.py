"""The `blindsight` command, the project's benchmarks, and the small vision-language model it trains and ships."""
