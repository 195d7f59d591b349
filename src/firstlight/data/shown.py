"""Show a sample as people see it: a picture, a text, or values by column."""

import base64
import io
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from firstlight.data.samples import Samples

_COLUMNS = 12
"""Values of a sample that are shown at most."""
_SIDE = 256
"""Pixels of the longer side of a picture at most."""
_CHARACTERS = 300


def show(samples: Samples, row: int, tokens_are_bytes: bool = False) -> dict[str, Any]:
    """Return a sample as `picture`, a data address of a PNG file, as `text`, or as `row`, values by column.

    Args:
        samples: Cleaned samples, before they are scaled.
        row: Index of the sample.
        tokens_are_bytes: Whether each token is a byte plus one, and 0 is padding.
    """
    values = samples.inputs[np.array([row])][0]
    if values.ndim == 3 and len(values) in (1, 3):
        return {"picture": _picture(values)}
    if values.dtype.kind == "i":
        tokens = values.reshape(-1)
        if tokens_are_bytes:
            text = bytes(int(token) - 1 for token in tokens if token > 0).decode("utf-8", "replace")
        else:
            text = " ".join(map(str, tokens[: _CHARACTERS // 4]))
        return {"text": text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " ..."}
    flat = values.reshape(-1)
    names = samples.columns[: len(flat)] or [str(index) for index in range(len(flat))]
    found = {name: _value(samples, name, float(value)) for name, value in zip(names, flat[:_COLUMNS], strict=False)}
    if len(flat) > _COLUMNS:
        found["..."] = f"{len(flat) - _COLUMNS:,} more"
    return {"row": found}


def pixels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an image `(C, H, W)` of one or three channels as `(H, W)` or `(H, W, 3)`; other types are stretched."""
    if values.dtype != np.uint8:
        finite = np.nan_to_num(values.astype(np.float64))
        low, high = finite.min(), finite.max()
        values = ((finite - low) / (high - low or 1) * 255).astype(np.uint8)
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


def _picture(values: NDArray[Any]) -> str:
    image = Image.fromarray(pixels(values))
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _value(samples: Samples, name: str, value: float) -> str:
    if np.isnan(value):
        return "missing"
    if name in samples.categories:
        return str(samples.categories[name][int(value)])
    if name in samples.dates:
        return datetime.fromtimestamp(value, UTC).isoformat(sep=" ").removesuffix("+00:00").removesuffix(" 00:00:00")
    return f"{value:.6g}"
