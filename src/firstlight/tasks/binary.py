"""Each label of a sample is given or not: one for binary classification, several for multi-label classification."""

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
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.schedules import Schedule
from firstlight.tasks.elementwise import Elementwise

__all__ = ["BinaryClassification", "MultilabelClassification"]


class _Labelling(Elementwise):
    """Logits `(B, width)` against float32 targets that are 0 or 1."""

    # Ranks of a few batches say little, and a batch may lack one of the two.
    eval_only_metrics = frozenset({"auroc"})

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse targets that are neither 0 nor 1, and what does not fit in shape."""
        super().check(batch, targets)
        wrong = targets[(targets != 0) & (targets != 1)]
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} learns from targets that are 0 or 1, but {len(wrong)} of {targets.numel()} are "
                f"not: the first is {wrong[0]}"
            )

    def compute_loss(self, outputs: Tensor, targets: Tensor, split_metrics: SplitMetrics) -> Tensor:
        """Return the loss of logits, and remember probabilities for the metrics."""
        self.refuse_other_shape(outputs, targets)
        loss: Tensor = self.loss(outputs, targets)
        # Given logits, torchmetrics would guess from their values whether they are probabilities. Of large logits
        # float32 has but one probability, and no order.
        split_metrics.update(loss, outputs.double().sigmoid(), targets.int())
        return loss


class BinaryClassification(_Labelling):
    """Logits `(B, 1)` of the second of two classes against float32 targets `(B, 1)` that are 0 or 1.

    Metrics, each in [0, 1]: `accuracy` and `f1` at a probability of one half, and `auroc`, the last one for `val/*` and
    `test/*` only. `f1` and `auroc` are those of the class 1.

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits.
        optimizer: See `Task`.
        schedule: See `Task`.
        **options: See `Task`; `monitor` is `val/loss`, `val/accuracy`, `val/auroc` or `val/f1`.

    Raises:
        UsageError: When targets are not of the outputs' shape, and as `Task` does.
    """

    def __init__(
        self, network: nn.Module, loss: nn.Module, optimizer: OptimizerCallable, schedule: Schedule, **options: Any
    ) -> None:
        metrics = {
            "accuracy": BinaryAccuracy(validate_args=False),
            "auroc": BinaryAUROC(validate_args=False),
            "f1": BinaryF1Score(validate_args=False),
        }
        super().__init__(network, loss, optimizer, schedule, metrics, **options)
        self.width = 1

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `probabilities` `(B, 2)` and `target` `(B,)`."""
        inputs, targets = batch
        probability = self(inputs).float().sigmoid()
        return {
            "prediction": (probability > 0.5).long().squeeze(1),
            "probabilities": torch.cat([1 - probability, probability], dim=1),
            "target": targets.long().squeeze(1),
        }


class MultilabelClassification(_Labelling):
    """Logits `(B, labels)` against float32 targets `(B, labels)` that are 0 or 1.

    Metrics, each in [0, 1]: `accuracy`, the share of right decisions of all labels at a probability of one half; `f1`
    and `auroc`, the means over the labels, the last one for `val/*` and `test/*` only. A label that is
    given to no sample of a split, or to all, counts there with an `auroc` of 0, and a warning says so.

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits.
        optimizer: See `Task`.
        schedule: See `Task`.
        labels: Number of labels, at least 2; one label is a `BinaryClassification`.
        **options: See `Task`; `monitor` is `val/loss`, `val/accuracy`, `val/auroc` or `val/f1`.

    Raises:
        UsageError: When `labels` is below 2 or targets are not of the outputs' shape, and as `Task` does.
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
                f"MultilabelClassification was given labels={labels}: there are at least 2; one label is a "
                "BinaryClassification"
            )
        metrics = {
            "accuracy": MultilabelAccuracy(labels, average="micro", validate_args=False),
            "auroc": MultilabelAUROC(labels, validate_args=False),
            "f1": MultilabelF1Score(labels, validate_args=False),
        }
        super().__init__(network, loss, optimizer, schedule, metrics, **options)
        self.width = labels

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction`, `probabilities` and `target`, each `(B, labels)`."""
        inputs, targets = batch
        probabilities = self(inputs).float().sigmoid()
        return {"prediction": (probabilities > 0.5).long(), "probabilities": probabilities, "target": targets.long()}
