"""The result of reading a model from anywhere: its header, its weights under our names, and a report on the reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vitrail.lookup import shorten
from vitrail.weights.model_file import ModelHeader


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights of a file, with every difference.

    Attributes:
        origin: where they came from, as the user would name it.
        loaded: number of weights taken as they are, or only renamed.
        resized: one line for each weight: `pos_embed: 24×24 → 14×14 patches`.
        head: what became of the classifier: empty when it was loaded, else such as `new, 10 classes instead of 1000`.
        missing: weights of the model that the file does not have, which start at random.
        unexpected: weights of the file that the model does not have.
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
        """Whether the report says more than how many weights were loaded."""
        return len(self.lines()) > 1

    def lines(self) -> list[str]:
        """Return the report as lines for people; entries that are empty have none."""
        entries = {
            "resized": "; ".join(self.resized),
            "head": self.head,
            "missing (start at random)": shorten(self.missing),
            "unexpected (left out)": shorten(self.unexpected),
        }
        lines = [f"{self.origin}: {self.loaded} weights loaded"]
        lines += [f"  {name}: {text}" for name, text in entries.items() if text]
        return lines + [f"  note: {note}" for note in self.notes]


@dataclass(frozen=True)
class ImportedModel:
    """A model as its file or folder describes it.

    Attributes:
        header: architecture, labels, preprocessing; labels are empty when the model has no classifier.
        weights: a tensor for every name in the state dict of `ViT(header.architecture)`.
        report: what became of the file's weights.
    """

    header: ModelHeader
    weights: Mapping[str, Tensor]
    report: LoadReport = field(default_factory=lambda: LoadReport(""))
