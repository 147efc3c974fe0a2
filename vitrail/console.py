"""Print lines, warnings and progress while a command works. Imports rich, nothing heavier."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Without a terminal there are no bars, but a line of progress every so many seconds.
_LINE_SECONDS = 10.0


class Console:
    """Prints lines, warnings, results and progress bars of a command; prints nothing where it is `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.terminal = rich.console.Console(quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self.live = self.terminal.is_terminal and not quiet

    def info(self, line: str = "") -> None:
        """Print a line."""
        self.terminal.print(printable(line))

    def warn(self, line: str) -> None:
        """Print a line as a warning."""
        self.terminal.print(f"[yellow]warning:[/] {printable(line)}")

    def success(self, line: str) -> None:
        """Print a line as a result."""
        self.terminal.print(f"[bold green]{printable(line)}[/]")

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show the progress of a job, and yield the function `advance(done, total)` that updates it."""
        if not self.live:
            yield self._lines(title)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.terminal, transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def _lines(self, title: str) -> Callable[[int, int], None]:
        printed_at = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal printed_at
            if time.monotonic() - printed_at >= _LINE_SECONDS:
                printed_at = time.monotonic()
                self.info(f"{title}: {done:,} of {total:,}")

        return advance


def printable(line: str) -> str:
    """Return a line with its markup escaped and as valid Unicode: file names may hold bytes that are not UTF-8."""
    return escape(line.encode("utf-8", "backslashreplace").decode())


class TrainingDisplay:
    """Shows the progress of a training: a live bar in a terminal, elsewhere a line every few seconds."""

    def __init__(self, console: Console, *, total_steps: int, steps_per_epoch: float, start: int) -> None:
        self.console, self.total_steps, self.steps_per_epoch = console, total_steps, steps_per_epoch
        self.printed_at = 0.0
        self.progress: Progress | None = None
        if console.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=console.terminal)
            self.task = self.progress.add_task("starting", total=total_steps, completed=start, figures="")

    def __enter__(self) -> TrainingDisplay:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def update(self, step: int, means: Mapping[str, float], images_per_s: float, remaining_s: float) -> None:
        """Show where training is, with the figures since the last line of metrics, by their names in it."""
        epochs = self.total_steps / self.steps_per_epoch
        position = f"epoch {step / self.steps_per_epoch:.1f} of {epochs:.4g}"
        accuracy = f"  accuracy {means['train/top1']:.1%}" if "train/top1" in means else ""
        figures = f"loss {means['train/loss']:.3f}{accuracy}  {images_per_s:,.0f} images/s"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=position, figures=figures)
        elif time.monotonic() - self.printed_at >= _LINE_SECONDS:
            self.printed_at = time.monotonic()
            steps = f"step {step:,} of {self.total_steps:,}"
            self.console.info(f"{position}  {steps}  {figures}  {duration(remaining_s)} left")

    def evaluated(self, epoch: float, metrics: Mapping[str, float], is_best: bool) -> None:
        """Show an evaluation: the accuracy and the loss of a classifier, else all its metrics."""
        if "top1" in metrics:
            count = f" of {metrics['num_images']:,}"
            text = f"validation accuracy {metrics['top1']:.2%}{count}, loss {metrics['loss']:.4f}"
        else:
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.console.info(f"epoch {round(epoch, 1):g}: {text}{'  best so far' if is_best else ''}")


def duration(seconds: float) -> str:
    """Return seconds as text, such as `45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def byte_size(num_bytes: int) -> str:
    """Return a number of bytes as text, such as `3.2 GB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1e3:.0f} kB"
