"""Classification: each sample belongs to one of several classes."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from firstlight.errors import UsageError, check_range
from firstlight.losses.expected_outputs import CLASSES
from firstlight.losses.weights import ignore_index
from firstlight.metrics.added import of_classes
from firstlight.metrics.classes import BalancedAccuracy, LogLoss, MacroF1, MulticlassAUROC
from firstlight.metrics.whole_split import MayBeUndefined, exact
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import check_labels, check_width, describe
from firstlight.tasks.gradient_weights import may_hold
from firstlight.tasks.training_targets import (
    Weights,
    balanced_weights,
    class_names,
    reserve_weights,
    training_targets,
    weights_by_name,
)


class _Accuracy(MayBeUndefined, MulticlassAccuracy):
    """Share of right predictions among the targets that count; NaN if none does."""

    missing_reason = "the loss ignores all targets"
    tp: Tensor
    fn: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        if target.is_floating_point():  # torchmetrics would compare numbers with classes.
            raise UsageError(
                f"targets are {describe(target)}: Classification needs class indices; give probabilities of classes to "
                "a Task with this loss"
            )
        super().update(preds, target)

    def compute(self) -> Tensor:
        return super().compute().where(self.tp + self.fn > 0, torch.nan)


class Classification(Task):
    """Logits `(B, classes)` against class indices `(B,)` int64.

    Metrics, each in [0, 1] but `log_loss`: `accuracy`; and for `val/*` and `test/*` only `balanced_accuracy`, `f1` (the
    mean over the classes), `auroc` (the mean of each class against the others) and `log_loss`. `auroc` is NaN if a
    split lacks a class. A loss of scores has no probabilities, so `auroc` and `log_loss` are left out.

    Args:
        network: Maps inputs to what the loss expects, usually logits.
        loss: For example `torch.nn.CrossEntropyLoss`, which takes raw logits; see `docs/losses.md`. With class weights
            it is a mean over the weights of the samples' classes, and so are the logged losses. Targets that the loss
            ignores are left out of metrics too.
        optimizer: See `Task`.
        schedule: See `Task`.
        classes: Number of classes, at least 2.
        class_weights: Weights of the classes in the loss, which then has none of its own. A list in the order of the
            class names, a mapping by class name, or `"balanced"`: inverse to the number of training samples.
        **options: See `Task`; `monitor` is `val/loss` or `val/NAME` for one of the metrics.
    """

    losses = CLASSES

    # They describe a whole split, and a step need not wait for them.
    eval_only_metrics = frozenset({"balanced_accuracy", "f1", "auroc", "log_loss"})

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        classes: int,
        class_weights: Weights | None = None,
        **options: Any,
    ) -> None:
        check_range(type(self).__name__, "[2, inf)", classes=classes)
        if class_weights is not None:
            reserve_weights(type(self).__name__, "class_weights", class_weights, loss, "weight", classes)
        ignored = ignore_index(loss)
        metrics: dict[str, Metric] = {
            "accuracy": _Accuracy(classes, average="micro", ignore_index=ignored, validate_args=False),
            "balanced_accuracy": BalancedAccuracy(classes, ignored),
            "f1": MacroF1(classes, ignored),
        }
        if self.expected_outputs(loss) != "scores":
            metrics |= {"auroc": MulticlassAUROC(classes, ignored), "log_loss": LogLoss(ignored)}
        prepare = partial(of_classes, ignored=ignored, are_scores=self.expected_outputs(loss) == "scores")
        super().__init__(network, optimizer, schedule, loss, _own_metrics=metrics, _prepare=prepare, **options)
        self.classes = classes
        self.class_weights = class_weights

    def metric_inputs(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return outputs and targets of a batch, or refuse outputs that are not `(B, classes)`."""
        if outputs.ndim != 2 or outputs.shape[1] != self.classes:
            self.check_outputs(outputs, targets)
        return outputs, targets

    def counted_ignore_index(self) -> int | None:
        """Return the label that the loss leaves out, unless it has class weights or a subclass weighs batches."""
        is_own = any(map(self.is_overridden, ("batch_weight", "metric_inputs")))
        return None if is_own or getattr(self.loss, "weight", None) is not None else ignore_index(self.loss)

    def on_train_start(self) -> None:
        """Count labels at each step only if some may be left out: this takes 4 operations on the device."""
        ignored = self.train_metrics.ignore_index
        if ignored is not None:
            may_ignore = may_hold(self.trainer.train_dataloader, ignored)
            self.averages_over = "targets" if may_ignore else "samples"
        super().on_train_start()

    def fit_targets(self) -> None:
        """Give the loss its class weights."""
        weights, names = self.class_weights, class_names(self.trainer)
        if weights == "balanced":
            labels = training_targets(self.trainer, "class_weights=balanced")
            counts = labels[labels >= 0].bincount(minlength=self.classes)
            weights = balanced_weights(counts, names, ignore_index(self.loss)).tolist()
        if isinstance(weights, dict):
            weights = weights_by_name("class_weights", weights, names)
        if weights is not None:
            self.loss.weight.copy_(torch.tensor(weights, dtype=torch.float64))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `target` `(B,)` and `probabilities` `(B, classes)`; a loss of scores has none."""
        inputs, targets = batch
        logits = exact(self.predict_outputs(inputs))
        # The metrics take the largest logit too: the probabilities of close large logits are equal.
        columns = {"prediction": logits.argmax(dim=1), "target": targets}
        return columns if self.outputs_are == "scores" else {**columns, "probabilities": logits.softmax(dim=1)}

    def check_targets(self, targets: Tensor) -> None:
        """Refuse labels that are not class indices of this task."""
        hint = "; for zeros and ones there are BinaryClassification and MultilabelClassification"
        check_labels(type(self).__name__, targets, hint)
        ignored = ignore_index(self.loss)
        wrong = torch.nonzero(((targets < 0) | (targets >= self.classes)) & (targets != ignored)).flatten()
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} has classes={self.classes}, so labels must be 0 to {self.classes - 1}, but "
                f"{len(wrong)} of {len(targets)} are not: the first is {targets[wrong[0]]}"
            )
        if ignored is not None and len(targets) and bool(targets.eq(ignored).all()):
            raise UsageError(f"all {len(targets)} labels of a split are {ignored}, which the loss ignores")

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs without one logit per class."""
        expected = f"{type(self).__name__} has classes={self.classes}"
        found = outputs.shape[-1]
        other = f", or classes={found}" if found > max(1, int(targets.max())) else ""
        check_width(expected, self.network, outputs, self.classes, other)
