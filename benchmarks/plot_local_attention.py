"""Draw what `benchmarks/local_attention.py --out FILE.json` measured, time and memory, into docs/images.

python -m benchmarks.plot_local_attention benchmarks/local_attention.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAMES = {
    "masked": ("fused, dense N×N mask (the article's way)", "#b2182b", "s"),
    "fused": ("fused, no mask: all to all", "#888888", "o"),
    "flex": ("FlexAttention, compiled (forward only)", "#e08214", "^"),
    "ours": ("ours, window {window}", "#2166ac", "D"),
}
FORMATS = {"float32": "fp32", "bfloat16": "bf16"}


def main(path: Path) -> None:
    """Draw one figure for time, one for memory."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    windows = sorted({row["window"] for row in rows})
    timed = [row for row in rows if "ms" in row]
    panels = [(dtype, work) for work in ("forward + backward", "forward") for dtype in FORMATS]
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.5), sharex=True, sharey="row")
    for axis, (dtype, work) in zip(axes.flat, panels, strict=True):
        axis.set_title(f"{FORMATS[dtype]}, {work}", fontsize=10)
        draw(
            axis, [row for row in timed if (row["dtype"], row["work"]) == (dtype, work)], windows, lambda row: row["ms"]
        )
    finish(figure, axes, "milliseconds", "local_attention_time.png")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharex=True, sharey=True, squeeze=False)
    for axis, dtype in zip(axes.flat, FORMATS, strict=True):
        axis.set_title(f"{FORMATS[dtype]}, forward + backward", fontsize=10)
        measured = [row for row in rows if "mb" in row and row["dtype"] == dtype]
        draw(axis, measured, windows, lambda row: row["mb"])
    finish(figure, axes, "peak memory, MB", "local_attention_memory.png")


def draw(axis: Axes, rows: list[dict[str, Any]], windows: list[int], of: Callable[[dict[str, Any]], dict]) -> None:
    """Draw a line for each way; `of` returns the figures of a row. Ways without a window are drawn once."""
    for way, (label, colour, mark) in NAMES.items():
        for number, window in enumerate(windows if way == "ours" else windows[:1]):
            line = sorted(
                (row["grid"] ** 2, of(row)[way]) for row in rows if row["window"] == window and way in of(row)
            )
            if line:
                style = {"color": colour, "marker": mark, "markersize": 5, "linestyle": ("-", "--", ":")[number % 3]}
                axis.plot(*zip(*line, strict=True), label=label.format(window=window), **style)  # pyright: ignore[reportArgumentType]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row["grid"] for row in rows})
    axis.set_xticks([tick**2 for tick in ticks], [f"{tick}²" for tick in ticks])
    axis.grid(alpha=0.3, which="major")


def finish(figure: Any, axes: Any, unit: str, name: str) -> None:
    """Label the outer axes, put one legend below, save the figure."""
    for row in axes:
        row[0].set_ylabel(unit)
    for axis in axes[-1]:
        axis.set_xlabel("patches N")
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=2, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.16 if len(axes) == 1 else 0.1, 1, 1))
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
