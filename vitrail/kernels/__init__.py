"""How attention is computed, and the choice among the ways. Imports no torch: the command line reads the names."""

GLOBAL_NAMES = ("fused", "matmul")
LOCAL_NAMES = ("tiles", "plain", "fused", "matmul", "flex", "triton")
