"""Draw a learning-rate schedule or a range test, as text and as a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.errors import UsageError

WIDTH, HEIGHT = 60, 10


def as_text(rates: Sequence[float], steps: int) -> list[str]:
    """Return a curve as lines of text: `HEIGHT` lines of `WIDTH` characters, with the axes.

    Args:
        rates: `WIDTH` values, the first for step 0, the last for the last step.
        steps: Steps of the run.

    >>> for line in as_text([1 - column / 59 for column in range(60)], 600)[::5]:
    ...     print(line)
             1 |****
               |                              *******
               +------------------------------------------------------------
    """
    end = f"step {steps:,}"
    return [
        *_rows(rates, 0.0, max(rates), HEIGHT),
        " " * 11 + "+" + "-" * WIDTH,
        " " * 12 + "step 0" + end.rjust(WIDTH - 6),
    ]


def range_as_text(rates: Sequence[float], losses: Sequence[float], suggested: float, own: float) -> list[str]:
    """Return the losses of a range test as lines of text, over the logarithm of the learning rate.

    On the axis, `^` marks the suggested rate, and `o` the own one if it is within the test. Losses that are far above
    the first one are cut off.

    Args:
        rates: Rising learning rates.
        losses: A finite loss for each.
        suggested: The suggested rate.
        own: The configured rate.

    >>> losses = [2.0] * 4 + [1.0] * 2 + [3.0]
    >>> for line in range_as_text([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], losses, 1e-2, 1e-3)[::3]:
    ...     print(line)
             3 |                                                           *
               |******************************                         *
               |                                    **            **
                1e-06                                                      1
    """
    low, high = math.log(rates[0]), math.log(rates[-1])
    columns = [low + (high - low) * column / (WIDTH - 1) for column in range(WIDTH)]
    every = np.interp(columns, [math.log(rate) for rate in rates], losses)
    values: list[float] = every.clip(max=_top(losses)).tolist()
    axis = ["-"] * WIDTH
    for rate, mark in ((own, "o"), (suggested, "^")):
        if rates[0] <= rate <= rates[-1]:
            axis[round((WIDTH - 1) * (math.log(rate) - low) / (high - low))] = mark
    ends = f"{rates[0]:.3g}", f"{rates[-1]:.3g}"
    return [
        *_rows(values, min(values), max(values), HEIGHT - 2),
        " " * 11 + "+" + "".join(axis),
        " " * 12 + ends[0] + ends[1].rjust(WIDTH - len(ends[0])),
    ]


def _top(losses: Sequence[float]) -> float:
    """Return the loss at which a range test is cut off: its rise at the end would flatten the fall before it."""
    return 2 * losses[0] - min(losses) if losses[0] > min(losses) else max(losses)


def _rows(values: Sequence[float], bottom: float, top: float, height: int) -> list[str]:
    """Return `height` lines of text with a star in each column, and the ends of the vertical axis."""
    rows = [round((height - 1) * (each - bottom) / (top - bottom)) if top > bottom else 0 for each in values]
    lines = []
    for row in reversed(range(height)):
        label = f"{top:.3g}" if row == height - 1 else f"{bottom:.3g}" if row == 0 else ""
        lines.append((f"{label:>10} |" + "".join("*" if each == row else " " for each in rows)).rstrip())
    return lines


def refuse_plot(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is tried."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} must end in .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.absolute().parent} does not exist")


def as_png(path: Path, rates: Sequence[float], steps: float, images: Sequence[tuple[Any, str]]) -> None:
    """Write a PNG with the schedule, and a grid of images `(C, H, W)` of uint8 with their labels below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 8
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(8, 2.8 + 1.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[2.4, *[1] * lines])
    axes = figure.add_subplot(grid[0, :])
    if rates:
        axes.plot([steps * index / (len(rates) - 1) for index in range(len(rates))], rates)
    axes.set(xlabel="optimiser step", ylabel="learning rate", title="learning rate of the run")
    axes.set_ylim(bottom=0)
    for index, (image, label) in enumerate(images):
        place = figure.add_subplot(grid[1 + index // columns, index % columns])
        shown = image[0] if len(image) not in (3, 4) else image.transpose(1, 2, 0)
        place.imshow(shown, cmap="gray", interpolation="nearest")
        place.set_title(label, fontsize=8)
        place.set_axis_off()
    _save(figure, path)


def range_as_png(
    path: Path,
    sweeps: Sequence[tuple[Sequence[float], Sequence[float]]],
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    suggested: tuple[float, float, float],
    own: float,
) -> None:
    """Write a PNG with the losses of a range test.

    Args:
        path: The file.
        sweeps: Rates and losses of each sweep, as dots.
        curves: Rates and smoothed losses of each, as lines.
        suggested: The suggested rate, and its interval.
        own: The configured rate.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, ((rates, losses), (smooth_rates, smooth)) in enumerate(zip(sweeps, curves, strict=True)):
        axes.plot(rates, losses, ".", color=f"C{index}", markersize=3, alpha=0.4)
        axes.plot(smooth_rates, smooth, color=f"C{index}", label=f"order {index + 1} of the data")
    smoothed = [loss for _, losses in curves for loss in losses]
    low, high = min(smoothed), min(max(smoothed), max(_top(losses) for _, losses in curves))
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    rate, *interval = suggested
    axes.axvspan(*interval, color="0.5", alpha=0.2)
    axes.axvline(rate, color="black", label=f"suggested: {rate:.2g}")
    if own > 0:
        axes.axvline(own, color="black", linestyle=":", label=f"yours: {own:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="learning-rate range test")
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, or raise a UsageError if the disk fails."""
    try:
        figure.savefig(path, dpi=100, metadata={"Software": "firstlight"})
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
