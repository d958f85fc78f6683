"""The parts of `scripts/gpu_check.py`: correctness and benchmarks on a GPU, and the tables made from their results."""
