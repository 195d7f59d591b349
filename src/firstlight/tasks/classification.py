"""Each sample belongs to one of several classes."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from firstlight.errors import UsageError
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.preflight.probe import described
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task

__all__ = ["Classification"]


class Classification(Task):
    """Logits `(B, classes)` against class indices `(B,)` int64; metric: `accuracy` in [0, 1].

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.CrossEntropyLoss`, which takes raw logits.
        optimizer: See `Task`.
        schedule: See `Task`.
        classes: Number of classes, at least 2.
        **options: See `Task`; `monitor` is `val/loss` or `val/accuracy`.

    Raises:
        UsageError: When `classes` is below 2, and as `Task` does.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        classes: int,
        **options: Any,
    ) -> None:
        if classes < 2:
            raise UsageError(f"Classification was given classes={classes}: there are at least 2")
        metrics = {"accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)}
        super().__init__(network, loss, optimizer, schedule, metrics, **options)
        self.classes = classes

    def compute_loss(self, outputs: Tensor, targets: Tensor, split_metrics: SplitMetrics) -> Tensor:
        """Return the loss; with class weights it is a mean over the weights of the batch, and counts for as much."""
        criterion = self.loss
        loss: Tensor = criterion(outputs, targets)
        weight = criterion.weight if isinstance(criterion, nn.CrossEntropyLoss) else None
        split_metrics.update(loss, outputs, targets, scored=None if weight is None else weight[targets].sum())
        return loss

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse labels that are no class of this task, and a network without one logit a class."""
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise UsageError(
                f"{type(self).__name__} was given targets {described(targets)}: they are ({len(targets)},) int64; "
                "for zeros and ones there are BinaryClassification and MultilabelClassification"
            )
        wrong = torch.nonzero((targets < 0) | (targets >= self.classes)).flatten()
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} has classes={self.classes}, so labels are 0 to {self.classes - 1}, but "
                f"{len(wrong)} of {len(targets)} are not: the first is {targets[wrong[0]]}"
            )
        super().check(batch, targets)

    def check_outputs(self, outputs: Tensor, few: Tensor, targets: Tensor) -> None:
        """Refuse a network that does not give one logit a class."""
        if outputs.shape != (len(few), self.classes):
            raise UsageError(
                f"{type(self).__name__} has classes={self.classes}, but {type(self.network).__name__} gives outputs of "
                f"shape {tuple(outputs.shape)} for {len(few)} samples: it must give one logit a class"
            )

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `probabilities` `(B, classes)` and `target` `(B,)`."""
        inputs, targets = batch
        probabilities = self(inputs).softmax(dim=1)
        return {"prediction": probabilities.argmax(dim=1), "probabilities": probabilities, "target": targets}
