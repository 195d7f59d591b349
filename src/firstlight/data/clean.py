"""Arrays as they were loaded become arrays that can be trained on, or are refused by row and column.

Rows of a file are named by their lines, others are counted from 0, columns too where they have no names, in a flattened
sample. Shapes: `N` samples, `W` values of
a flattened sample, `K` targets of a sample.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstlight.data.samples import SPLITS, Samples
from firstlight.errors import UsageError

__all__ = ["Missing", "clean"]

Missing = Literal["refuse", "drop", "mean"]

_SHOWN = 3
_MISSING = (None, "", "NA", "NaN", "nan")


def clean(samples: Samples, missing: Missing) -> tuple[Samples, NDArray[np.int64]]:
    """Return samples in which every value is a finite number and every label one of the classes.

    Args:
        samples: As they were loaded.
        missing: What to do with a row that holds anything else, or of tokens only padding: `"refuse"` it or `"drop"`
            it. With `"mean"`, NaN and what is empty stay NaN in the inputs, to be filled, and anything else is refused.

    Returns:
        The samples, and the rows `(N,)` of the loaded ones that they come from. Inputs are float64, or uint8 and
        integers as they were; targets are int64 class indices, float32 `(N, K)` or integers as they were. Without
        targets they are `(N, 0)`.

    Raises:
        UsageError: When something does not fit. The message names rows and columns.
    """
    _check_shapes(samples)
    _check_integers(samples)
    inputs = samples.inputs
    targets = np.empty((len(inputs), 0), np.float32) if samples.targets is None else samples.targets
    numbers, bad_inputs = _read(inputs)
    if inputs.dtype.kind == "i":
        bad_inputs = np.count_nonzero(_flat(inputs), axis=1)[:, None] == 0  # Of tokens nothing but padding.
    elif missing == "mean" and bad_inputs.size:
        bad_inputs = np.isinf(_flat(numbers).astype(np.float32))
    labels, bad_targets = _read(targets)
    bad = bad_inputs.any(axis=1) | bad_targets.any(axis=1)
    if bad.any():
        places = _places(bad_inputs, inputs, samples, samples.columns, "column {}")
        if inputs.dtype.kind == "i":
            places = [f"{samples.location(row)} without a token" for row in np.flatnonzero(bad_inputs)[: _SHOWN + 1]]
        places += _places(bad_targets, targets, samples, samples.columns[_flat(inputs).shape[1] :], "target")
        more = ", ..." if len(places) > _SHOWN else ""
        count = int(bad.sum())
        found = f"{count} row{'s' * (count != 1)} with something missing or not finite: "
        found += ", ".join(places[:_SHOWN]) + more
        if missing != "drop":
            raise UsageError(
                f"{found}; missing=drop leaves such rows out, missing=mean fills what is missing in inputs"
            )
        if bad.all():
            raise UsageError(f"no row is left: {found}")
    rows = np.flatnonzero(~bad)
    marks = None if samples.split is None else samples.split[rows]
    return replace(samples, inputs=numbers[rows], targets=_labels(labels[rows], samples, rows), split=marks), rows


def _check_shapes(samples: Samples) -> None:
    inputs, targets, split = samples.inputs, samples.targets, samples.split
    if not len(inputs):
        raise UsageError("there is no sample at all")
    if inputs.ndim < 2 or not inputs.size:
        raise UsageError(f"the inputs have shape {inputs.shape}: the first axis is samples, the second columns")
    if targets is not None and len(inputs) != len(targets):
        raise UsageError(f"there are {len(inputs)} inputs but {len(targets)} targets")
    if split is not None and len(inputs) != len(split):
        raise UsageError(f"there are {len(inputs)} inputs but {len(split)} marks of a split")
    if split is not None and not np.isin(split, SPLITS).all():
        wrong = np.flatnonzero(~np.isin(split, SPLITS))
        raise UsageError(
            f"{samples.location(wrong[0])} is marked as split {split[wrong[0]]!s}: it is one of {', '.join(SPLITS)}"
        )


def _check_integers(samples: Samples) -> None:
    inputs = samples.inputs
    if inputs.dtype.kind not in "iu":
        return
    if inputs.dtype.kind == "u" and inputs.dtype != np.uint8:
        raise UsageError(f"inputs are {inputs.dtype}: pixels are uint8, tokens int8 to int64, numbers floats")
    if inputs.min() < 0:
        row, column = np.argwhere(_flat(inputs) < 0)[0]
        raise UsageError(
            f"{samples.location(row)} column {column} is {_flat(inputs)[row, column]}: tokens are at least 0"
        )


def _labels(targets: NDArray[Any], samples: Samples, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return targets of the type and shape that `Samples` promises, and refuse labels that are no class."""
    names = samples.class_names
    if not names or not targets.size:
        if targets.dtype.kind == "f":
            return (targets.reshape(len(targets), -1) if targets.ndim == 1 else targets).astype(np.float32)
        return targets if targets.dtype.kind == "i" else targets.astype(np.int64)
    columns = 0 if targets.ndim == 1 else targets.shape[1]
    if targets.ndim > 2 or (columns and len(names) != max(columns, 2)):
        raise UsageError(f"targets of shape {targets.shape} do not fit {len(names)} class names")
    most = 1 if columns else len(names) - 1
    wrong = np.argwhere((targets < 0) | (targets > most) | (targets % 1 != 0))
    if len(wrong):
        raise UsageError(
            f"{samples.location(rows[wrong[0][0]])} has the label {targets[tuple(wrong[0])]:g}: labels are 0 to {most}, of "
            f"the classes {', '.join(names)}"
        )
    return targets.astype(np.int64 if targets.ndim == 1 else np.float32)


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _read(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return integers as they are and else float64, and what is bad in a sample `(N, W)`, of integers nothing.

    NaN stands where something is missing, infinity where it is no number or too large for one.
    """
    if values.dtype.kind in "iu":
        return values, np.zeros((len(values), 0), bool)
    with np.errstate(over="ignore"):
        if values.dtype.kind not in "bf":
            numbers = [_number(value) for value in values.reshape(-1)]
            values = np.array(numbers, dtype=np.float64).reshape(values.shape)
        values = values.astype(np.float64)
        too_large = ~np.isfinite(_flat(values).astype(np.float32))
    return values, too_large


def _number(value: Any) -> float:
    try:
        # `float` reads 1_000 as well.
        return float("nan") if value in _MISSING else float("inf" if "_" in str(value) else value)
    except (TypeError, ValueError):
        return float("inf")


def _places(
    bad: NDArray[np.bool_], values: NDArray[Any], samples: Samples, names: list[str], otherwise: str
) -> list[str]:
    """Name the first bad places, for example `line 5 column age (nan)`, at most one more than are shown."""
    places = []
    for row, column in np.argwhere(bad)[: _SHOWN + 1]:
        value = _flat(values)[row, column]
        where = f"column {names[column]}" if names else otherwise.format(column)
        places.append(f"{samples.location(row)} {where} ({'empty' if value in (None, '') else value})")
    return places
