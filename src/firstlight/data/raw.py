"""Raw inputs that a program gives in memory: rows, texts and arrays.

Shapes: `N` samples; `...` shape of one sample.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from firstlight.data.samples import Samples
from firstlight.errors import UsageError

if TYPE_CHECKING:
    import pandas


def as_frame(raw: Any, expected: str) -> "pandas.DataFrame":
    """Return a DataFrame, or a list of dicts as one; `expected` begins the message about anything else."""
    import pandas  # Imported here: it takes half a second.

    if isinstance(raw, pandas.DataFrame):
        return raw
    if isinstance(raw, Sequence) and raw and all(isinstance(row, Mapping) for row in raw):
        return pandas.DataFrame([*raw], dtype=object)  # Its own types would round integers in columns with gaps.
    raise UsageError(f"{expected}, so it takes a DataFrame, a list of dicts or a path, not {_kind(raw)}")


def texts_of(raw: Any, column: str) -> list[str]:
    """Return a list of texts, or the texts in a column of a DataFrame or of a list of dicts."""
    if isinstance(raw, Sequence) and raw and all(isinstance(text, str) for text in raw):
        return [*raw]
    frame = as_frame(raw, f"the input must be a list of texts, or have a column {column}")
    if column not in frame:
        raise UsageError(f"the input has no column {column}; available: {', '.join(map(str, frame.columns))}")
    texts: list[str] = frame[column].tolist()
    if wrong := [index for index, text in enumerate(texts) if not isinstance(text, str)]:
        raise UsageError(f"row {wrong[0]} column {column} is not a text, but {_kind(texts[wrong[0]])}")
    return texts


def samples_like(raw: Any, dtype: str, shape: Sequence[int], columns: Sequence[str], source: str) -> Samples:
    """Return an array or tensor `(N, ...)`, or the columns of a DataFrame or of a list of dicts, as samples.

    Args:
        raw: The inputs, as they were before any preparation. Images may have their channels last, or one channel and
            no axis for it.
        dtype: Type of the training inputs.
        shape: Shape of one training sample.
        columns: Names of the columns of the training data; empty if they have none.
        source: Name of the training data, for messages.

    Raises:
        UsageError: If type or shape differ from those of the training inputs.
    """
    kind = np.dtype(dtype).kind
    is_rows = isinstance(raw, Sequence) and raw and isinstance(raw[0], Mapping)
    if is_rows or hasattr(raw, "columns"):
        frame, names = as_frame(raw, ""), columns[: shape[0]]
        if not names:
            raise UsageError(f"{source} has columns without names: give an array of shape {_shape(shape)}")
        if missing := [name for name in names if name not in frame]:
            raise UsageError(f"the input has no column {missing[0]}; available: {', '.join(map(str, frame.columns))}")
        if kind == "f":  # Missing values and numbers in text are for `clean`.
            return Samples(frame[names].to_numpy(object), None, columns=[*columns])
        raw = frame[names].to_numpy()
    values = raw.detach().cpu().numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
    is_text = kind == "i"
    if values.shape[1:] != tuple(shape) and len(shape) == 3:
        if values.shape[1:] == (*shape[1:], shape[0]):  # Images with their channels last.
            values = np.moveaxis(values, -1, 1)
        elif values.shape[1:] == tuple(shape[1:]) and shape[0] == 1:
            values = values[:, None]
    if values.shape[1:] != tuple(shape) and not (is_text and values.ndim == 1 + len(shape)):
        raise UsageError(f"the inputs have the shape {values.shape}: they must be {_shape(shape)}")
    if kind == "f" and values.dtype.kind in "biuf":
        values = values.astype(np.float64)
    elif values.dtype.kind in "iu" and (not values.size or (values.min() >= 0 and (is_text or values.max() < 256))):
        values = values.astype(np.int64 if is_text else np.uint8)
    else:
        must = {"u": "integers from 0 to 255, pixels", "i": "integers of at least 0, tokens"}.get(kind, "numbers")
        raise UsageError(f"the inputs are {values.dtype}, but the network was trained on {must}")
    return Samples(values, None, columns=[*columns])


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(['N', *map(str, shape)])})"


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
