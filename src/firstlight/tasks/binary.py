"""Binary and multi-label classification: each label of a sample is 0 or 1."""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MultilabelAccuracy, MultilabelF1Score

from firstlight.errors import UsageError
from firstlight.losses.expected_outputs import ZEROS_AND_ONES
from firstlight.metrics.added import of_labels
from firstlight.metrics.classes import BalancedAccuracy, LogLoss
from firstlight.metrics.whole_split import AUROC, MayBeUndefined, exact
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import (
    at_least_float32,
    check_elementwise_targets,
    check_same_shape,
    check_width,
)
from firstlight.tasks.training_targets import (
    Weights,
    class_names,
    reserve_weights,
    training_targets,
    weights_by_name,
)


class _FromOutputs:
    """A metric of torchmetrics updated with outputs `(B, width)`: it would guess whether they are probabilities."""

    threshold: float

    def update(self, preds: Tensor, target: Tensor) -> None:
        wrong = target[(target != 0) & (target != 1)]
        if len(wrong):
            raise UsageError(f"a target is {wrong[0].item():g}: targets must be 0 or 1")
        super().update((preds > self.threshold).int(), target.int())  # type: ignore[misc]


class _BinaryAccuracy(_FromOutputs, BinaryAccuracy):
    pass


class _BinaryF1(MayBeUndefined, _FromOutputs, BinaryF1Score):
    tp: Tensor
    fp: Tensor
    fn: Tensor
    missing_reason = "no sample has class 1 or the prediction 1"

    def compute(self) -> Tensor:
        return super().compute().where(self.tp + self.fp + self.fn > 0, torch.nan)


class _BinaryBalancedAccuracy(BalancedAccuracy):
    """Updated with outputs `(B, 1)` and targets `(B, 1)`; class 1 is predicted above the threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__(2)
        self.threshold = threshold

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        super().update((predictions[:, 0] > self.threshold).long(), targets[:, 0].long())


class _BinaryLogLoss(LogLoss):
    """Updated with logits or probabilities `(B, 1)` and targets `(B, 1)`."""

    def __init__(self, are_probabilities: bool) -> None:
        super().__init__()
        self.are_probabilities = are_probabilities

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        of_one, is_one = exact(predictions), targets == 1
        if self.are_probabilities:
            of_target = of_one.where(is_one, 1 - of_one)
        else:
            of_target = of_one.where(is_one, -of_one).sigmoid()
        self.add(of_target, torch.ones_like(is_one))


class _MultilabelAccuracy(_FromOutputs, MultilabelAccuracy):
    pass


class _MultilabelF1(_FromOutputs, MultilabelF1Score):
    pass


class _ZeroOne(Task):
    """Code shared by both tasks: logits `(B, width)` against float32 targets that are 0 or 1."""

    losses = ZEROS_AND_ONES

    # Ranks within a few batches say little, and a batch may hold only one of the two classes.
    eval_only_metrics = frozenset({"auroc", "balanced_accuracy", "log_loss"})

    width: int
    pos_weight: Weights | None

    def fit_targets(self) -> None:
        """Give the loss its weights of positive targets."""
        weights, names = self.pos_weight, class_names(self.trainer)
        if weights == "balanced":
            targets = training_targets(self.trainer, "pos_weight=balanced").double()
            positives = targets.sum(0)
            for index in (positives == 0).nonzero().flatten().tolist()[:1]:
                name = names[index] if self.width > 1 and names else "1"
                raise UsageError(f"pos_weight=balanced needs a training sample with label {name}, but there is none")
            weights = ((len(targets) - positives) / positives).tolist()
        if isinstance(weights, dict):
            weights = weights_by_name("pos_weight", weights, names)
        if weights is not None:
            self.loss.pos_weight.copy_(torch.tensor(weights, dtype=torch.float64))

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the loss of the outputs; targets must have exactly their shape."""
        check_same_shape(type(self).__name__, outputs, targets)
        outputs = at_least_float32(outputs)
        if self.outputs_are == "probabilities":
            # torch refuses BCELoss under autocast, because probabilities of 16 bits lose digits.
            with torch.autocast(outputs.device.type, enabled=False):
                return self.loss(outputs, targets.to(outputs.dtype))  # type: ignore[no-any-return]
        return self.loss(outputs, targets.to(outputs.dtype))  # type: ignore[no-any-return]

    def scores(self, outputs: Tensor) -> Tensor:
        """Return logits, or probabilities minus 0.5. A label is predicted if its score is above 0."""
        return exact(outputs) - 0.5 if self.outputs_are == "probabilities" else outputs

    def metric_inputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, which are ranked for `auroc`, and targets; probabilities are float64."""
        # Not the probabilities of logits: those of large ones are equal. Nor scores: p - 0.5 of small ones are equal.
        return exact(outputs) if self.outputs_are == "probabilities" else outputs, targets

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction`, `probabilities`, `score` (see `scores`) and `target`, each `(B, width)`."""
        inputs, targets = batch
        outputs = exact(self.predict_outputs(inputs))
        scores = self.scores(outputs)
        probabilities = outputs if self.outputs_are == "probabilities" else scores.sigmoid()
        columns = {"prediction": (scores > 0).long(), "probabilities": probabilities, "score": scores}
        return {**columns, "target": targets.long()}

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
        expected = f"{type(self).__name__} has {self.width} label{'s' * (self.width != 1)} per sample"
        check_width(expected, self.network, outputs, self.width)


class BinaryClassification(_ZeroOne):
    """Logits `(B, 1)` of the second of two classes against float32 targets `(B, 1)` that are 0 or 1.

    Metrics, each in [0, 1] but `log_loss`: `accuracy` and `f1` at a probability of 0.5; and for `val/*` and `test/*`
    only `auroc`, `balanced_accuracy` (the mean recall of the two classes) and `log_loss`. `f1` and `auroc` are those of
    class 1. `auroc` ranks logits; if all samples of a split have one class, it is NaN.

    Args:
        network: Maps inputs to what the loss expects, usually logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits, or `torch.nn.BCELoss` after a network
            that ends in a sigmoid. See `docs/losses.md`.
        optimizer: See `Task`.
        schedule: See `Task`.
        pos_weight: Weight of samples of class 1 in the loss, `torch.nn.BCEWithLogitsLoss`; the others weigh 1. A
            number, or `"balanced"`: the training samples of class 0 divided by those of class 1.
        **options: See `Task`; `monitor` is `val/loss` or `val/NAME` for one of the metrics.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        pos_weight: float | Literal["balanced"] | None = None,
        **options: Any,
    ) -> None:
        weights: Weights | None = [pos_weight] if isinstance(pos_weight, int | float) else pos_weight
        if weights is not None:
            reserve_weights(type(self).__name__, "pos_weight", weights, loss, "pos_weight", 1)
        are_probabilities = self.expected_outputs(loss) == "probabilities"
        threshold = 0.5 if are_probabilities else 0.0
        metrics = {
            "accuracy": _BinaryAccuracy(threshold, validate_args=False),
            "auroc": AUROC(),
            "f1": _BinaryF1(threshold, validate_args=False),
            "balanced_accuracy": _BinaryBalancedAccuracy(threshold),
            "log_loss": _BinaryLogLoss(are_probabilities),
        }
        prepare = partial(of_labels, are_probabilities=are_probabilities)
        super().__init__(network, optimizer, schedule, loss, _own_metrics=metrics, _prepare=prepare, **options)
        self.width = 1
        self.pos_weight = weights

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` `(B,)`, `probabilities` `(B, 2)`, `score` `(B,)` (see `scores`) and `target` `(B,)`."""
        columns = super().predict_step(batch, batch_idx)
        second = columns["probabilities"]
        # For large logits, 1 minus the other probability is 0.
        first = 1 - second if self.outputs_are == "probabilities" else (-columns["score"]).sigmoid()
        both = torch.cat([first, second], dim=1)
        return {**{name: column.squeeze(1) for name, column in columns.items()}, "probabilities": both}


class MultilabelClassification(_ZeroOne):
    """Logits `(B, labels)` against float32 targets `(B, labels)` that are 0 or 1.

    Metrics, each in [0, 1]: `accuracy`, the share of correct decisions over all labels at a probability of 0.5; `f1`
    and `auroc`, means over the labels, `auroc` for `val/*` and `test/*` only. `auroc` ranks logits; if all samples of a
    split have a label, or none, it is NaN. As in scikit-learn, a label that no sample has or is predicted to have adds
    0 to `f1`.

    Args:
        network: Maps inputs to what the loss expects, usually logits.
        loss: For example `torch.nn.BCEWithLogitsLoss`, which takes raw logits, or `torch.nn.BCELoss` after a network
            that ends in a sigmoid. See `docs/losses.md`.
        optimizer: See `Task`.
        schedule: See `Task`.
        labels: Number of labels, at least 2; for one label there is `BinaryClassification`.
        pos_weight: Weight of a positive label in the loss, `torch.nn.BCEWithLogitsLoss`; a negative one weighs 1. A
            list in the order of the labels, a mapping by label name, or `"balanced"`: the training samples without a
            label divided by those with it.
        **options: See `Task`; `monitor` is `val/loss`, `val/accuracy`, `val/auroc` or `val/f1`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        labels: int,
        pos_weight: Weights | None = None,
        **options: Any,
    ) -> None:
        if labels < 2:
            raise UsageError(
                f"{type(self).__name__} was given labels={labels}: it must be at least 2; for one label there is "
                "BinaryClassification"
            )
        if pos_weight is not None:
            reserve_weights(type(self).__name__, "pos_weight", pos_weight, loss, "pos_weight", labels)
        are_probabilities = self.expected_outputs(loss) == "probabilities"
        threshold = 0.5 if are_probabilities else 0.0
        metrics = {
            "accuracy": _MultilabelAccuracy(labels, threshold, average="micro", validate_args=False),
            "auroc": AUROC(),
            "f1": _MultilabelF1(labels, threshold, validate_args=False),
        }
        prepare = partial(of_labels, are_probabilities=are_probabilities)
        super().__init__(network, optimizer, schedule, loss, _own_metrics=metrics, _prepare=prepare, **options)
        self.width = labels
        self.pos_weight = pos_weight
