"""Which number formats a device really computes in."""

from __future__ import annotations

import contextlib

import torch

from vitrail.config import DEVICE_NAMES
from vitrail.config_schema import choice


def pick_device(name: str) -> torch.device:
    """Return the device that a configuration means.

    Raises:
        ValueError: the name is unknown, or CUDA was asked for and is not there.
    """
    choice("device", name, DEVICE_NAMES)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but PyTorch sees no CUDA GPU here; use --device cpu, or install a GPU build of torch"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 runs on the device's own instructions.

    A CPU without AVX512-BF16 or AMX computes it at about 1 GFLOP/s, a hundredth of its fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the mixed-precision context of a run.

    Raises:
        ValueError: bf16 was asked for on a device that would emulate it.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    if not supports_bf16(device):
        raise ValueError(
            f"precision is 'bf16', but this {device.type} computes it only slowly, by emulation; use --precision fp32"
        )
    return torch.autocast(device.type, dtype=torch.bfloat16)
