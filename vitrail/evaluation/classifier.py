"""A model with its labels and preprocessing: what `vitrail.load` returns, and what predict, eval and serve use."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from vitrail.data.images.decode import ImageError, as_decoded, read_image
from vitrail.data.images.preprocess import Preprocess
from vitrail.models.kernel_choice import inference_kernels
from vitrail.models.variants import is_variant, variant_config
from vitrail.models.vit import ViT
from vitrail.threads import ordered_map
from vitrail.weights.imported_model import LoadReport
from vitrail.weights.model_file import ModelHeader, build_model
from vitrail.weights.resolve import open_weights

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image; either `label` or `error` is filled.

    Attributes:
        path: the image as it was named; empty for images from memory.
        probability: of `label`, 0 to 1, with the model's temperature applied.
        top_labels: the most likely labels, best first.
        top_probabilities: theirs.
        error: why the image could not be read, or None.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    top_labels: tuple[str, ...] = ()
    top_probabilities: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Classifier:
    """A model, its labels and the exact preprocessing it was trained with.

    Attributes:
        patch_size: side of the patches to cut images into; None is the model's own (see `at`).
        report: what became of a file's weights on the way.
    """

    model: ViT
    header: ModelHeader
    patch_size: int | None = None
    report: LoadReport = LoadReport("")

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.header.labels

    @property
    def preprocess(self) -> Preprocess:
        """From an image to the model's input."""
        return self.header.preprocess

    def predict(
        self, images: Iterable[str | os.PathLike[str] | PIL.Image.Image], *, top: int = 5, workers: int = 0
    ) -> list[Prediction]:
        """Return one prediction per image, in order; see `stream`."""
        return list(self.stream(images, top=top, workers=workers))

    def stream(
        self, images: Iterable[str | os.PathLike[str] | PIL.Image.Image], *, top: int = 5, workers: int = 0
    ) -> Iterator[Prediction]:
        """Yield one prediction per image, in order; a broken or missing file gets an `error`, not an exception.

        Args:
            images: paths, or Pillow images.
            top: how many labels to rank.
            workers: decoding threads; 0: one per core.

        Raises:
            ValueError: `top` is below 1, or the model has no classifier.
        """
        self.check_classifies()
        if top < 1:
            raise ValueError(f"top is {top}; expected 1 or more")
        if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
            images = [images]
        ready = ordered_map(self._prepare, iter(images), workers)
        while rows := list(islice(ready, _BATCH)):
            yield from self._predict_rows(rows, min(top, len(self.labels)))

    def logits(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the logits [B, classes] of preprocessed images, uint8 [C, H, W] each, of one size or of several."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            if len({each.shape for each in pixels}) > 1:
                images = [self.preprocess.normalise(torch.from_numpy(each).to(device)) for each in pixels]
                return self.model.forward_packed(images, self.patch_size).float().cpu()
            images = self.preprocess.normalise(torch.from_numpy(np.asarray(pixels)).to(device))
            return self.model(images, self.patch_size).float().cpu()

    def check_classifies(self) -> None:
        """Raise a ValueError if the model gives vectors and no classes."""
        if not self.labels:
            raise ValueError(
                "this model has no classifier: it turns an image into a vector of "
                f"{self.model.decoder.out_dim} numbers; train one on labelled images"
            )

    @property
    def is_trained_size(self) -> bool:
        """Whether the patches are of a size that the weights were trained with."""
        own = self.model.config
        return self.patch_size is None or self.patch_size in own.patch_sizes

    def to(self, device: str | torch.device) -> Classifier:
        """Return the classifier on a device; on the one where it is already, it is the same."""
        wanted, own = torch.device(device), next(self.model.parameters()).device
        if wanted.type == own.type and wanted.index in (None, own.index):
            return self
        return dataclasses.replace(self, model=copy.deepcopy(self.model).to(device))

    def tuned(self, *, measuring: bool) -> Classifier:
        """Return the classifier with the attention kernels that are fastest for its image size on its device.

        Args:
            measuring: measure what is not known of this machine yet; if not, only what is known counts.
        """
        model = copy.copy(self.model)  # the same weights
        patch_size = self.patch_size or model.config.patch_size
        device = next(model.parameters()).device.type
        model.kernels = inference_kernels(
            model.config, self.preprocess.image_size, patch_size, device, measuring=measuring
        )
        return dataclasses.replace(self, model=model)

    def at(
        self, *, image_size: int | None = None, patch_size: int | None = None, resize: str | None = None
    ) -> Classifier:
        """Return the classifier for images of another size, cut into other patches, with the same weights.

        Args:
            image_size: side of the square that images are brought to, pixels.
            patch_size: side of a patch, pixels; the model should have been trained with several (`model.patch_sizes`).
            resize: `crop`, `squash`, or `aspect` for whole images in their own aspect ratio.

        Raises:
            ValueError: the encoder has one patch size only, or the image would be smaller than a patch.
        """
        own = self.model.config
        patch = patch_size if patch_size is not None else self.patch_size or own.patch_size
        size = self.preprocess.image_size if image_size is None else image_size
        if patch < 1 or size < 1:
            raise ValueError(f"patch_size {patch} and image_size {size}: expected at least 1 pixel each")
        self.model.check_patch_size(patch)
        preprocess = dataclasses.replace(
            self.preprocess,
            image_size=size,
            resize=resize or self.preprocess.resize,
        )
        preprocess = dataclasses.replace(preprocess, multiple=patch if preprocess.resize == "aspect" else 1)
        if size > max(1024, 8 * own.image_size):
            raise ValueError(
                f"image_size {size} is far beyond the {own.image_size} px of the training, and would fill the memory; "
                f"expected at most {max(1024, 8 * own.image_size)}"
            )
        if size < patch:
            raise ValueError(f"image_size {size} is smaller than a patch of {patch}; choose a larger one")
        header = dataclasses.replace(self.header, preprocess=preprocess)
        return dataclasses.replace(self, header=header, patch_size=None if patch == own.patch_size else patch)

    def _prepare(self, image: str | os.PathLike[str] | PIL.Image.Image) -> tuple[str, np.ndarray | str]:
        """Return the image's name, and its pixels or what is wrong with it."""
        if isinstance(image, PIL.Image.Image):
            # Through the same decoder as a file, so that rotation and transparency are treated alike.
            return "", self.preprocess.apply(as_decoded(image, self.preprocess.mode))
        path = os.fspath(image)
        try:
            return path, self.preprocess.apply(read_image(path, mode=self.preprocess.mode))
        except ImageError as error:
            return path, f"{error.verdict}: {error.reason}"
        except OSError as error:
            return path, f"{error.strerror or error}"

    def _predict_rows(self, rows: Sequence[tuple[str, np.ndarray | str]], top: int) -> list[Prediction]:
        good = [row for row in rows if isinstance(row[1], np.ndarray)]
        answers: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
        if good:
            logits = self.logits([pixels for _, pixels in good if isinstance(pixels, np.ndarray)])
            ranked = torch.softmax(logits / self.header.temperature, dim=1).topk(top, dim=1)
            answers = iter(zip(ranked.indices.numpy(), ranked.values.numpy(), strict=True))
        out = []
        for path, found in rows:
            if isinstance(found, str):
                out.append(Prediction(path, error=found))
                continue
            indices, values = next(answers)
            labels = tuple(self.labels[i] for i in indices)
            out.append(Prediction(path, labels[0], float(values[0]), labels, tuple(float(v) for v in values)))
        return out


def load(model: str | os.PathLike[str]) -> Classifier:
    """Load a classifier.

    Args:
        model: a run's folder, a model file, `hf:NAME` or a folder of transformers, or a variant's name (random weights,
            labels `0`, `1`, …).

    Raises:
        ValueError: there is no such model, or its file is broken.
    """
    name = os.fspath(model)
    if not is_variant(name) or Path(name).exists():
        opened = open_weights(name)
        built = build_model(opened.header.architecture, opened.weights, name)
        return Classifier(built, opened.header, report=opened.report)
    config = variant_config(name)
    preprocess = Preprocess(image_size=config.image_size, channels=config.in_channels)
    header = ModelHeader(config, tuple(str(i) for i in range(config.num_classes)), preprocess)
    return Classifier(ViT(config).eval(), header)
