"""Studies of accuracy on the small models: what the scripts beside this package measure, and how they show it."""
