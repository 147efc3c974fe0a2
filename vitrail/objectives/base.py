"""The protocol of a method of training: what is minimised, what is saved, and how it is evaluated."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor, nn

from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World
from vitrail.models.vit import ViT


class Objective(nn.Module, abc.ABC):
    """A method of training: it owns all that is learned or averaged (student, teacher, heads) as its submodules.

    Its state dict is the checkpoint; parameters that need no gradient are not given to the optimizer. Labels, classes and
    what makes one evaluation better than another are the objective's business, and the loop knows nothing of them.

    Attributes:
        num_views: how many differently augmented views of each image a batch must have (`Batch.views`); 1 asks for none
            beside `Batch.images`.
    """

    num_views: int = 1

    @abc.abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalars over a batch, on its device.

        `loss`, the mean over the images, is minimised. `count` is the number of images. Every other entry is a sum over
        the images, logged as the mean `train/NAME`.
        """

    def after_step(self, step: int) -> None:
        """Do what follows update number `step` (from 1), such as moving an average or a teacher."""

    @abc.abstractmethod
    def vits(self) -> Iterator[ViT]:
        """Yield every ViT that the objective computes with, the one that learns first; all get the run's attention kernels."""

    @abc.abstractmethod
    def model_to_save(self) -> ViT:
        """Return the model whose weights are worth keeping, such as the average; adapters are merged."""

    @abc.abstractmethod
    def evaluate(self, reader: ImageReader, indices: np.ndarray, world: World) -> dict[str, float]:
        """Return the metrics of `model_to_save` on some images, logged as `eval/NAME`; collective.

        Args:
            indices: the images of the validation split; empty where the dataset has none.

        Raises:
            NotFinite: the model's output is not finite.
        """

    @abc.abstractmethod
    def better(self, new: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether the metrics `new` are better than `best`, so that the weights are saved."""
