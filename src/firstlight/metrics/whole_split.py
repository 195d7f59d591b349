"""Metrics that are computed from all samples of a split at once, in float64: AUROC and R².

Shapes: `N` samples of a split, `K` labels or outputs per sample.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def exact(values: Tensor) -> Tensor:
    """Return values as float64, so that differences of large numbers are exact; as float32 on MPS, which has none."""
    return values.float() if values.device.type == "mps" else values.double()


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the ROC curve, the mean over the labels.

    It is the share of pairs of a positive and a negative sample in which the positive one has the higher score. Equal
    scores count as half. It compares scores, for example logits, and not probabilities, because large logits have equal
    probabilities. (torchmetrics 1.9 converts logits to probabilities first.)

    Args:
        scores: `(N, K)`.
        labels: `(N, K)`, 0 or 1.

    Returns:
        `()` in [0, 1]; NaN if all samples have the same value of a label, or if a score is NaN.

    >>> auroc(torch.tensor([[40.0], [41.0], [60.0]]), torch.tensor([[0], [1], [1]]))
    tensor(1., dtype=torch.float64)
    """
    columns = exact(scores.detach()).T.cpu().numpy()
    is_positive = (labels != 0).T.cpu().numpy()
    areas = []
    # numpy sorts values alone, several times as fast as torch, which also sorts their positions.
    for values, ordered, selected in zip(columns, np.sort(columns), is_positive, strict=True):
        positive = values[selected]
        below = np.searchsorted(ordered, positive).sum() + np.searchsorted(ordered, positive, "right").sum()
        count = len(positive)
        pairs = count * (len(values) - count)
        is_defined = pairs and not np.isnan(ordered[-1])  # NaN is sorted to the end.
        areas.append((int(below) - count**2) / (2 * pairs) if is_defined else math.nan)  # Equal scores count as half.
    return exact(torch.tensor(areas, dtype=torch.float64).mean()).to(scores.device)


def r2(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the coefficient of determination, the mean over the outputs.

    The mean of the targets is subtracted before squares are summed. (torchmetrics 1.9 subtracts sums of squares, which
    loses the digits of targets far from 0.)

    Args:
        predictions: `(N, K)`.
        targets: `(N, K)`.

    Returns:
        `()`, at most 1; NaN if all targets of an output are equal.

    >>> r2(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    predictions, targets = exact(predictions), exact(targets)
    errors = (predictions - targets).square().sum(0)
    spread = (targets - targets.mean(0)).square().sum(0)
    return (1 - errors / spread).masked_fill(targets.amax(0) == targets.amin(0), torch.nan).mean()


class MayBeUndefined:
    """A metric that is undefined for some targets. It is NaN then, and `missing_reason` says why."""

    missing_reason = ""

    def undefined(self, targets: Tensor) -> str:
        """Return why the metric of the targets `(N, ...)` of a split is undefined, or `""`."""
        return ""


class WholeSplitMetric(MayBeUndefined, Metric, ABC):
    """Keeps all predictions and targets of a split, and computes the metric from them.

    After `compute`, `missing_reason` says why the metric is undefined, or is `""`.

    Args:
        **options: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.missing_reason = ""
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the metric `()` of all predictions and targets."""

    def undefined(self, targets: Tensor) -> str:
        """Return why the metric of the targets `(N, ...)` of a split is undefined, or `""`."""
        return "" if len(targets) > 1 else "it needs two samples"

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.predictions.append(predictions)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """Return the metric `()`; NaN if it is undefined."""
        predictions, targets = dim_zero_cat(self.predictions), dim_zero_cat(self.targets)
        self.missing_reason = self.undefined(targets)
        if self.missing_reason:
            return torch.tensor(torch.nan, device=targets.device)
        return self.function(predictions, targets)


class AUROC(WholeSplitMetric):
    """`auroc` of the scores `(N, K)` and labels `(N, K)` of a split."""

    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the area under the ROC curve."""
        return auroc(predictions, targets)

    def undefined(self, targets: Tensor) -> str:
        """Return why the area is undefined, or `""`."""
        return super().undefined(targets) or _constant(targets, "all samples have the same class", "the same label")


class R2(WholeSplitMetric):
    """`r2` of the predictions `(N, K)` and targets `(N, K)` of a split."""

    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the coefficient of determination."""
        return r2(predictions, targets)

    def undefined(self, targets: Tensor) -> str:
        """Return why the coefficient is undefined, or `""`."""
        return super().undefined(targets) or _constant(targets, "all targets are equal", "the same target")


def _constant(targets: Tensor, reason: str, reason_of_one: str) -> str:
    """Return which column of the targets `(N, K)` is constant, or `""`."""
    columns = (targets.amax(0) == targets.amin(0)).nonzero().flatten().tolist()
    if not columns:
        return ""
    return reason if targets.shape[1] == 1 else f"all samples have {reason_of_one} {columns[0]}"
