"""Choose the attention kernels of a model, measured on this machine for the shapes that it computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vitrail.kernels.autotune import cache_file, fastest_kernels
from vitrail.kernels.registry import Case, Kernels
from vitrail.kernels.window import covers
from vitrail.models.blocks import num_kept_patches
from vitrail.models.config import ViTConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # precision of a run → number format of its attention


def training_kernels(
    model: ViTConfig,
    precision: str,
    device: str,
    *,
    global_attention: str = "auto",
    local_attention: str = "auto",
    known: Any = None,
    measuring: bool = True,
) -> Kernels:
    """Return the fastest kernels for the training and evaluation of a model.

    Args:
        precision: fp32 or bf16, of the training steps.
        device: the type of device, cpu or cuda.
        global_attention, local_attention: name of the kernel to use; `auto` measures.
        known: kernels to use again, by case: those that a run began with.
        measuring: whether other cases may be measured.

    Raises:
        ValueError: a kernel that was given by name cannot compute this model here.
    """
    return fastest_kernels(
        training_cases(model, precision, device),
        cache=cache_file(),
        known=known,
        global_attention=global_attention,
        local_attention=local_attention,
        measuring=measuring,
    )


def inference_kernels(model: ViTConfig, image_size: int, patch_size: int, device: str, *, measuring: bool) -> Kernels:
    """Return the fastest kernels for inference with a model at one image size, in fp32.

    Args:
        device: the type of device, cpu or cuda.
        measuring: whether cases may be measured that have no measurement on this machine yet.
    """
    cases = attention_cases(model, (image_size, patch_size), device, "float32", training=False)
    return fastest_kernels(cases, cache=cache_file(), measuring=measuring)


def training_cases(model: ViTConfig, precision: str, device: str) -> list[Case]:
    """Return the cases of attention in a training: its steps in their precision, its evaluation in fp32."""
    side = model.image_size
    training = [
        case
        for patch in model.patch_sizes or (model.patch_size,)
        for case in attention_cases(model, (side, patch), device, DTYPES[precision], training=True)
    ]
    return [*training, *attention_cases(model, (side, model.patch_size), device, "float32", training=False)]


def attention_cases(
    model: ViTConfig, sides: tuple[int, int], device: str, dtype: str, *, training: bool
) -> Iterable[Case]:
    """Return the cases of attention that a model computes on square images.

    Args:
        sides: sides of the image and of a patch, pixels.
    """
    side = -(-sides[0] // sides[1])
    grid, patches = (side, side), side * side
    if training:
        patches = num_kept_patches(patches, model.patch_dropout)
    tokens, width = model.num_prefix + patches, model.head_width
    for name in sorted(set(model.attentions)):
        case = Case(device, dtype, training, training and model.attention_dropout > 0, tokens, width)
        if name == "local" and not covers(grid, model.window):
            case = case._replace(grid=grid, window=model.window)
        yield case


def remark_on_window(model: ViTConfig) -> str:
    """Return a remark where the window covers the whole grid, so that local attention is global; else an empty text."""
    if "local" not in model.attentions or not covers(model.grid, model.window):
        return ""
    return (
        f"window {model.window} covers the whole grid of {model.grid[0]}×{model.grid[1]} patches: local attention is global "
        f"attention at {model.image_size} px"
    )
