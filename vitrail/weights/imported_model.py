"""A model from anywhere, under our names: architecture, weights, preprocessing, labels, and what happened on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vitrail.lookup import shorten
from vitrail.weights.model_file import ModelHeader


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights of a file; nothing that differs is left unsaid.

    Attributes:
        origin: where they came from, as the user would name it.
        loaded: weights taken as they are, or only renamed.
        resized: one line each: `pos_embed: 24×24 → 14×14 patches`.
        head: what became of the classifier: empty when it was loaded, else such as `new, 10 classes instead of 1000`.
        missing: weights of ours that the file does not have, which start at random.
        unexpected: weights of the file that this model has no place for.
        notes: what was assumed, one line each.
    """

    origin: str
    loaded: int = 0
    resized: tuple[str, ...] = ()
    head: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether there is more to tell than how many weights were loaded."""
        return len(self.lines()) > 1

    def lines(self) -> list[str]:
        """Return the report as lines for people, without those that have nothing to say."""
        parts = {
            "resized": "; ".join(self.resized),
            "head": self.head,
            "missing (start at random)": shorten(self.missing),
            "unexpected (left out)": shorten(self.unexpected),
        }
        lines = [f"{self.origin}: {self.loaded} weights loaded"]
        lines += [f"  {name}: {text}" for name, text in parts.items() if text]
        return lines + [f"  note: {note}" for note in self.notes]


@dataclass(frozen=True)
class ImportedModel:
    """A model with all that its file or folder says of it.

    Attributes:
        header: architecture, labels, preprocessing; labels are empty when the model has no classifier.
        weights: a tensor for every name in the state dict of `ViT(header.architecture)`.
        report: what became of the file's weights.
    """

    header: ModelHeader
    weights: Mapping[str, Tensor]
    report: LoadReport = field(default_factory=lambda: LoadReport(""))
