"""Charts of a report as SVG, drawn by matplotlib. Colours are CSS variables, so that a page may be light or dark.

Shapes: `P` points of a line, `C` classes, `L` layers.
"""

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Line = tuple[NDArray[Any], NDArray[Any]]
"""The x and y values `(P,)` of a line."""

COLOURS = {"ink": "#1f2328", "muted": "#6e7781", "grid": "#d0d7de", "c1": "#0969da", "c2": "#bc4c00", "c3": "#8250df"}
"""Colours of the light page. The SVG names them as `var(--ink)` and so on."""
_MOST_POINTS = 1_000


def lines(
    of: Mapping[str, Line], x: str, y: str, log: bool = False, mark: tuple[float, str] | None = None, ends: bool = True
) -> str:
    """Return a chart with a line for each entry.

    Args:
        of: Lines by label, at most three.
        x: Label of the x axis.
        y: Label of the y axis.
        log: Whether the y axis is logarithmic, if all values are above 0.
        mark: An x value with a vertical line, and its label.
        ends: Whether few points are drawn as dots, too.
    """
    figure, axes = _axes(x, y)
    for colour, (label, (xs, ys)) in zip(("c1", "c2", "c3"), of.items(), strict=False):
        colour = "c2" if label == "val" else colour  # Also where it is alone.
        xs, ys = _thinned(xs, ys)
        marker = "o" if ends and len(xs) <= 60 else None
        axes.plot(xs, ys, color=COLOURS[colour], label=label, marker=marker, markersize=2.5, linewidth=1.4)
    if log and all((ys > 0).all() for _, ys in of.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_ticks())
        axes.yaxis.set_minor_formatter(_plain_ticks(_labelled(*axes.get_ylim())))
    if mark:
        axes.axvline(mark[0], color=COLOURS["muted"], linewidth=1, linestyle="--", label=mark[1])
    if len(of) > 1 or mark:
        _legend(axes)
    return _svg(figure)


def heat_map(values: Numbers, columns: Sequence[float] | Numbers, rows: Sequence[str], x: str, label: str) -> str:
    """Return a map of values `(L, P)` with one row for each of `rows`; NaN stays empty."""
    figure, axes = _axes(x, "", height=max(1.8, 0.9 + 0.22 * len(rows)), grid=False)
    image = axes.imshow(
        values, aspect="auto", interpolation="nearest", cmap="viridis", extent=(columns[0], columns[-1], len(rows), 0)
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    _colour_bar(figure, image, axes, label)
    return _svg(figure)


def matrix(counts: NDArray[Any], names: Sequence[str]) -> str:
    """Return a confusion matrix `(C, C)`, rows are targets. Colours show the share of the row; 0 is transparent."""
    return _svg(_matrix(counts, names))


def matrix_pixels(counts: NDArray[Any], names: Sequence[str]) -> NDArray[np.uint8]:
    """Return a confusion matrix `(C, C)` as a picture `(H, W, 4)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _matrix(counts, names)
    figure.set_dpi(110)
    figure.patch.set(alpha=1, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]


def _matrix(counts: NDArray[Any], names: Sequence[str]) -> Any:
    size = min(7.0, 2.2 + 0.42 * len(names))
    figure, axes = _axes("predicted", "target", width=size, height=size * 0.82, grid=False)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    blue = LinearSegmentedColormap.from_list("blue", [(*to_rgb(COLOURS["c1"]), alpha) for alpha in (0.0, 1.0)])
    image = axes.imshow(shares, cmap=blue, vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0, ha="right")
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(counts > 0):
            colour = "#ffffff" if shares[row, column] > 0.5 else COLOURS["ink"]
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=colour)
    _colour_bar(figure, image, axes, "share of the target's samples")
    return figure


def diagonal(of: Mapping[str, Line], x: str, y: str, marker: str | None = None) -> str:
    """Return lines in the unit square with its diagonal: a ROC curve, or a reliability diagram with markers."""
    figure, axes = _axes(x, y, width=4.4, height=3.6)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle="--")
    for colour, (label, (xs, ys)) in zip(("c1", "c2", "c3"), of.items(), strict=False):
        axes.plot(xs, ys, color=COLOURS[colour], label=label, marker=marker, markersize=4, linewidth=1.4)
    _legend(axes)
    return _svg(figure)


def scatter(xs: Numbers, ys: Numbers, x: str, y: str) -> str:
    """Return points, at most 1,000 of them, with the diagonal x = y."""
    figure, axes = _axes(x, y, width=4.8, height=3.6)
    xs, ys = _thinned(xs, ys)
    axes.plot(xs, ys, "o", color=COLOURS["c1"], markersize=3, alpha=0.5)
    ends = [min(xs.min(), ys.min()), max(xs.max(), ys.max())]
    axes.plot(ends, ends, color=COLOURS["muted"], linewidth=1, linestyle="--")
    return _svg(figure)


def histogram(values: Numbers, x: str) -> str:
    """Return a histogram of values `(P,)`."""
    figure, axes = _axes(x, "samples", width=4.8, height=2.8)
    axes.hist(values, bins=min(40, max(5, int(len(values) ** 0.5))), color=COLOURS["c1"])
    return _svg(figure)


def bars(values: Mapping[str, float], x: str) -> str:
    """Return a horizontal bar for each value, the first one on top."""
    figure, axes = _axes(x, "", height=max(1.2, 0.7 + 0.25 * len(values)))
    axes.barh(range(len(values)), [*values.values()], color=COLOURS["c1"], height=0.6)
    axes.set_yticks(range(len(values)), [*values])
    axes.invert_yaxis()
    return _svg(figure)


def history(of: Mapping[str, Line], best: Line, x: str, y: str) -> str:
    """Return points of two kinds, and the best value so far as steps.

    Args:
        of: Points by label, at most two: the first are filled.
        best: The steps.
        x: Label of the x axis.
        y: Label of the y axis.
    """
    figure, axes = _axes(x, y)
    for (label, (xs, ys)), fill, colour in zip(of.items(), ("c1", "none"), ("c1", "muted"), strict=False):
        face = COLOURS.get(fill, fill)
        axes.plot(xs, ys, "o", color=COLOURS[colour], markerfacecolor=face, markersize=4, label=label)
    axes.step(*best, where="post", color=COLOURS["c2"], linewidth=1.4, label="best so far")
    _legend(axes)
    return _svg(figure)


def parallel(columns: Mapping[str, tuple[Numbers, bool]], values: Numbers, best: int, label: str) -> str:
    """Return parallel coordinates: a line for each of `T` trials.

    Args:
        columns: By name, the values `(T,)` of each trial, NaN where it has none, and whether the axis is logarithmic.
        values: `(T,)`, the last axis.
        best: The trial that is drawn on top.
        label: Label of the last axis.
    """
    figure, axes = _axes("", "", width=max(5.6, 1.4 * len(columns) + 2.8), height=3.4, grid=False)
    every = {**columns, label: (values, bool((values > 0).all()))}
    heights = []
    for place, (numbers, is_log) in enumerate(every.values()):
        scaled = np.log(numbers) if is_log else numbers
        low, high = float(np.nanmin(scaled)), float(np.nanmax(scaled))
        heights.append((scaled - low) / (high - low) if high > low else np.where(np.isnan(scaled), np.nan, 0.5))
        axes.axvline(place, color=COLOURS["muted"], linewidth=0.8)
        for end, height, side in ((np.nanmin(numbers), -0.03, "top"), (np.nanmax(numbers), 1.03, "bottom")):
            axes.text(place, height, f"{end:.3g}", ha="center", va=side, fontsize=8, color=COLOURS["ink"])
    for trial, line in enumerate(np.array(heights).T):
        is_best = trial == best
        colour, width, alpha = (COLOURS["c2"], 2.2, 1.0) if is_best else (COLOURS["c1"], 0.9, 0.35)
        axes.plot(line, color=colour, linewidth=width, alpha=alpha, zorder=3 if is_best else 2)
    axes.set_xticks(range(len(every)), [*every])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.12, 1.12)
    return _svg(figure)


def in_light_colours(svg: str) -> str:
    """Return a chart whose colours are those of the light page, for a file of its own."""
    return re.sub(r"var\(--(\w+)\)", lambda match: COLOURS[match[1]], svg)


def _axes(x: str, y: str, width: float = 5.6, height: float = 2.8, grid: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # It takes a quarter of a second, and most commands draw nothing.

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x, color=COLOURS["ink"], fontsize=9)
    axes.set_ylabel(y, color=COLOURS["ink"], fontsize=9)
    axes.tick_params(which="both", colors=COLOURS["ink"], labelsize=8, width=0.6)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(COLOURS["muted"])
    if grid:
        axes.grid(color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes


def _plain_ticks(digits: Sequence[int] = range(1, 10)) -> Any:
    """Return a format without exponents; of a number like 0.03, the digit must be one of `digits`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if int(f"{value:e}"[0]) in digits else "")


def _labelled(low: float, high: float) -> Sequence[int]:
    """Return the first digits that have room for a label on a logarithmic axis.

    >>> _labelled(0.5, 2), _labelled(0.03, 1), _labelled(1e-5, 1)
    (range(2, 10), (2, 5), ())
    """
    decades = math.log10(high / low)
    return range(2, 10) if decades < 0.7 else (2, 3, 5) if decades < 1.3 else (2, 5) if decades < 3 else ()


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=COLOURS["ink"])


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.tick_params(colors=COLOURS["ink"], labelsize=8, width=0.6)
    bar.set_label(label, color=COLOURS["ink"], fontsize=8)
    bar.outline.set_visible(False)


def _svg(figure: Any) -> str:
    """Return a figure as an SVG element whose width is that of the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, so that it can be read aloud and searched. The salt gives the same file for the same run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "firstlight", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    # Several charts stand in one page, whose ids must differ.
    salt = format(zlib.crc32(svg.encode()), "x")
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: f"{match[1]}{salt}-", svg)
    width = re.search(r'width="([\d.]+)pt"', svg)
    style = f"max-width:{float(width[1]) * 4 / 3:.0f}px" if width else ""
    return re.sub(r' height="[\d.]+pt"', "", re.sub(r' width="[\d.]+pt"', f' style="{style}"', svg, count=1), count=1)


def _thinned(xs: Numbers, ys: Numbers) -> tuple[Numbers, Numbers]:
    """Return at most 1,000 points, evenly chosen, with the last one."""
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    chosen = np.unique(np.linspace(0, len(xs) - 1, _MOST_POINTS).astype(int))
    return xs[chosen], ys[chosen]
