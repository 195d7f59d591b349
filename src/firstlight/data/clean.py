"""Arrays as they were loaded become arrays that can be trained on, or are refused by row and column.

Shapes: `N` samples; `...` whatever one sample is shaped like. Columns are counted in a flattened sample.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstlight.errors import UsageError

__all__ = ["clean"]

_SHOWN = 3


def clean(
    inputs: NDArray[Any], targets: NDArray[Any], on_bad: Literal["refuse", "drop"] = "refuse"
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.int64]]:
    """Return inputs and targets in which every value is a finite number.

    Args:
        inputs: `(N, ...)`, numbers or what can be read as numbers.
        targets: `(N, ...)`; integers stay class indices and become int64, other numbers become float32.
        on_bad: What to do with a row that holds anything else: `"refuse"` it or `"drop"` it.

    Returns:
        The inputs as float32, the targets, and the rows `(N,)` of the arrays that they come from.

    Raises:
        UsageError: When a row is bad and `on_bad` is `"refuse"`, when no good row is left, or when the two arrays
            have different lengths. The message names rows and columns.
    """
    if len(inputs) != len(targets):
        raise UsageError(f"there are {len(inputs)} inputs but {len(targets)} targets")
    if not len(inputs):
        raise UsageError("there is no sample at all")
    columns = _numbers(inputs.reshape(len(inputs), -1))
    labels = _numbers(targets.reshape(len(targets), -1))
    bad = ~np.isfinite(np.concatenate([columns, labels], axis=1))
    if bad.any() and on_bad == "refuse":
        raise UsageError(_describe(bad, inputs, targets) + "; on_bad=drop leaves such rows out")
    kept = np.flatnonzero(~bad.any(axis=1))
    if not len(kept):
        raise UsageError(f"no row is left: {_describe(bad, inputs, targets)}")
    classes = targets.dtype.kind in "iub"
    # Not by way of float32, which has no odd numbers above 2**24.
    good = targets[kept].astype(np.int64) if classes else labels[kept].reshape(-1, *targets.shape[1:])
    return columns[kept].reshape(-1, *inputs.shape[1:]), good, kept


def _numbers(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 values, with NaN where something is no number and infinity where it is too large for one."""
    with np.errstate(over="ignore"):
        if values.dtype.kind in "iubf":
            return values.astype(np.float32)
        numbers = [[_number(value) for value in row] for row in values]
        return np.array(numbers, dtype=np.float64).reshape(values.shape).astype(np.float32)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _describe(bad: NDArray[np.bool_], inputs: NDArray[Any], targets: NDArray[Any]) -> str:
    """Name the first bad places: `2 rows hold something that is no finite number: row 3 column 17 (nan), ...`."""
    found = inputs.reshape(len(inputs), -1), targets.reshape(len(targets), -1)
    width = found[0].shape[1]
    places = []
    for row, column in np.argwhere(bad)[:_SHOWN]:
        where, value = (
            (f"column {column}", found[0][row, column]) if column < width else ("target", found[1][row, column - width])
        )
        places.append(f"row {row} {where} ({value})")
    count = int(bad.any(axis=1).sum())
    more = ", ..." if bad.sum() > _SHOWN else ""
    return f"{count} row{'s' * (count != 1)} with something that is no finite number: {', '.join(places)}{more}"
