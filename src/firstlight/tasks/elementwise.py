"""Every output has a target of its own."""

import torch
from torch import Tensor

from firstlight.errors import UsageError
from firstlight.tasks.base import Task
from firstlight.tasks.trial import trial

__all__ = ["Elementwise"]


class Elementwise(Task):
    """Outputs `(B, width)` against float32 targets of exactly their shape.

    Targets `(B,)` would broadcast against outputs `(B, 1)` to `(B, B)` and give a wrong loss with only a warning, so
    another shape is refused at every step: a subclass calls `refuse_other_shape` in `score`.
    """

    width: int
    """Number of outputs of a sample, which a subclass sets."""

    def check(self, inputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that are not float32 `(N, width)`, and a network without one output for each."""
        name = type(self).__name__
        if targets.dtype != torch.float32 or targets.shape[1:] != (self.width,):
            raise UsageError(
                f"{name} was given targets of shape {tuple(targets.shape)} and {targets.dtype}: it learns from "
                f"({len(targets)}, {self.width}) and torch.float32"
            )
        tried = inputs[:2]
        shape = tuple(trial(self.network, tried).shape)
        if shape != (len(tried), self.width):
            raise UsageError(
                f"{name} has {self.width} target{'s' * (self.width != 1)} a sample, but {type(self.network).__name__} "
                f"gives outputs of shape {shape} for {len(tried)} samples: it must give one output a target"
            )

    def refuse_other_shape(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse the targets of a batch that are not of the outputs' shape, or whole numbers."""
        # Not float32 alone: a trainer of another precision converts the targets.
        if outputs.shape != targets.shape or not targets.is_floating_point():
            raise UsageError(
                f"{type(self).__name__} was given targets of shape {tuple(targets.shape)} and {targets.dtype} for "
                f"outputs of shape {tuple(outputs.shape)}: they are float32 of exactly the outputs' shape"
            )
