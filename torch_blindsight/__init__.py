"""Sparse prefill for Hugging Face vision-language models in PyTorch."""
