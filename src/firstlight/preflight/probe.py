"""What a part makes of a few samples, tried before a run starts."""

import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from firstlight.errors import UsageError

__all__ = ["attempt", "described"]

_NOT_THE_USERS = ("firstlight", "torch", "torchmetrics")
_PRODUCT = r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)"


def attempt(call: Callable[[], Tensor], fault: str) -> Tensor:
    """Return what `call` returns, without a gradient.

    Raises:
        UsageError: With `fault`, the line of the user's own part that met it, if one did, and torch's own words, where
            torch says that shapes, types or values do not fit.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # What would be broadcast to a wrong number.
            return call()
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        said = re.sub(_PRODUCT, r"a layer for \2 features was given \1", " ".join(str(error).split()))
        raise UsageError(f"{fault}{_met_in(error)}: {said}") from error


def _met_in(error: BaseException) -> str:
    """Return the innermost line that is neither firstlight's nor torch's."""
    lines = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].partition(".")[0] not in _NOT_THE_USERS
    ]
    return lines[-1] if lines else ""


def described(tensor: Tensor) -> str:
    """Return shape and type.

    >>> described(torch.zeros(3, 2))
    '(3, 2) float32'
    """
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
