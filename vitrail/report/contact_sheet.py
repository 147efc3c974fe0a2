"""Draw a contact sheet of what training will see: a row for each image, a column for each epoch, and what was changed."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from vitrail.config import AugmentConfig, DataConfig, RunConfig
from vitrail.config_schema import leaves, override
from vitrail.console import Console
from vitrail.data.augment.policies import choose_operations
from vitrail.data.augment.random_changes import crop_boxes, draw_changes
from vitrail.data.loading.train_loader import TrainLoader
from vitrail.data.setup import CheckedData, TrainData, build_train_data, load_data
from vitrail.files import write_bytes
from vitrail.recipes import build_config, recipe_file, refuse_idle
from vitrail.report.run_page import clip

ROWS, EPOCHS = 8, 8
_CELL, _GAP, _MARGIN, _LINE = 144, 12, 24, 15  # pixels
_COLOURS = (
    ("brightness", "bright", "light"),
    ("contrast", "contrast", "contrast"),
    ("saturation", "saturation", "colour"),
)
_INK, _MUTED, _PAPER = (24, 24, 27), (92, 92, 99), (255, 255, 255)


@dataclass(frozen=True)
class View:
    """An image of the sheet, with lines of text.

    Attributes:
        pixels: uint8 [C, H, W].
        lines: the label and file name, or the random changes.
    """

    pixels: np.ndarray
    lines: tuple[str, ...]


def write_sheet(data: DataConfig, path: Path, *, recipe: str = "auto", given: Mapping[str, Any]) -> None:
    """Write a contact sheet (PNG) of the images as a training from scratch would see them.

    Args:
        recipe: a recipe's name, or the path of an earlier run's config.json.
        given: settings of the augmentation that the user gave, by dotted name.

    Raises:
        ValueError: the data is not fit for training, or a setting is refused.
    """
    from vitrail.recipes.facts import facts_of

    earlier = recipe_file(recipe)
    channels = 0 if earlier is None else earlier.model.in_channels
    checked = load_data(data, Console(quiet=True), channels=channels)
    if earlier is not None:
        config = override(earlier, given)
        refuse_idle(config, given)
    else:
        config, _ = build_config(recipe, facts_of(checked, "auto"), given)
    config = dataclasses.replace(config, data=dataclasses.replace(data, decode=config.data.decode))
    buffer = io.BytesIO()
    sheet(checked, build_train_data(checked, config), config, recipe).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def sheet(checked: CheckedData, data: TrainData, config: RunConfig, recipe: str) -> PIL.Image.Image:
    """Return the contact sheet as an image."""
    positions = chosen_positions(data)
    originals = [original(data, int(data.splits.indices["train"][position])) for position in positions]
    columns = [originals, *(views(checked, data, config, positions, epoch) for epoch in range(EPOCHS))]
    titles = ["unchanged", *(f"epoch {number + 1}" for number in range(EPOCHS))]
    defaults = dict(leaves(AugmentConfig()))
    settings = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in leaves(config.augment)
        if value != defaults[name]
    ]
    about = f"recipe {recipe}, seed {config.seed}. --augment: {', '.join(settings) or 'nothing is changed'}"
    return compose(f"What training sees of {checked.dataset.name}", about, titles, columns)


def chosen_positions(data: TrainData) -> list[int]:
    """Return the positions in the training split that fill the rows: an image of each class, or several where classes are few."""
    targets = data.dataset.targets[data.splits.indices["train"]]
    number_in_class = np.zeros(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        number_in_class[targets == label] = np.arange((targets == label).sum())
    first = np.flatnonzero(number_in_class == 0)
    if len(first) > ROWS:  # spread over all classes
        order = np.argsort(targets[first], kind="stable")
        return [
            int(first[order[class_number]]) for class_number in np.linspace(0, len(first) - 1, ROWS).round().astype(int)
        ]
    picked = np.lexsort((targets, number_in_class))[:ROWS]
    return [int(position) for position in picked[np.lexsort((number_in_class[picked], targets[picked]))]]


def original(data: TrainData, index: int) -> View:
    """Return an image as it is evaluated, without augmentation."""
    pixels = data.reader.read_whole(index)
    label, name = data.dataset.labels[data.dataset.targets[index]], Path(data.dataset.paths[index]).name
    pixels = pixels if pixels.dtype == np.uint8 else (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return View(pixels, (clip(label, 20), clip(name, 20)))


def views(checked: CheckedData, data: TrainData, config: RunConfig, positions: list[int], epoch: int) -> list[View]:
    """Return what training sees in one epoch of the images at some positions of the training split.

    A batch of two has the same pairs as every larger even batch: all changes of an image follow from its sample index.
    """
    indices = data.splits.indices["train"]
    loader = TrainLoader(
        data.reader,
        indices,
        batch_size=2,
        seed=config.seed,
        augment=dataclasses.replace(config.augment, repeats=1),  # how often an image comes is not how it is changed
        device=torch.device("cpu"),
    )
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.preprocess.mean, config.preprocess.std))
    shown = []
    for position in positions:
        sample = epoch * len(indices) + int(np.flatnonzero(loader.sampler.epoch(epoch)[1] == position)[0])
        [batch] = loader.batches(sample // 2, sample // 2 + 1)
        if len(batch.indices) < 2:
            raise ValueError(f"a file can no longer be read: {next(iter(data.reader.dropped.items()))}")
        image = (batch.images[sample % 2] * std + mean).clamp(0, 1)
        draws = draw_changes(config.seed, np.asarray([epoch]), np.asarray([position]))
        lines = describe_changes(config.augment, draws, checked.scan.sizes[indices[position]], image.shape)
        if batch.mix is not None and batch.mix.lam[sample % 2] < 1:
            lam, other = float(batch.mix.lam[sample % 2]), data.dataset.labels[int(batch.mix.labels_b[sample % 2])]
            lines.insert(0, f"with {1 - lam:.0%} of {clip(other, 12)}")
        shown.append(View((image * 255).round().to(torch.uint8).numpy(), tuple(lines)))
    return shown


def describe_changes(
    config: AugmentConfig, draws: dict[str, np.ndarray], size: np.ndarray, shape: torch.Size
) -> list[str]:
    """Return in words what one image's random numbers do to it, apart from mixing, as lines.

    Args:
        size: height and width of the file.
        shape: [C, H, W] of the model's input.
    """

    def drawn(name: str, strength: float) -> float:
        return (2 * float(draws[name][0]) - 1) * strength

    words = []
    if config.crop_scale < 1:
        width, height = crop_boxes(config, draws, size[None])[0, 2:]
        words.append(f"crop {width * height / (size[0] * size[1]):.0%}")
    words += ["mirrored"] * bool(draws["flip"][0] < config.flip)
    words += ["upside down"] * bool(draws["vertical"][0] < config.vertical_flip)
    if config.rotation:
        words.append(f"turned {abs(drawn('angle', config.rotation)):.0f}°")
    if config.shift:
        words.append(f"moved {abs(drawn('right', config.shift)):.0%}, {abs(drawn('down', config.shift)):.0%}")
    for name, column, word in _COLOURS:
        if getattr(config, name) and (shape[0] == 3 or name != "saturation"):
            words.append(f"{word} ×{1 + drawn(column, getattr(config, name)):.2f}")
    for [(name, strength)] in choose_operations(config, draws, channels=shape[0], size=(shape[1], shape[2])):
        if name != "identity":
            words.append(name.replace("_", " ") + (f" {strength:.2g}" if strength else ""))
    words += ["erased"] * bool(draws["erase"][0] < config.erasing)
    return textwrap.wrap(", ".join(words), 22)


def compose(title: str, about: str, titles: list[str], columns: list[list[View]]) -> PIL.Image.Image:
    """Lay out images in columns with a title above and lines of text below each."""
    plain, bold = font(11), font(11, bold=True)
    width = 2 * _MARGIN + len(columns) * (_CELL + _GAP) - _GAP
    header = textwrap.wrap(about, int((width - 2 * _MARGIN) / plain.getlength("n")))
    top = _MARGIN + 32 + _LINE * len(header) + 12
    rows = [[(fitted(view.pixels), view.lines) for view in row] for row in zip(*columns, strict=True)]
    tall = [max(image.height for image, _ in row) for row in rows]
    deep = [_LINE * max(len(lines) for _, lines in row) + 2 * _GAP for row in rows]
    canvas = PIL.Image.new("RGB", (width, top + _LINE + 4 + sum(tall) + sum(deep) + _MARGIN - _GAP), _PAPER)
    pen = PIL.ImageDraw.Draw(canvas)
    pen.text((_MARGIN, _MARGIN), clip(title, 120), _INK, font(18, bold=True))
    for number, line in enumerate(header):
        pen.text((_MARGIN, _MARGIN + 32 + _LINE * number), line, _MUTED, plain)
    lefts = [_MARGIN + column * (_CELL + _GAP) for column in range(len(columns))]
    for left, name in zip(lefts, titles, strict=True):
        pen.text((left, top), name, _INK, bold)
    upper = top + _LINE + 4
    for row, high, low in zip(rows, tall, deep, strict=True):
        for column, (left, (image, lines)) in enumerate(zip(lefts, row, strict=True)):
            canvas.paste(image, (left, upper))
            for number, line in enumerate(lines):
                pen.text((left, upper + high + 3 + _LINE * number), line, _MUTED if column else _INK, plain)
        upper += high + low
    return canvas


def fitted(pixels: np.ndarray) -> PIL.Image.Image:
    """Return an image [C, H, W] in the size of a cell; small ones are enlarged by whole multiples, so that pixels stay visible."""
    image = PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
    scale = _CELL / max(image.size)
    resampling = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    scale = int(scale) if scale >= 1 else scale
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)


def font(size: int, *, bold: bool = False) -> PIL.ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib: it is always installed, and has most scripts."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return PIL.ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
