"""Every output has a target of its own."""

import torch
from torch import Tensor

from firstlight.errors import UsageError
from firstlight.preflight.probe import described
from firstlight.tasks.base import Task

__all__ = ["Elementwise"]


class Elementwise(Task):
    """Outputs `(B, width)` against float32 targets of exactly their shape.

    Targets `(B,)` would broadcast against outputs `(B, 1)` to `(B, B)` and give a wrong loss with only a warning, so
    another shape is refused at every step: a subclass calls `refuse_other_shape` in `score`.
    """

    width: int
    """Number of outputs of a sample, which a subclass sets."""

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse targets that are not float32 `(N, width)`, and a network without one output for each."""
        if targets.dtype != torch.float32 or targets.shape[1:] != (self.width,):
            raise UsageError(
                f"{type(self).__name__} was given targets {described(targets)}: it learns from "
                f"({len(targets)}, {self.width}) float32"
            )
        super().check(batch, targets)

    def check_outputs(self, outputs: Tensor, few: Tensor, targets: Tensor) -> None:
        """Refuse a network without one output for each target."""
        if outputs.shape != few.shape:
            raise UsageError(
                f"{type(self).__name__} has {self.width} target{'s' * (self.width != 1)} a sample, but "
                f"{type(self.network).__name__} gives outputs of shape {tuple(outputs.shape)} for {len(few)} "
                "samples: it must give one output a target"
            )

    def refuse_other_shape(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse the targets of a batch that are not of the outputs' shape, or whole numbers."""
        # Not float32 alone: a trainer of another precision converts the targets.
        if outputs.shape != targets.shape or not targets.is_floating_point():
            raise UsageError(
                f"{type(self).__name__} was given targets {described(targets)} for outputs {described(outputs)}: "
                "they are float32 of exactly the outputs' shape"
            )
