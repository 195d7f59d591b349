"""Regression: each sample has one or several numbers as targets."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric

from firstlight.errors import UsageError, check_range
from firstlight.losses.expected_outputs import NUMBERS
from firstlight.metrics.added import of_numbers
from firstlight.metrics.whole_split import R2, exact
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import (
    at_least_float32,
    check_elementwise_targets,
    check_same_shape,
    check_width,
)
from firstlight.tasks.training_targets import training_targets


class Regression(Task):
    """Outputs `(B, outputs)` against float64 or float32 targets `(B, outputs)` in the user's units.

    The network is trained on standardised targets, so losses are near 1 in any unit. `target_mean` and `target_std` of
    the training targets are computed before the first step. The checkpoint holds them, and a resumed run keeps them. A
    constant target is divided by 1.

    Targets, statistics, metrics and predictions are float64 in every precision of the trainer, so that large targets
    keep their differences. Only standardised targets are rounded.

    Metrics and predictions are in the user's units: `mae`, `rmse` and `r2`, the last one for `val/*` and `test/*` only.
    With several outputs, `mae` and `rmse` are over all of them together, and `r2` is the mean over the outputs. If all
    targets of a split are equal, `r2` is undefined: NaN.

    Args:
        network: Maps inputs to standardised targets, or to what the loss expects.
        loss: For example `torch.nn.MSELoss` or `torch.nn.HuberLoss`, of standardised numbers. `torch.nn.PoissonNLLLoss`
            takes counts and the logarithms of their rates, and predictions are rates. See `docs/losses.md`.
        optimizer: See `Task`.
        schedule: See `Task`.
        outputs: Targets per sample, at least 1.
        **options: See `Task`; `monitor` is `val/loss`, `val/mae`, `val/rmse` or `val/r2`.

    Raises:
        UsageError: When the training data set cannot be read twice.
    """

    losses = NUMBERS

    # R2 compares with the mean of the targets, so it needs two samples.
    eval_only_metrics = frozenset({"r2"})
    exact_targets = True

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        outputs: int = 1,
        **options: Any,
    ) -> None:
        check_range(type(self).__name__, "[1, inf)", outputs=outputs)
        metrics: dict[str, Metric] = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False), "r2": R2()}
        for metric in metrics.values():
            metric.set_dtype(torch.float64)
        super().__init__(network, optimizer, schedule, loss, _own_metrics=metrics, _prepare=of_numbers, **options)
        self.outputs = outputs
        self.register_buffer("target_mean", torch.zeros(outputs, dtype=torch.float64))
        self.register_buffer("target_std", torch.ones(outputs, dtype=torch.float64))

    def fit_targets(self) -> None:
        """Compute mean and standard deviation of the training targets.

        A resumed run restores them, and a loss of raw targets needs none.
        """
        if self.outputs_are != "standardised" or self.trainer.ckpt_path:
            return
        targets = training_targets(self.trainer, f"{type(self).__name__} standardises targets: it").double()
        constant = targets.amax(dim=0) == targets.amin(dim=0)
        mean, std = targets.mean(dim=0), targets.std(dim=0, correction=0).masked_fill(constant, 1)
        old = self.target_mean.to(mean), self.target_std.to(std)
        is_fitted = bool((old[0] != 0).any() or (old[1] != 1).any())
        if is_fitted and not all(map(torch.equal, old, (mean, std))):  # Outputs of the network get another meaning.
            self.notices.tell(
                f"scale {mean}",
                f"{type(self).__name__} was trained with target_mean {old[0].tolist()} and target_std "
                f"{old[1].tolist()}; this fit has {mean.tolist()} and {std.tolist()}, and predictions are scaled with "
                "the new values",
            )
        self.target_mean.copy_(mean)
        self.target_std.copy_(std)

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the loss against standardised targets, which must have exactly the outputs' shape."""
        check_same_shape(type(self).__name__, outputs, targets)
        outputs = at_least_float32(outputs)
        if self.outputs_are != "standardised":
            return self.loss(outputs, targets.to(outputs.dtype))  # type: ignore[no-any-return]
        standardised = (targets - self.target_mean) / self.target_std
        return self.loss(outputs, standardised.to(outputs.dtype))  # type: ignore[no-any-return]

    def metric_inputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and targets in the user's units, as `predict_step` does."""
        return self.in_units(outputs), exact(targets)

    def in_units(self, outputs: Tensor) -> Tensor:
        """Return the predictions in the user's units, float64, for outputs `(B, outputs)`."""
        if self.outputs_are == "log_rates":
            return exact(outputs).exp()
        return torch.addcmul(self.target_mean, exact(outputs), self.target_std)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` and `target`, each `(B,)`, or `(B, outputs)` if there are several."""
        inputs, targets = batch
        predictions = self.in_units(self.predict_outputs(inputs))
        return {"prediction": predictions.squeeze(1), "target": targets.squeeze(1)}

    def check_targets(self, targets: Tensor) -> None:
        """Refuse targets that are not float64 or float32 `(N, outputs)`."""
        check_elementwise_targets(type(self).__name__, targets, self.outputs, (torch.float64, torch.float32))
        if self.outputs_are in ("rates", "log_rates") and targets.numel() and targets.min() < 0:
            raise UsageError(
                f"{type(self.loss).__name__} expects counts, but a target is {targets.min():g}: use torch.nn.MSELoss"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs that are not one for each target."""
        expected = f"{type(self).__name__} has outputs={self.outputs}"
        check_width(expected, self.network, outputs, self.outputs)
