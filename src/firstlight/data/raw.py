"""Raw inputs that a program gives in memory: rows, texts and arrays.

Shapes: `N` samples; `...` shape of one sample.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from firstlight.data.samples import Samples
from firstlight.data.stored import Stored
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
        raw: The inputs, as they were before any preparation, see `as_trained`.
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
    return Samples(as_trained(values, dtype, shape), None, columns=[*columns])


def as_trained(inputs: NDArray[Any] | Stored, dtype: str, shape: Sequence[int]) -> NDArray[Any] | Stored:
    """Return inputs `(N, ...)` with the kind of type and the shape of the training inputs.

    Integers and booleans become numbers, and integers from 0 to 255 pixels. Images may have their channels last, or one
    channel and no axis for it. Inputs on disk must have kind and shape already.

    Args:
        inputs: Before any preparation.
        dtype: Type of the training inputs.
        shape: Shape of one training sample.

    Raises:
        UsageError: If type or shape differ from those of the training inputs.
    """
    kind, found = (of.kind.replace("b", "f") for of in (np.dtype(dtype), inputs.dtype))
    is_text = kind == "i"
    if isinstance(inputs, np.ndarray) and inputs.shape[1:] != tuple(shape) and len(shape) == 3:
        if inputs.shape[1:] == (*shape[1:], shape[0]):  # Images with their channels last.
            inputs = np.moveaxis(inputs, -1, 1)
        elif inputs.shape[1:] == tuple(shape[1:]) and shape[0] == 1:
            inputs = inputs[:, None]
    if inputs.shape[1:] != tuple(shape) and not (is_text and inputs.ndim == 1 + len(shape)):
        raise UsageError(f"the inputs have the shape {inputs.shape}: they must be {_shape(shape)}")
    if found == kind and isinstance(inputs, Stored):
        return inputs
    are_pixels = inputs.dtype == np.uint8 and len(shape) > 1  # Whose scale may be another one.
    if isinstance(inputs, np.ndarray):
        if kind == "f" and found in "iuf" and not are_pixels:
            return inputs.astype(np.float64)
        is_in_range = found in "iu" and (not inputs.size or (inputs.min() >= 0 and (is_text or inputs.max() < 256)))
        if kind != "f" and is_in_range:
            return inputs.astype(np.int64 if is_text else np.uint8)
    must = {"u": "integers from 0 to 255, pixels", "i": "integers of at least 0, tokens"}.get(kind, "numbers, floats")
    hint = ": convert the pixels to floats as those of the training data were" if kind == "f" and are_pixels else ""
    raise UsageError(f"the inputs are {inputs.dtype}, but the network was trained on {must}{hint}")


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(['N', *map(str, shape)])})"


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
