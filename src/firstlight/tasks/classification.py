"""Classification: each sample belongs to one of several classes."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from firstlight.errors import UsageError, check_range
from firstlight.metrics.whole_split import exact
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import check_labels

__all__ = ["Classification"]


class Classification(Task):
    """Logits `(B, classes)` against class indices `(B,)` int64; metric: `accuracy` in [0, 1].

    Args:
        network: Maps inputs to logits.
        loss: For example `torch.nn.CrossEntropyLoss`, which takes raw logits. With class weights it is a mean over the
            weights of the samples' classes, and so are the logged losses.
        optimizer: See `Task`.
        schedule: See `Task`.
        classes: Number of classes, at least 2.
        **options: See `Task`; `monitor` is `val/loss` or `val/accuracy`.
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
        check_range(type(self).__name__, "[2, inf)", classes=classes)
        metrics = {"accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)}
        super().__init__(network, optimizer, schedule, loss, metrics, **options)
        self.classes = classes
        # Decided once: a module looks an attribute up slowly, and `batch_weight` is called at each step.
        self._has_class_weights = isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None

    def batch_weight(self, targets: Tensor) -> Tensor | int:
        """Return the sum of the class weights of a batch, if the loss has any, otherwise the number of samples."""
        return self.loss.weight[targets].sum() if self._has_class_weights else targets.shape[0]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `probabilities` `(B, classes)` and `target` `(B,)`."""
        inputs, targets = batch
        logits = exact(self.predict_outputs(inputs))
        # The metrics take the largest logit too: the probabilities of close large logits are equal.
        return {"prediction": logits.argmax(dim=1), "probabilities": logits.softmax(dim=1), "target": targets}

    def check_targets(self, targets: Tensor) -> None:
        """Refuse labels that are not class indices of this task."""
        hint = "; for zeros and ones there are BinaryClassification and MultilabelClassification"
        check_labels(type(self).__name__, targets, hint)
        wrong = torch.nonzero((targets < 0) | (targets >= self.classes)).flatten()
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} has classes={self.classes}, so labels must be 0 to {self.classes - 1}, but "
                f"{len(wrong)} of {len(targets)} are not: the first is {targets[wrong[0]]}"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs without one logit per class."""
        if outputs.shape[1:] != (self.classes,):
            raise UsageError(
                f"{type(self).__name__} has classes={self.classes}, but {type(self.network).__name__} returns outputs "
                f"of shape {tuple(outputs.shape)} for {len(outputs)} samples: it must return one logit per class"
            )
