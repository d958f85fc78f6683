"""A small vision-language model trained from scratch: its pictures, its architecture, its training, its evaluation."""
