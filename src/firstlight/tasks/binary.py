"""Binary and multi-label classification: each label of a sample is 0 or 1."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelF1Score,
)

from firstlight.errors import UsageError
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import check_elementwise_outputs, check_elementwise_targets, check_same_shape

__all__ = ["BinaryClassification", "MultilabelClassification"]


class _ZeroOne(Task):
    """Code shared by both tasks: logits `(B, width)` against float32 targets that are 0 or 1."""

    # Ranks within a few batches say little, and a batch may hold only one of the two classes.
    eval_only_metrics = frozenset({"auroc"})

    width: int

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the loss of logits; targets must have exactly their shape."""
        check_same_shape(type(self).__name__, outputs, targets)
        return self.loss(outputs, targets)  # type: ignore[no-any-return]

    def metric_inputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and targets."""
        # torchmetrics would guess from the values of logits whether they are probabilities. float64 keeps the order of
        # large logits, whose probabilities are equal in float32.
        return outputs.double().sigmoid(), targets.int()

    def check_targets(self, targets: Tensor) -> None:
        """Refuse targets that are not float32 `(N, width)`, or not 0 or 1."""
        check_elementwise_targets(type(self).__name__, targets, self.width)
        wrong = targets[(targets != 0) & (targets != 1)]
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} needs targets that are 0 or 1, but {len(wrong)} of {targets.numel()} are not: "
                f"the first is {wrong[0]}"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs without one logit per label."""
        check_elementwise_outputs(type(self).__name__, type(self.network).__name__, outputs, self.width)


class BinaryClassification(_ZeroOne):
    """Logits `(B, 1)` of the second of two classes against float32 targets `(B, 1)` that are 0 or 1.

    Metrics, each in [0, 1]: `accuracy` and `f1` at a probability of 0.5, and `auroc`, for `val/*` and `test/*` only.
    `f1` and `auroc` are those of class 1.

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits.
        optimizer: See `Task`.
        schedule: See `Task`.
        **options: See `Task`; `monitor` is `val/loss`, `val/accuracy`, `val/auroc` or `val/f1`.
    """

    def __init__(
        self, network: nn.Module, loss: nn.Module, optimizer: OptimizerCallable, schedule: Schedule, **options: Any
    ) -> None:
        metrics = {
            "accuracy": BinaryAccuracy(validate_args=False),
            "auroc": BinaryAUROC(validate_args=False),
            "f1": BinaryF1Score(validate_args=False),
        }
        super().__init__(network, optimizer, schedule, loss, metrics, **options)
        self.width = 1

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `probabilities` `(B, 2)` and `target` `(B,)`."""
        inputs, targets = batch
        probability = self.predict_outputs(inputs).float().sigmoid()
        return {
            "prediction": (probability > 0.5).long().squeeze(1),
            "probabilities": torch.cat([1 - probability, probability], dim=1),
            "target": targets.long().squeeze(1),
        }


class MultilabelClassification(_ZeroOne):
    """Logits `(B, labels)` against float32 targets `(B, labels)` that are 0 or 1.

    Metrics, each in [0, 1]: `accuracy`, the share of correct decisions over all labels at a probability of 0.5; `f1`
    and `auroc`, means over the labels, `auroc` for `val/*` and `test/*` only. A label that all samples of a split have,
    or none, counts with an `auroc` of 0, and a warning says so.

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits.
        optimizer: See `Task`.
        schedule: See `Task`.
        labels: Number of labels, at least 2; for one label there is `BinaryClassification`.
        **options: See `Task`; `monitor` is `val/loss`, `val/accuracy`, `val/auroc` or `val/f1`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        labels: int,
        **options: Any,
    ) -> None:
        if labels < 2:
            raise UsageError(
                f"{type(self).__name__} was given labels={labels}: it must be at least 2; for one label there is "
                "BinaryClassification"
            )
        metrics = {
            "accuracy": MultilabelAccuracy(labels, average="micro", validate_args=False),
            "auroc": MultilabelAUROC(labels, validate_args=False),
            "f1": MultilabelF1Score(labels, validate_args=False),
        }
        super().__init__(network, optimizer, schedule, loss, metrics, **options)
        self.width = labels

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction`, `probabilities` and `target`, each `(B, labels)`."""
        inputs, targets = batch
        probabilities = self.predict_outputs(inputs).float().sigmoid()
        return {"prediction": (probabilities > 0.5).long(), "probabilities": probabilities, "target": targets.long()}
