"""Checks of targets and outputs that several tasks share."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from firstlight.errors import UsageError


def describe(value: Any) -> str:
    """Return shape and type of a tensor, or what a network returned instead of one.

    >>> describe(torch.zeros(3, 2))
    '(3, 2) float32'
    >>> describe((torch.zeros(3, 2), torch.zeros(3)))
    'a tuple of (3, 2) float32, (3,) float32'
    >>> describe({"mean": torch.zeros(3)})
    'a dict of mean (3,) float32'
    """
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(describe, value))}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(f'{name} {describe(each)}' for name, each in value.items())}"
    return f"{value!r:.60}" if value is None else f"a {type(value).__name__}"


def at_least_float32(value: Any) -> Any:
    """Return a tensor of 16 bits as float32, so that a loss is not rounded to 16 bits; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def check_labels(owner: str, labels: Tensor, hint: str = "") -> None:
    """Refuse labels of a split that are not int64 `(N,)`."""
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UsageError(f"{owner} was given targets {describe(labels)}: they must be ({len(labels)},) int64{hint}")


def check_elementwise_targets(
    owner: str, targets: Tensor, width: int, types: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    """Refuse targets whose shape is not `(N, width)` or whose dtype is not listed."""
    if targets.dtype not in types or targets.shape[1:] != (width,):
        names = " or ".join(str(each).removeprefix("torch.") for each in types)
        raise UsageError(
            f"{owner} was given targets {describe(targets)}: they must be ({len(targets)}, {width}) {names}"
        )


def check_width(expected: str, network: nn.Module, outputs: Tensor, width: int, other: str = "") -> None:
    """Refuse outputs that are not `(B, width)`.

    Args:
        expected: What the task expects, for the message.
        network: Returned the outputs.
        outputs: Of a few samples.
        width: Outputs per sample.
        other: Another mend, for the message.
    """
    if outputs.shape[1:] == (width,):
        return
    name, options = type(network).__name__, inspect.signature(type(network)).parameters
    one = f"set out_features={width}" if "out_features" in options else f"{name} must return {width}"
    if outputs.ndim != 2:
        raise UsageError(
            f"{expected}, but {name} returns outputs of shape {tuple(outputs.shape)} for {len(outputs)} samples: they "
            f"must be ({len(outputs)}, {width})"
        )
    found = outputs.shape[1]
    raise UsageError(f"{expected}, but {name} returns {found} output{'s' * (found != 1)} per sample: {one}{other}")


def check_same_shape(owner: str, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets of a batch that have another shape than the outputs, or are not floating point.

    Targets `(B,)` would broadcast against outputs `(B, 1)` to `(B, B)`, which gives a wrong loss and only a warning.
    """
    # Any floating point: a trainer of another precision converts the targets.
    if outputs.shape != targets.shape or not targets.is_floating_point():
        raise UsageError(
            f"{owner} was given targets {describe(targets)} for outputs {describe(outputs)}: they must be floating "
            "point of exactly the outputs' shape"
        )
