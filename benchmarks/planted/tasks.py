"""Tasks and a user's own LightningModule with faults in the training step, and a schedule that ends too early.

Shapes: `B` batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from firstlight import tasks
from firstlight.schedules import Schedule


class _KeepsGradients(LightningModule):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        pass


class AccumulatingClassification(_KeepsGradients, tasks.Classification):
    """Classification whose gradients are never set to zero."""


class AccumulatingRegression(_KeepsGradients, tasks.Regression):
    """Regression whose gradients are never set to zero."""


@dataclass(frozen=True)
class EndsEarly(Schedule):
    """A cosine that was planned for fewer steps than the run has; the rate is 0 afterwards.

    Args:
        share: The planned share of the run, in (0, 1].
    """

    share: float

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor at a step."""
        progress = min(step / (self.share * total_steps), 1.0)
        return (1 + torch.cos(torch.tensor(progress * torch.pi)).item()) / 2


@dataclass(frozen=True)
class Steps(Schedule):
    """The rate falls by a factor every few steps, much faster than the run needs.

    Args:
        every: Steps between falls.
        factor: The factor.
    """

    every: int
    factor: float

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor at a step."""
        return self.factor ** (step // self.every)


class Own(LightningModule):
    """A module as a user writes it, of which firstlight knows nothing. Without its last options it is sound.

    Args:
        network: Maps inputs to logits, or to numbers.
        kind: What the targets are. Numbers are not standardised.
        lr: Learning rate of Adam.
        fault: `"flipped"`: the loss has the wrong sign. `"softmax"`: the network's outputs pass a softmax before the
            cross-entropy. `"broadcast"`: outputs `(B, 1)` meet targets `(B,)`. `"no_zero_grad"`: gradients of
            earlier steps stay. `"stays_in_eval"`: the module is always in eval mode.
        scale: Targets that are numbers are divided by it.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self,
        network: nn.Module,
        kind: Literal["classes", "numbers"] = "classes",
        lr: float = 0.003,
        fault: Literal["flipped", "softmax", "broadcast", "no_zero_grad", "stays_in_eval"] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.kind = kind
        self.lr = lr
        self.fault = fault
        self.scale = scale
        self.automatic_optimization = fault != "no_zero_grad"

    def _loss(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        inputs, targets = batch
        outputs = self.network(inputs)
        if self.kind == "numbers":
            targets = targets.to(outputs.dtype) / self.scale
            right = mse_loss(outputs, targets)
            score = {"r2": 1 - right / targets.var(correction=0)}
            loss = (outputs - targets.flatten()).square().mean() if self.fault == "broadcast" else right
        else:
            score = {"accuracy": (outputs.argmax(1) == targets).float().mean()}
            loss = cross_entropy(outputs.softmax(1) if self.fault == "softmax" else outputs, targets)
        loss = -loss if self.fault == "flipped" else loss
        for name, value in {"loss": loss, **score}.items():
            self.log(f"{split}/{name}", value, batch_size=len(targets))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self._loss(batch, "train")
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch."""
        self._loss(batch, "val")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Stay in eval mode if that is the fault."""
        if self.fault == "stays_in_eval":
            self.eval()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)
