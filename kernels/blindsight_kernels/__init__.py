"""Attention kernels that are told only by a plan, and the float64 reference they are judged by."""
