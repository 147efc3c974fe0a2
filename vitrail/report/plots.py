"""Draw the figures of a run's report with matplotlib, in colours that the page's style sheet sets."""

import base64
import html
import io
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Points = list[tuple[int, float]]  # (step, value), steps ascending

# Drawn in the light colours, then replaced by the page's CSS variables: one drawing for light and dark.
COLOURS = {"ink": "#1c2230", "muted": "#596273", "line": "#dfdbd0", "blue": "#1d4f9e", "ruby": "#a8243b"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's own font
    "text.usetex": False,
    "font.size": 11,
    "font.family": "DejaVu Sans",  # comes with matplotlib, wider than the reader's font: nothing gets clipped
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
PLAIN = FuncFormatter(lambda value, _: f"{value:.3g}")  # no "1e-3" apart from its numbers
COUNT = FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")
NUMBERED_CLASSES = 30  # a wider confusion matrix has no room for its numbers
THUMBNAIL_LIMIT = 80_000  # characters
TINY = 64  # pixels a side; below, smoothing would hide what the model saw
POINTS_LIMIT = 1000  # more than a screen shows
CELLS_LIMIT = 150  # a side of the heat map without numbers: smaller cells vanish on a screen


@matplotlib.rc_context(STYLE)
def curve(training: Points, validation: Points, best_step: float | None, *, percent: bool, description: str) -> str:
    """Draw one quantity over the steps of training: training values pale with their running mean, validation on top.

    Args:
        training: measured on training batches; may be empty if `validation` is not.
        validation: measured on the validation split; may be empty.
        best_step: the step of the saved weights.
        percent: the values are fractions of one.
        description: what a screen reader says instead of the image.
    """
    figure, axes = _new_figure(height=2.5)
    if training:
        steps, values = thin(training)
        line = axes.plot(steps, running_mean(values), color=COLOURS["blue"], linewidth=1.6)[0]
        axes.plot(steps, values, color=COLOURS["blue"], alpha=0.35, linewidth=1.2)
        line.set_label("training" if validation else "_unnamed")  # alone, its title names it
    if validation:
        steps, values = thin(validation)
        dots = {"marker": "o" if len(steps) <= 30 else "", "markersize": 3.5}
        axes.plot(steps, values, color=COLOURS["ruby"], linewidth=1.6, label="validation", **dots)
    if best_step is not None:
        axes.axvline(best_step, color=COLOURS["ink"], linewidth=1, linestyle=(0, (2, 2)), label="best")
    _finish_curve(axes, percent)
    return to_svg(figure, description)


@matplotlib.rc_context(STYLE)
def reliability(bins: Sequence[dict[str, float]], description: str) -> str:
    """Draw a reliability diagram: accuracy against confidence, and the number of images of each point.

    Args:
        bins: `low`, `high`, `confidence`, `accuracy`, `count`; none of them empty.
        description: what a screen reader says instead of the image.
    """
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    sure, right = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    upper.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)), label="ideal")
    upper.plot(sure, right, color=COLOURS["blue"], linewidth=1.6, marker="o", label="this model")
    upper.set(ylim=(-0.03, 1.03), xlim=(0, 1.02), ylabel="accuracy")
    upper.legend(loc="upper left")
    upper.grid(True)
    upper.yaxis.set_major_formatter(PERCENT)
    starts, widths = [b["low"] for b in bins], [b["high"] - b["low"] for b in bins]
    look = {"color": COLOURS["blue"], "alpha": 0.55, "edgecolor": COLOURS["blue"], "linewidth": 0.8}
    lower.bar(starts, [b["count"] for b in bins], widths, align="edge", **look)
    lower.set(xlabel="confidence: the model's own probability", ylabel="images")
    lower.xaxis.set_major_formatter(PERCENT)
    lower.yaxis.set_major_formatter(COUNT)
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return to_svg(figure, description)


def to_counts(confusion: object, classes: int) -> np.ndarray | None:
    """Return a list of rows as counts `[classes, classes]`, or None where it is no such matrix."""
    try:
        counts = np.array(confusion, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return counts if classes and counts.shape == (classes, classes) and counts.min() >= 0 else None


def confusion_matrix(confusion: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Return a confusion matrix as `labels` and `rows` of (count, depth of colour), or as `svg` for many classes.

    Numbers make a table: names of any script, length and direction fit in, and a screen reader can walk it.
    """
    if len(labels) > NUMBERED_CLASSES:
        description = f"Confusion matrix of {len(labels)} classes; the table lists its peaks"
        return {"svg": confusion_heat_map(confusion, description)}
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    root = np.minimum(0.6, 0.12 + 0.6 * np.sqrt(share))  # rare mistakes stay visible, numbers readable
    depth = np.where(confusion > 0, root, 0)
    np.fill_diagonal(depth, np.diag(share))
    counts, depths = confusion.tolist(), depth.round(2).tolist()
    cells = [list(zip(*row, strict=True)) for row in zip(counts, depths, strict=True)]
    return {"labels": labels, "rows": list(zip(labels, cells, strict=True))}


def most_confused(confusion: np.ndarray, labels: list[str]) -> list[tuple[str, str, int, float]]:
    """Return the most frequent confusions: true class, predicted class, how often, share of the true class."""
    wrong = confusion - np.diag(np.diag(confusion))
    limit = 10 if len(labels) <= NUMBERED_CLASSES else 30
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit].tolist()
    cells = [(i, j) for i, j in (divmod(cell, len(labels)) for cell in order) if wrong[i, j] > 0]
    return [(labels[i], labels[j], int(wrong[i, j]), float(wrong[i, j] / confusion[i].sum())) for i, j in cells]


@matplotlib.rc_context(STYLE)
def confusion_heat_map(confusion: np.ndarray, description: str) -> str:
    """Draw a confusion matrix that has too many classes for numbers: blue is right, red is wrong, as shares of a row.

    Args:
        confusion: counts `[classes, classes]`, rows true, columns predicted.
        description: what a screen reader says instead of the image.
    """
    classes = len(confusion)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    right = pool(np.diag(np.diag(share)))
    wrong = pool(share - np.diag(np.diag(share)))
    image = np.zeros((*right.shape, 4))  # transparent where nothing happened: the page's own background shows
    image[..., :3] = np.where((right > 0)[..., None], (0.25, 0.45, 0.8), (0.78, 0.2, 0.3))
    image[..., 3] = np.where(right > 0, right, np.sqrt(wrong))  # the root: rare confusions stay visible
    figure, axes = _new_figure(height=4.3)
    axes.imshow(image, interpolation="none", extent=(0.5, classes + 0.5, classes + 0.5, 0.5))
    axes.grid(False)
    axes.set(xlabel="predicted class, by number", ylabel="true class, by number")
    return to_svg(figure, description)


def stored_thumbnail(thumbnail: object) -> dict[str, Any] | None:
    """Return the `src` of a thumbnail in a run's files, and whether it is `tiny`; None unless it is a small data address."""
    if not isinstance(thumbnail, str) or len(thumbnail) > THUMBNAIL_LIMIT:
        return None
    match = re.fullmatch(r"data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/]{32,}={0,2})", thumbnail)
    if not match:
        return None
    head = base64.b64decode(match[2][:32])
    size = struct.unpack(">II", head[16:24]) if match[1] == "png" else (math.inf,)  # a PNG's header
    return {"src": thumbnail, "tiny": max(size) <= TINY}


def to_svg(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element for a page: no fixed size, no metadata, no namespace."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": description}):  # equal bytes each time, unlike those of others
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib writes a viewBox"
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {box[0]} role="img" aria-label="{html.escape(description)}">{body}'


def thin(points: Points) -> tuple[list[float], list[float]]:
    """Return steps and values of at most `POINTS_LIMIT` points, each the average of neighbours."""
    array = np.array(points, dtype=float)
    if len(array) > POINTS_LIMIT:
        array = np.stack([chunk.mean(0) for chunk in np.array_split(array, POINTS_LIMIT)])
    return array[:, 0].tolist(), array[:, 1].tolist()


def running_mean(values: Sequence[float]) -> list[float]:
    """Return each value averaged with its neighbours, over a twenty-fifth of the curve and less at both ends."""
    radius = len(values) // 50
    spans = [min(radius, i, len(values) - 1 - i) for i in range(len(values))]
    return [float(np.mean(values[i - span : i + span + 1])) for i, span in enumerate(spans)]


def pool(matrix: np.ndarray) -> np.ndarray:
    """Return a square matrix of at most `CELLS_LIMIT` a side, each cell the largest of a block."""
    block = -(-len(matrix) // CELLS_LIMIT)
    padded = np.pad(matrix, (0, -len(matrix) % block))
    side = len(padded) // block
    return padded.reshape(side, block, side, block).max((1, 3))


def _new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure as wide as a phone, so that its letters are as large as the page's, and its axes."""
    figure = Figure(figsize=(4.4, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(True)
    return figure, axes


def _finish_curve(axes: Axes, percent: bool) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(COUNT)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PERCENT if percent else PLAIN)
    axes.margins(x=0.02)
    if not axes.get_legend_handles_labels()[0]:
        return
    above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "ncols": 3}  # never on a curve
    axes.legend(**above, borderaxespad=0.2, columnspacing=1.4, handlelength=1.5)
