"""Metrics of classification that show imbalance, equal to scikit-learn's on the predictions of a split.

Shapes: `N` samples, `K` classes.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from firstlight.metrics.whole_split import MayBeUndefined, WholeSplitMetric, auroc, exact


class ClassCounts(MayBeUndefined, Metric, ABC):
    """A metric computed from how often each class is predicted, true, and both.

    Args:
        classes: `K`.
        ignore_index: A target that does not count.
        **options: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    missing_reason = "no target counts"

    counts: Tensor

    def __init__(self, classes: int, ignore_index: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.classes = classes
        self.ignore_index = ignore_index
        self.last_counts: Tensor | None = None  # Of the last `compute`, over all processes.
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.int64), "sum")

    @abstractmethod
    def function(self, right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return the metric `()` for the counts `(K,)` of right predictions, of predictions and of targets."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add logits or probabilities `(N, K)`, or class indices `(N,)`, and targets `(N,)`."""
        predicted = predictions.argmax(1) if predictions.ndim == 2 else predictions
        is_scored = _is_scored(targets, self.ignore_index)
        predicted, targets = predicted[is_scored], targets[is_scored]
        each = (targets[predicted == targets], predicted, targets)
        self.counts += torch.stack([indices.bincount(minlength=self.classes) for indices in each])

    def compute(self) -> Tensor:
        """Return the metric `()`; NaN if no target counts."""
        self.last_counts = self.counts
        return self.function(*exact(self.counts))


class BalancedAccuracy(ClassCounts):
    """Mean recall of the classes that the targets hold."""

    def function(self, right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return the balanced accuracy."""
        return (right / true).nanmean()


class MacroF1(ClassCounts):
    """Mean F1 of the classes that the targets or predictions hold."""

    def function(self, right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Return the mean F1."""
        return (2 * right / (predicted + true)).nanmean()


class LogLoss(MayBeUndefined, Metric):
    """Mean of `-log(p)` for the probabilities `p` of the targets, each at least 2.2e-16.

    It is not the loss that is minimised: it has no class weights, label smoothing or other terms.

    Args:
        ignore_index: A target that does not count.
        **options: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    missing_reason = "no target counts"

    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add logits `(N, K)` and targets `(N,)`."""
        is_scored = _is_scored(targets, self.ignore_index)
        probabilities = exact(predictions).softmax(1)
        self.add(probabilities.gather(1, targets.where(is_scored, 0)[:, None])[:, 0], is_scored)

    def add(self, probabilities: Tensor, is_scored: Tensor) -> None:
        """Add the probabilities `(N,)` of the targets, and which of them count `(N,)`."""
        smallest = torch.finfo(torch.float64).eps  # Of scikit-learn.
        nats = -probabilities.clamp(smallest, 1 - smallest).log()
        self.total += nats.where(is_scored, 0).sum()
        self.count += is_scored.sum()

    def compute(self) -> Tensor:
        """Return the log loss `()`; NaN if no target counts."""
        return self.total / self.count


class MulticlassAUROC(WholeSplitMetric):
    """`auroc` of the probability of each class against all others; the mean over the classes.

    Args:
        classes: `K`.
        ignore_index: A target that does not count.
        **options: Arguments of `torchmetrics.Metric`.
    """

    def __init__(self, classes: int, ignore_index: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.classes = classes
        self.ignore_index = ignore_index

    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean area under the ROC curves for logits `(N, K)` and targets `(N,)`."""
        is_scored = _is_scored(targets, self.ignore_index)
        labels = targets[is_scored, None] == torch.arange(self.classes, device=targets.device)
        return auroc(exact(predictions[is_scored]).softmax(1), labels)

    def undefined(self, targets: Tensor) -> str:
        """Return why the area is undefined, or `""`."""
        counts = targets[_is_scored(targets, self.ignore_index)].bincount(minlength=self.classes)
        absent = (counts == 0).nonzero().flatten().tolist()
        if not absent:
            return ""
        return "no target counts" if len(absent) == self.classes else f"no sample has class {absent[0]}"


def per_class(counts: Tensor) -> list[dict[str, Any]]:
    """Return for each class the number of its samples, and its precision and recall.

    Args:
        counts: `last_counts` of `ClassCounts`, `(3, K)`.

    Returns:
        `samples`, `precision` and `recall` of each class. The precision of a class that is never predicted is None,
        and so is the recall of a class without samples.

    >>> per_class(torch.tensor([[3, 0], [4, 0], [3, 1]]))[1]
    {'samples': 1, 'precision': None, 'recall': 0.0}
    """
    return [
        {
            "samples": true,
            "precision": right / predicted if predicted else None,
            "recall": right / true if true else None,
        }
        for right, predicted, true in counts.T.tolist()
    ]


def _is_scored(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Return which targets count. A negative one is no class: the loss may ignore it without the task knowing."""
    return targets >= 0 if ignore_index is None else (targets != ignore_index) & (targets >= 0)
