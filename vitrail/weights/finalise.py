"""The last step of every import: resize weights to their architecture, and check that none is missing or left over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ViTConfig
from vitrail.models.encoders import kernel_resize, resize_kernel
from vitrail.models.positions import resize_table
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.model_file import ModelHeader, build_model


@dataclass(frozen=True)
class RawModel:
    """The weights of a file, under our names but not yet resized or checked.

    Attributes:
        origin: the file as the user named it.
        weights: position tables and patch kernels may still be of another size than the architecture's.
        left_out: names in the file that the model does not need, such as a pretraining's own head.
        unexpected: names in the file that no rule knows: an error.
        notes: what was assumed, one line each.
    """

    origin: str
    weights: Mapping[str, Tensor]
    left_out: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def finalise(raw: RawModel, config: ViTConfig, preprocess: Preprocess, labels: tuple[str, ...]) -> ImportedModel:
    """Return the model of raw weights, resized to its architecture and checked.

    Raises:
        ValueError: weights are missing, unknown, or have another shape; all of them are listed.
    """
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in raw.weights.items()}
    resized = []
    if config.positions == "learned" and "pos_embed" in weights:
        source = table_grid(weights["pos_embed"], config.num_prefix, f"{raw.origin}: pos_embed")
        if source != config.grid:
            weights["pos_embed"] = resize_table(weights["pos_embed"], source, config.grid, config.num_prefix)
            resized.append(f"pos_embed: {_grid(source)} → {_grid(config.grid)} patches")
    kernel = weights.get("patch_embed.proj.weight")
    if config.encoder == "patch" and kernel is not None and kernel.ndim == 4:
        side = kernel.shape[-1]
        if side != config.patch_size and kernel.shape[-2] == side:
            matrix = kernel_resize(side, config.patch_size)
            weights["patch_embed.proj.weight"] = resize_kernel(kernel, matrix)
            resized.append(f"patch_embed.proj.weight: patches of {side} → {config.patch_size} px")
    # With the names that no rule knows, so that one error lists all that does not fit.
    build_model(config, weights, raw.origin, unknown=raw.unexpected)
    header = ModelHeader(config, labels, preprocess)
    report = LoadReport(raw.origin, len(weights), tuple(resized), unexpected=raw.left_out, notes=raw.notes)
    # Cloned: a file's tensors may share memory, which no model file can hold, or lie unaligned.
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    return ImportedModel(header, whole, report)


def table_grid(table: Tensor, num_prefix: int, what: str) -> tuple[int, int]:
    """Return the patch grid of a position table [1, N, D] that begins with rows of prefix tokens.

    Raises:
        ValueError: the patches do not form a square.
    """
    patches = table.shape[1] - num_prefix
    side = math.isqrt(max(0, patches))
    if table.ndim != 3 or not side or side**2 != patches:
        raise ValueError(
            f"{what} is {tuple(table.shape)}: without {num_prefix} rows of prefix tokens it is no square grid of patches"
        )
    return side, side


def with_zero_rows(table: Tensor, at: int, count: int) -> Tensor:
    """Return a position table [1, N, D] with rows of zeros for prefix tokens that have no position."""
    return torch.cat([table[:, :at], table.new_zeros(1, count, table.shape[2]), table[:, at:]], dim=1)


def mlp_ratio(hidden: int, embed_dim: int) -> float:
    """Return the `mlp_ratio` that gives exactly this hidden width: division alone may fall short by one."""
    ratio = hidden / embed_dim
    while int(embed_dim * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def depth_of(names: Iterable[str], pattern: str, where: str) -> int:
    """Return the number of blocks among the names; the pattern matches the start of a name, and its group is the block's number.

    Raises:
        ValueError: a block's number is left out.
    """
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if gaps := [number for number in range(len(numbers)) if number not in numbers]:
        raise ValueError(f"{where}: has a block {max(numbers)}, but no block {gaps[0]}; its blocks must count from 0")
    return len(numbers)


def plain_labels(count: int) -> tuple[str, ...]:
    """Return labels for classes that have no names: `0`, `1`, …"""
    return tuple(str(number) for number in range(count))


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]}×{grid[1]}"
