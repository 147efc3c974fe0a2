"""Refuse forward-mode derivatives, which operations of `torch.library` lack and would silently give as zero."""

from __future__ import annotations

import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def refuse_forward_mode(kernel: str, *inputs: Tensor) -> None:
    """Raise an error if an input carries a tangent.

    Args:
        kernel: its name, for the message.

    Raises:
        NotImplementedError: forward-mode derivatives are requested, as by `torch.func.jvp`.
    """
    if forward_ad._current_level < 0:  # outside of every `dual_level`; unpacking costs more than small kernels
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"local attention by {kernel!r} has no forward-mode derivatives (torch.func.jvp, jacfwd, dual numbers); give "
            "the model Kernels(local_attention='plain'), whose operations are PyTorch's own"
        )
