"""Tables that map the names and tensor layouts of other libraries to ours, used in both directions.

A rule pairs two templates of a weight's name. `{i}` matches a number (of a block), `{p}` a last word (`weight`, `bias`),
`{rest}` anything; each appears on both sides. The first rule that matches a name counts. `qkv.{p}/1` is the second part of
our `qkv`, whose parts are joined along the first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.models.config import ViTConfig


class TensorLayout(NamedTuple):
    """How another library lays out the values of a weight: two functions of a tensor and the architecture, each the inverse of the other."""

    to_ours: Callable[[Tensor, ViTConfig], Tensor]
    to_theirs: Callable[[Tensor, ViTConfig], Tensor]


SAME = TensorLayout(lambda x, config: x, lambda x, config: x)


class Rule(NamedTuple):
    """One line of a table.

    Attributes:
        theirs: template of their name; empty: they have no such weight. It is then zeros when read and left out when
            written, which is right only for what does not change the result (the bias of keys: softmax ignores it).
        ours: template of our name, ending in `/n` for the n-th part of a joined weight.
        layout: how their values are laid out.
    """

    theirs: str
    ours: str
    layout: TensorLayout = SAME


def to_ours(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], config: ViTConfig, where: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors of another library under our names and in our layout, and the names that no rule matches.

    Args:
        where: the file, for messages.

    Raises:
        ValueError: two names mean the same weight, or some parts of a joined weight are there and others are not.
    """
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    came_from: dict[str, str] = {}
    prefix = f"{where}: " if where else ""
    for name, tensor in tensors.items():
        match = translated(name, rules, "theirs")
        if match is None:
            unknown.append(name)
            continue
        rule, ours = match
        if ours in came_from:
            raise ValueError(
                f"{prefix}{came_from[ours]} and {name} are both our {ours}; which of them counts is not known"
            )
        came_from[ours] = name
        base, _, part = ours.partition("/")
        values = rule.layout.to_ours(tensor, config)
        if part:
            parts.setdefault(base, {})[int(part)] = values
        else:
            weights[base] = values
    for base, present in parts.items():
        weights[base] = _joined(base, present, rules, prefix)
    return weights, unknown


def to_theirs(
    weights: Mapping[str, Tensor], rules: Sequence[Rule], config: ViTConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights under another library's names and in its layout, and our names that no rule matches."""
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        count = _num_parts(name, rules)
        pieces = tensor.chunk(count) if count > 1 else (tensor,)
        for number, piece in enumerate(pieces):
            match = translated(f"{name}/{number}" if count > 1 else name, rules, "ours")
            if match is None:
                unknown.append(name)
                break
            rule, theirs = match
            if theirs:
                tensors[theirs] = rule.layout.to_theirs(piece, config).contiguous()
    return tensors, unknown


def translated(name: str, rules: Iterable[Rule], side: str) -> tuple[Rule, str] | None:
    """Return the first rule whose template on one side (`theirs` or `ours`) matches the name, and the name on the other side."""
    for rule in rules:
        source, target = (rule.theirs, rule.ours) if side == "theirs" else (rule.ours, rule.theirs)
        if source and (match := _pattern(source).fullmatch(name)):
            return rule, target.format(**match.groupdict())
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return a template as a regular expression; a placeholder that stands twice must match the same both times."""
    pattern = re.escape(template)
    for name, stands_for in {"i": r"\d+", "p": r"\w+", "rest": r"[^/]+"}.items():
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{stands_for})", 1)
    return re.compile(pattern.replace(r"\{i\}", r"(?P=i)"))


def _num_parts(ours: str, rules: Sequence[Rule]) -> int:
    """Return how many parts one of our weights has in a table; 1: it is whole."""
    count = 1
    while translated(f"{ours}/{count}", rules, "ours"):
        count += 1
    return count


def _joined(ours: str, present: Mapping[int, Tensor], rules: Sequence[Rule], prefix: str) -> Tensor:
    """Join the parts of a weight; those that the other library never has are zeros."""
    example = next(iter(present.values()))
    parts = []
    for number in range(_num_parts(ours, rules)):
        match = translated(f"{ours}/{number}", rules, "ours")
        assert match is not None, ours
        if number in present:
            parts.append(present[number])
        elif match[1]:
            raise ValueError(f"{prefix}{match[1]}: is missing, and {ours} is made of it and others that are there")
        else:
            parts.append(torch.zeros_like(example))
    return torch.cat(parts)
