"""Check loaded arrays and convert them to arrays that can be trained on.

Messages name the row and the column of a problem: the line of a file, or an index from 0. Columns without a name are
counted in the flattened sample.

Shapes: `N` samples, `W` values of a flattened sample, `K` targets per sample.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstlight.data.cells import is_missing, notation
from firstlight.data.samples import SPLITS, Samples
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
    _check_integers(samples)
    inputs = samples.inputs
    targets = np.empty((len(inputs), 0), np.float32) if samples.targets is None else samples.targets
    numbers, bad_inputs = _to_numbers(inputs)
    labels, bad_targets = _to_numbers(targets)
    if labels.size and labels.dtype.kind == "f" and np.isnan(labels).all():
        # A file to predict may have the column of targets, but no value in it.
        without = f"{samples.source or 'the data'} has no target in any row"
        samples = replace(samples, missing_reason=samples.missing_reason or without)
        targets = np.empty((len(inputs), 0), np.float32)
        labels, bad_targets = _to_numbers(targets)
    names = samples.columns, samples.columns[_flat(inputs).shape[1] :]
    _refuse_notations(inputs, numbers, samples, names[0], "column {}")
    _refuse_notations(targets, labels, samples, names[1], "target")
    tokens = inputs.dtype.kind == "i"
    absent = np.isnan(_flat(numbers)) if bad_inputs.size else bad_inputs
    if tokens:
        bad_inputs = absent = np.count_nonzero(_flat(inputs), axis=1)[:, None] == 0  # Only padding.
    elif missing == "mean":
        bad_inputs = bad_inputs & ~absent
    refused_inputs = bad_inputs & (missing != "drop")
    refused_targets = bad_targets & (missing_targets != "drop")
    bad: NDArray[np.bool_] = np.asarray(bad_inputs.any(axis=1) | bad_targets.any(axis=1))
    refused = refused_inputs.any(axis=1) | refused_targets.any(axis=1)

    def found(bad_inputs: NDArray[np.bool_], bad_targets: NDArray[np.bool_], count: int) -> str:
        locations = _locations(bad_inputs, inputs, samples, names[0], "column {}")
        if tokens:
            rows = np.flatnonzero(bad_inputs)[: _MAX_LISTED + 1]
            locations = [f"{samples.location(row)} without a token" for row in rows]
        locations += _locations(bad_targets, targets, samples, names[1], "target")
        more = ", ..." if len(locations) > _MAX_LISTED else ""
        rows_with = f"{count} row{'s' * (count != 1)} with missing or invalid values: "
        return rows_with + ", ".join(locations[:_MAX_LISTED]) + more

    if refused.any():
        advice = []
        if refused_inputs.any():
            advice.append("missing=drop drops such rows")
            if missing == "refuse" and not tokens and not (refused_inputs & ~absent).any():
                advice.append("missing=mean fills missing inputs")
        if refused_targets.any():
            advice.append("missing_targets=drop drops rows without a valid target")
        raise UsageError(f"{found(refused_inputs, refused_targets, int(refused.sum()))}; {', '.join(advice)}")
    if bad.all():
        raise UsageError(f"no row is left: {found(bad_inputs, bad_targets, len(bad))}")
    rows = np.flatnonzero(~bad)
    split = None if samples.split is None else samples.split[rows]
    return replace(samples, inputs=numbers[rows], targets=_labels(labels[rows], samples, rows), split=split), rows


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


def _check_integers(samples: Samples) -> None:
    inputs = samples.inputs
    if inputs.dtype.kind not in "iu":
        return
    if inputs.dtype.kind == "u" and inputs.dtype != np.uint8:
        raise UsageError(
            f"the inputs are {inputs.dtype}: use uint8 for pixels, int8 to int64 for tokens, floats for numbers"
        )
    if inputs.min() < 0:
        row, column = np.argwhere(_flat(inputs) < 0)[0]
        raise UsageError(
            f"{samples.location(row)} column {column} is {_flat(inputs)[row, column]}: tokens must be at least 0"
        )


def _labels(targets: NDArray[Any], samples: Samples, rows: NDArray[np.int64]) -> NDArray[Any]:
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


def _to_numbers(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
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
    values: NDArray[Any], numbers: NDArray[Any], samples: Samples, names: list[str], unnamed: str
) -> None:
    """Refuse the first text that is a number or a date for people only."""
    if values.dtype.kind in "biuf":
        return
    for row, column in np.argwhere(np.isinf(_flat(numbers))):
        if means := notation(str(_flat(values)[row, column])):
            at = np.zeros(_flat(values).shape, bool)
            at[row, column] = True
            raise UsageError(f"{_locations(at, values, samples, names, unnamed)[0]} is {means}")


def _locations(
    bad: NDArray[np.bool_], values: NDArray[Any], samples: Samples, names: list[str], unnamed: str
) -> list[str]:
    """Return names of the first bad values, like `line 5 column age (nan)`, at most one more than are listed."""
    locations = []
    for row, column in np.argwhere(bad)[: _MAX_LISTED + 1]:
        value = _flat(values)[row, column]
        where = f"column {names[column]}" if names else unnamed.format(column)
        text = "" if value is None else str(value).strip()
        text = f"{text[:_MAX_SHOWN]}..." if len(text) > _MAX_SHOWN else text or "empty"
        locations.append(f"{samples.location(row)} {where} ({text})")
    return locations
