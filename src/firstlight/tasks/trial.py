"""What a part makes of a few samples, tried before a run starts."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from firstlight.errors import UsageError

__all__ = ["attempt", "described"]


def attempt(call: Callable[[], Tensor], fault: str) -> Tensor:
    """Return what `call` returns, without a gradient.

    Raises:
        UsageError: With `fault` and torch's own words, where torch says that shapes, types or values do not fit.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # What would be broadcast to a wrong number.
            return call()
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        raise UsageError(f"{fault}: {' '.join(str(error).split())}") from error


def described(tensor: Tensor) -> str:
    """Return shape and type.

    >>> described(torch.zeros(3, 2))
    '(3, 2) float32'
    """
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
