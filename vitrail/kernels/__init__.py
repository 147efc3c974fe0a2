"""Attention kernels, and the choice among them. Imports no torch: the command line reads the names."""

GLOBAL_NAMES = ("fused", "matmul")
LOCAL_NAMES = ("tiles", "plain", "fused", "matmul", "flex", "triton")
