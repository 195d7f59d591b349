"""Check loaded arrays and convert them to arrays that can be trained on.

Messages name the row and the column of a problem: the line of a file, or an index from 0. Columns without a name are
counted in the flattened sample.

Shapes: `N` samples, `W` values of a flattened sample, `K` targets per sample.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstlight.data.cells import is_missing, notation
from firstlight.data.samples import SPLITS, Samples
from firstlight.data.stored import Kept, Stored
from firstlight.errors import UsageError

Missing = Literal["refuse", "drop", "mean"]
MissingTargets = Literal["refuse", "drop"]

_MAX_LISTED = 3
_MAX_SHOWN = 40


def clean(
    samples: Samples, missing: Missing, missing_targets: MissingTargets = "refuse"
) -> tuple[Samples, NDArray[np.int64]]:
    """Return samples in which every value is a finite number and every label belongs to a class.

    A value is bad if it is missing, not a number, not finite or too large for float32. A row of tokens is bad if it
    holds only padding. A number or date in a notation that is not read, for example `1,234`, is always refused: rows
    with such values are not a random part of the data.

    Args:
        samples: As they were loaded.
        missing: How rows with bad inputs are handled. `"refuse"`: raise an error. `"drop"`: drop them. `"mean"`: keep
            missing inputs as NaN, which are filled later, and refuse other bad inputs.
        missing_targets: How rows with bad targets are handled. `"refuse"`: raise an error. `"drop"`: drop them.

    Returns:
        The samples, and the index `(N,)` of each in the loaded data. Inputs are float64; uint8 and integers keep their
        type. Targets are int64 class indices, float32 zeros and ones `(N, K)`, float64 numbers `(N, K)` or integers of
        the loaded type; `(N, 0)` if there are none.

    Raises:
        UsageError: If the data cannot be used. The message names rows and columns.
    """
    _check_shapes(samples)
    inputs = samples.inputs
    targets = np.empty((len(inputs), 0), np.float32) if samples.targets is None else samples.targets
    labels, bad_targets = _to_numbers(targets)
    if labels.size and labels.dtype.kind == "f" and np.isnan(labels).all():
        # A file to predict may have the column of targets, but no value in it.
        without = f"{samples.source or 'the data'} has no target in any row"
        samples = replace(samples, missing_reason=samples.missing_reason or without)
        targets = np.empty((len(inputs), 0), np.float32)
        labels, bad_targets = _to_numbers(targets)
    width = math.prod(inputs.shape[1:])
    found = _judge(samples, missing, samples.columns)
    names = samples.columns[width:]
    _refuse_notations(targets, labels, samples, names, "target")
    refused_inputs = found.bad & (missing != "drop")
    refused_targets = bad_targets.any(axis=1) & (missing_targets != "drop")
    bad: NDArray[np.bool_] = np.asarray(found.bad | bad_targets.any(axis=1))
    refused = refused_inputs | refused_targets

    def told(locations: list[str], has_targets: bool, count: int) -> str:
        of_targets = _locations(bad_targets, targets, samples, names, "target") if has_targets else []
        locations = locations + of_targets
        more = ", ..." if len(locations) > _MAX_LISTED else ""
        rows_with = f"{count} row{'s' * (count != 1)} with missing or invalid values: "
        return rows_with + ", ".join(locations[:_MAX_LISTED]) + more

    if refused.any():
        advice = []
        if refused_inputs.any():
            advice.append("missing=drop drops such rows")
            if missing == "refuse" and inputs.dtype.kind != "i" and found.only_missing:
                advice.append("missing=mean fills missing inputs")
        if refused_targets.any():
            advice.append("missing_targets=drop drops rows without a valid target")
        listed = told(found.locations * bool(refused_inputs.any()), bool(refused_targets.any()), int(refused.sum()))
        raise UsageError(f"{listed}; {', '.join(advice)}")
    if bad.all():
        raise UsageError(f"no row is left: {told(found.locations, True, len(bad))}")
    rows = np.flatnonzero(~bad)
    split = None if samples.split is None else samples.split[rows]
    cleaned = _labels(_rows_of(labels, rows), samples, rows)
    split_by = samples.split_by and samples.split_by.at(rows)
    inputs = _rows_of(found.numbers, rows)
    return replace(samples, inputs=inputs, targets=cleaned, split=split, split_by=split_by), rows


@dataclass
class _Judged:
    """What was found in the inputs.

    Args:
        numbers: The inputs as numbers.
        bad: `(N,)`, whether a row is bad.
        only_missing: Whether all that is bad is a missing value.
        locations: Names of the first bad values, at most one more than are listed.
    """

    numbers: NDArray[Any] | Stored
    bad: NDArray[np.bool_]
    only_missing: bool = True
    locations: list[str] = field(default_factory=list)


def _judge(samples: Samples, missing: Missing, names: list[str]) -> _Judged:
    """Judge the inputs, in chunks if they are on disk. There is nothing to judge in pixels."""
    inputs = samples.inputs
    _refuse_other_integers(inputs.dtype)
    found = _Judged(inputs, np.zeros(len(inputs), bool))
    if inputs.dtype == np.uint8:
        return found
    start = 0
    for part in inputs.chunks() if isinstance(inputs, Stored) else [inputs]:
        tokens = inputs.dtype.kind == "i"
        if tokens:
            _refuse_negative(part, samples, start)
        numbers, bad = _to_numbers(part)
        _refuse_notations(part, numbers, samples, names, "column {}", start)
        if tokens:
            bad = absent = np.count_nonzero(_flat(part), axis=1)[:, None] == 0  # Only padding.
        else:
            absent = np.isnan(_flat(numbers))
            bad = bad & ~absent if missing == "mean" else bad
        found.bad[start : start + len(part)] = bad.any(axis=1)
        found.only_missing = found.only_missing and not (bad & ~absent).any()
        if tokens:
            rows = start + np.flatnonzero(bad)[: _MAX_LISTED + 1]
            found.locations += [f"{samples.location(row)} without a token" for row in rows]
        else:
            found.locations += _locations(bad, part, samples, names, "column {}", start)
        del found.locations[_MAX_LISTED + 1 :]
        if not isinstance(inputs, Stored):
            found.numbers = numbers
        start += len(part)
    return found


def _rows_of(values: NDArray[Any] | Stored, rows: NDArray[np.int64]) -> Any:
    """Return the values at `rows`, on disk if they are there."""
    if isinstance(values, Stored):
        return values if len(rows) == len(values) else Kept(values, rows)
    return values[rows]


def _check_shapes(samples: Samples) -> None:
    inputs, targets, split = samples.inputs, samples.targets, samples.split
    if not len(inputs):
        raise UsageError("there are no samples")
    if inputs.ndim < 2 or not inputs.size:
        raise UsageError(
            f"the inputs have shape {inputs.shape}: they must be (samples, columns, ...) with no empty axis"
        )
    if targets is not None and len(inputs) != len(targets):
        raise UsageError(f"there are {len(inputs)} inputs, but {len(targets)} targets")
    if split is not None and len(inputs) != len(split):
        raise UsageError(f"there are {len(inputs)} inputs, but {len(split)} entries of split")
    if split is not None and not np.isin(split, SPLITS).all():
        wrong = np.flatnonzero(~np.isin(split, SPLITS))
        found = f"{samples.location(wrong[0])} has split={split[wrong[0]] or 'empty'}"
        raise UsageError(f"{found}: it must be one of {', '.join(SPLITS)}")


def _refuse_other_integers(dtype: np.dtype[Any]) -> None:
    if dtype.kind == "u" and dtype != np.uint8:
        raise UsageError(f"the inputs are {dtype}: use uint8 for pixels, int8 to int64 for tokens, floats for numbers")


def _refuse_negative(tokens: NDArray[Any], samples: Samples, start: int) -> None:
    if tokens.min() < 0:
        row, column = np.argwhere(_flat(tokens) < 0)[0]
        found = f"{samples.location(start + row)} column {column} is {_flat(tokens)[row, column]}"
        raise UsageError(f"{found}: tokens must be at least 0")


def _labels(targets: Any, samples: Samples, rows: NDArray[np.int64]) -> Any:
    """Return targets with the type and shape that `Samples` documents. Refuse labels that are not a class."""
    names = samples.class_names
    if not names or not targets.size:
        if targets.dtype.kind == "f":
            return targets[:, None] if targets.ndim == 1 else targets
        return targets if targets.dtype.kind == "i" else targets.astype(np.int64)
    columns = 0 if targets.ndim == 1 else targets.shape[1]
    if targets.ndim > 2 or (columns and len(names) != max(columns, 2)):
        raise UsageError(
            f"targets of shape {targets.shape} do not fit {len(names)} class names: they must be (N,), "
            "(N, 1) for 2 classes or (N, K) for K"
        )
    highest = 1 if columns else len(names) - 1
    wrong = np.argwhere((targets < 0) | (targets > highest) | (targets % 1 != 0))
    if len(wrong):
        raise UsageError(
            f"{samples.location(rows[wrong[0][0]])} has the label {targets[tuple(wrong[0])]:g}: "
            f"labels must be integers from 0 to {highest}, the classes are {', '.join(names)}"
        )
    return targets.astype(np.int64 if targets.ndim == 1 else np.float32)


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _to_numbers(values: Any) -> tuple[Any, NDArray[np.bool_]]:
    """Return values as float64, and which are bad `(N, W)`. Integers keep their type and are never bad, `(N, 0)`.

    Missing values become NaN. Text that is not a number, and numbers too large for float64, become infinity.
    """
    if values.dtype.kind in "iu":
        return values, np.zeros((len(values), 0), bool)
    with np.errstate(over="ignore"):
        if values.dtype.kind not in "bf":
            numbers = [_number(value) for value in values.reshape(-1)]
            values = np.array(numbers, dtype=np.float64).reshape(values.shape)
        values = values.astype(np.float64)
        bad = ~np.isfinite(_flat(values).astype(np.float32))
    return values, bad


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return float("nan") if is_missing(value) else float("inf")
    # `float` would accept 1_000.
    return float("inf") if isinstance(value, str) and "_" in value else number


def _refuse_notations(
    values: Any, numbers: NDArray[Any], samples: Samples, names: list[str], unnamed: str, start: int = 0
) -> None:
    """Refuse the first text that is a number or a date for people only; `start` is the row of the first value."""
    if values.dtype.kind in "biuf":
        return
    for row, column in np.argwhere(np.isinf(_flat(numbers))):
        if means := notation(str(_flat(values)[row, column])):
            at = np.zeros(_flat(values).shape, bool)
            at[row, column] = True
            raise UsageError(f"{_locations(at, values, samples, names, unnamed, start)[0]} is {means}")


def _locations(
    bad: NDArray[np.bool_], values: Any, samples: Samples, names: list[str], unnamed: str, start: int = 0
) -> list[str]:
    """Return names of the first bad values, like `line 5 column age (nan)`, at most one more than are listed."""
    locations = []
    for row, column in np.argwhere(bad)[: _MAX_LISTED + 1]:
        value = _flat(values)[row, column]
        where = f"column {names[column]}" if names else unnamed.format(column)
        text = "" if value is None else str(value).strip()
        text = f"{text[:_MAX_SHOWN]}..." if len(text) > _MAX_SHOWN else text or "empty"
        locations.append(f"{samples.location(start + row)} {where} ({text})")
    return locations
