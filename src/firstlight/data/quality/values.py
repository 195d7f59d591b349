"""The columns that the checks of data look at: those of a table, or figures of texts and images.

Shapes: `N` samples of a split, `C` columns, `K` targets per sample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstlight.data.samples import Samples, Split
from firstlight.data.stored import Indices, Stored

Numbers = NDArray[np.float64]
Kind = Literal["number", "category", "date"]

_VALUES = 20_000_000
"""Values of a split that are read at most."""
_ROWS = (200, 2_000)
"""Samples of a split, at least and at most, for the checks that sort a column or fit a tree to it."""
_SORTED = 2_000_000
"""Values that these checks read in all, if the least samples allow it."""
_MAX_TARGETS = 16


@dataclass(frozen=True)
class Column:
    """One input of all samples, or a figure of them, such as the length of a text.

    Args:
        name: How messages name it.
        values: `(N,)` for each split; NaN is missing. Categories are their indices, dates are seconds since 1970.
        kind: What the values are.
        categories: Names of the categories.
    """

    name: str
    values: Mapping[Split, Numbers]
    kind: Kind = "number"
    categories: Sequence[str] = ()

    @property
    def train(self) -> Numbers:
        """Values of the training split."""
        return self.values["train"]

    def shown(self, value: float) -> str:
        """Return a value as the file has it."""
        return self.categories[int(value)] if self.kind == "category" else f"{value:g}"


def input_columns(samples: Samples, parts: Mapping[Split, Indices]) -> list[Column]:
    """Return the columns of the inputs `(N, C)`."""
    width = samples.inputs.shape[1]
    taken = {split: samples.inputs[some(part, _rows_read(samples))].T.copy() for split, part in parts.items()}
    names = samples.columns[:width] or [str(index) for index in range(width)]
    columns = []
    for index, name in enumerate(names):
        values = {split: each[index] for split, each in taken.items()}
        kind = "category" if name in samples.categories else "date" if name in samples.dates else "number"
        columns.append(Column(name, values, kind, samples.categories.get(name, ())))  # type: ignore[arg-type]
    return columns


def figures(samples: Samples, parts: Mapping[Split, Indices]) -> list[Column]:
    """Return the length of texts, or the mean and the spread of images and of other numbers."""
    width = math.prod(samples.inputs.shape[1:])
    taken = {split: samples.inputs[some(part, _rows_read(samples))] for split, part in parts.items()}
    flat = {split: each.reshape(len(each), width) for split, each in taken.items()}
    if samples.inputs.dtype.kind == "i":
        return [Column("length", {split: np.count_nonzero(each, axis=1) * 1.0 for split, each in flat.items()})]
    # `std` makes float64 of all values that it gets.
    chunks = {split: np.array_split(each, 1 + each.size // 2**20) for split, each in flat.items()}
    means = {split: each.mean(axis=1, dtype=np.float64) for split, each in flat.items()}
    spreads = {
        split: np.concatenate([part.std(axis=1, dtype=np.float64) for part in each]) for split, each in chunks.items()
    }
    what = ("brightness", "contrast") if samples.inputs.dtype == np.uint8 else ("mean", "spread")
    return [Column(what[0], means), Column(what[1], spreads)]


def target_columns(samples: Samples, targets: Mapping[Split, NDArray[Any]]) -> list[Column]:
    """Return the columns of targets, of the samples whose inputs `input_columns` and `figures` take; `[]` for many."""
    if not targets:
        return []
    taken = {split: each[some(np.arange(len(each)), _rows_read(samples))] for split, each in targets.items()}
    flat = {split: each.reshape(len(each), -1).astype(np.float64) for split, each in taken.items()}
    count = flat["train"].shape[1]
    if count > _MAX_TARGETS:
        return []
    names = samples.columns[samples.inputs.shape[1] :]
    if len(names) != count:
        names = ["the target"] if count == 1 else [f"target {index}" for index in range(count)]
    kind: Literal["number", "category"] = "category" if samples.class_names else "number"
    categories = samples.class_names if count == 1 else ("0", "1")
    return [
        Column(name, {split: each[:, index] for split, each in flat.items()}, kind, categories)
        for index, name in enumerate(names)
    ]


def _rows_read(samples: Samples) -> int:
    """Return how many samples of a split are read; fewer from disk, where a sample may be a file to decode."""
    values = _VALUES // 4 if isinstance(samples.inputs, Stored) else _VALUES
    return values // math.prod(samples.inputs.shape[1:])


def some(part: Indices, count: int) -> Indices:
    """Return at most `count` indices of a split, at least 1, in their order."""
    count = max(1, count)
    if len(part) <= count:
        return part
    return part[np.sort(np.random.default_rng(0).choice(len(part), count, replace=False))]


def few(count: int, columns: int = 1) -> Indices:
    """Return the indices of 2,000 of `count` samples at most, and of fewer if there are many columns to sort."""
    least, most = _ROWS
    return some(np.arange(count), max(least, min(most, _SORTED // max(columns, 1))))
