"""What the samples of a data module look like: shapes, ranges, class shares, and a few of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from firstlight.data import DataModule
from firstlight.data.stored import Stored

_SHOWN = 4
"""Rows or texts that are shown."""
_GRID = 16
"""Images of a grid."""
_COLUMNS = 8
_READ = 10_000
"""Samples in memory that ranges are read from."""
_READ_BYTES = 50_000_000
_READ_STORED = 100
"""Samples on disk that ranges are read from."""


def summary(data: DataModule) -> str:
    """Return splits, shape, type and range of the inputs, and the classes or the range of the targets, in one line."""
    samples, train = data.cleaned_samples, data.indices["train"]
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in data.indices.items())
    shape = samples.inputs.shape[1:]
    most = _READ_STORED if isinstance(samples.inputs, Stored) else _READ
    most = max(min(most, _READ_BYTES // max(math.prod(shape) * samples.inputs.dtype.itemsize, 1)), 1)
    some = train[:: math.ceil(len(train) / most)]
    inputs = samples.inputs[some]
    size = " x ".join(map(str, shape))
    if inputs.dtype == np.uint8:
        what = f"{size} pixels, {inputs.min()} to {inputs.max()}"
    elif inputs.dtype.kind in "iu":
        what = f"{size} tokens, up to {inputs.max()}"
    else:
        what = f"{size} {'columns' if inputs.ndim == 2 else 'numbers'}"
    note = f"; {data.split_note}" if data.split_note else ""
    return f"{sizes} samples{note}; {what}; {_targets(data, some if isinstance(samples.targets, Stored) else train)}"


def _targets(data: DataModule, rows: Any) -> str:
    found: Any = data.cleaned_samples.targets
    names, targets = data.class_names, found[rows]
    if names and targets.size == len(targets):
        shares = np.bincount(targets.reshape(-1).astype(np.int64), minlength=len(names))[: len(names)] / len(targets)
        return f"{len(names)} classes, {_percent(shares.min())} to {_percent(shares.max())} each"
    if names:
        shares = targets.mean(0)
        return f"{len(names)} labels, {_percent(shares.min())} to {_percent(shares.max())} each"
    if targets.dtype.kind == "f":
        return f"targets {targets.min():.4g} to {targets.max():.4g}, mean {targets.mean():.4g}"
    return f"{(targets.shape[1:] and ' x '.join(map(str, targets.shape[1:]))) or 1} tokens as targets"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def class_shares(data: DataModule, most: int = 20) -> list[str]:
    """Return a line for each class with its share of the training samples; nothing if targets are not classes."""
    names, targets = data.class_names, data.cleaned_samples.targets
    if not names or not isinstance(targets, np.ndarray):
        return []
    train = targets[data.indices["train"]]
    is_single = train.size == len(train)
    counts = np.bincount(train.reshape(-1).astype(np.int64), minlength=len(names)) if is_single else train.sum(0)
    shares = zip(names, counts, strict=False)
    lines = [f"{name[:30]}: {int(count):,} ({_percent(count / len(train))})" for name, count in shares]
    return [*lines[:most], f"{len(lines) - most} more classes"] if len(lines) > most else lines


def examples(data: DataModule) -> list[str]:
    """Return a few training samples as lines: rows of a table, or excerpts of texts. Images have none, see `images`."""
    samples, rows = data.cleaned_samples, data.indices["train"][:_SHOWN]
    inputs = samples.inputs[rows]
    if inputs.dtype == np.uint8:
        return []
    labels = _labels(data, rows)
    if inputs.dtype.kind in "iu":
        texts = (bytes((row[row > 0] - 1).astype(np.uint8).tolist()).decode("utf-8", "replace") for row in inputs)
        return [f"{text[:70]!r}{label}" for text, label in zip(texts, labels, strict=True)]
    if inputs.ndim != 2:
        return []
    names = [*samples.columns, *(f"column {index}" for index in range(len(samples.columns), inputs.shape[1]))]
    shown = names[:_COLUMNS]
    more = ", ..." if inputs.shape[1] > _COLUMNS else ""
    lines = []
    for row, label in zip(inputs, labels, strict=True):
        cells = zip(shown, row, strict=False)
        lines.append(", ".join(f"{name} {_value(samples.categories.get(name), each)}" for name, each in cells))
        lines[-1] += more + label
    return lines


def _value(categories: Sequence[str] | None, value: float) -> str:
    if np.isnan(value):
        return "missing"
    return categories[int(value)] if categories and 0 <= int(value) < len(categories) else f"{value:.4g}"


def _labels(data: DataModule, rows: Any) -> list[str]:
    found: Any = data.cleaned_samples.targets
    names, targets = data.class_names, found[rows]
    if names and targets.size == len(targets):
        flat = targets.reshape(-1).astype(np.int64)
        return [f" -> {names[each] if 0 <= each < len(names) else each}" for each in flat]
    if names:
        set_ones = [[name for name, is_set in zip(names, each, strict=False) if is_set] for each in targets]
        return [" -> " + (", ".join(each) or "no label") for each in set_ones]
    if targets.dtype.kind == "f":
        return [" -> " + ", ".join(f"{value:.4g}" for value in np.atleast_1d(each)) for each in targets]
    return [""] * len(rows)


def images(data: DataModule) -> list[tuple[Any, str]]:
    """Return training images `(C, H, W)` uint8 with their labels; nothing if the samples are not images."""
    rows = data.indices["train"][:_GRID]
    inputs = data.cleaned_samples.inputs[rows]
    if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[1] not in (1, 3, 4):
        return []
    top = max(int(inputs.max()), 1)
    scaled = (inputs.astype(np.float32) * (255 / top if top < 128 else 1)).astype(np.uint8)
    return [(image, label.removeprefix(" -> ")) for image, label in zip(scaled, _labels(data, rows), strict=True)]
