"""Metrics that the user adds to those of a task, and what they get from it.

Shapes: `N` samples of a split, `K` classes, labels or outputs per sample.
"""

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from firstlight.errors import UsageError
from firstlight.metrics.whole_split import WholeSplitMetric, exact

Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps the predictions and targets of a task's own metrics to those that torchmetrics takes."""


class AddedMetric(WholeSplitMetric):
    """A metric of torchmetrics that is computed from all samples of a split at once, in float64.

    So it does not depend on the batch size or the number of processes.

    Args:
        name: Its name in `metrics` of the task, for messages.
        metric: Takes predictions and targets, and returns one number. It is changed: it no longer talks to other
            processes.
        prepare: Also leaves out the samples that do not count.

    Raises:
        UsageError: In `compute`, when the metric refuses what it gets or returns no single number.
    """

    def __init__(self, name: str, metric: Metric, prepare: Prepare) -> None:
        super().__init__()
        self.option = f"metrics.{name}: {type(metric).__name__}"
        self.metric = metric
        self.prepare = prepare
        for each in metric.modules():
            if isinstance(each, Metric):
                each.sync_on_compute = each._to_sync = False  # It gets the samples of all processes.

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]  # torchmetrics declares an attribute
        """What the metric says."""
        return self.metric.higher_is_better

    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the value `()` of the metric; NaN if no target counts."""
        predictions, targets = self.prepare(predictions, targets)
        if not len(targets):
            self.missing_reason = "no target counts"
            return torch.tensor(torch.nan, device=targets.device)
        with torch.inference_mode(False):  # Otherwise a later call could not add to zeros made by a validation.
            # It is also exact for counts, which torchmetrics 1.9 divides in float32.
            self.metric.set_dtype(torch.float32 if targets.device.type == "mps" else torch.float64)
            self.metric.to(targets.device).reset()
        try:
            self.metric.update(predictions, targets)
            value = self.metric.compute()
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if not _is_torchmetrics(self.metric):  # It may be a bug, which keeps its traceback.
                raise
            raise UsageError(
                f"{self.option} cannot compare predictions {_described(predictions)} with targets "
                f"{_described(targets)}: {' '.join(str(error).split())}"
            ) from error
        finally:
            self.metric.reset()
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{self.option} returns {found}: a metric that is logged must return one number")
        self.missing_reason = "the metric returns nan for this split"
        return value.reshape(())


def check_names(task: str, own: Collection[str], added: Collection[str]) -> None:
    """Refuse names of metrics that a task logs already or that cannot be logged."""
    for name in added:
        if name in {"loss", *own}:
            raise UsageError(f"{task} was given metrics.{name}, but it logs val/{name} already: use another name")
        if not re.fullmatch(r"\w[\w@+-]*", name) or hasattr(MetricCollection({}), name):
            raise UsageError(
                f"{task} was given metrics.{name!s:.80}: a name must be letters, digits and _, and none of "
                "torchmetrics.MetricCollection's own, for example kappa"
            )


def of_classes(predictions: Tensor, targets: Tensor, ignored: int | None, are_scores: bool) -> tuple[Tensor, Tensor]:
    """Return what metrics of several classes take.

    Args:
        predictions: Logits `(N, K)`.
        targets: Class indices `(N,)`.
        ignored: A target that does not count.
        are_scores: Whether the predictions have no probabilities.

    Returns:
        Probabilities `(N, K)`, or the predicted classes `(N,)` of scores, and class indices `(N,)`.
    """
    if ignored is not None:
        is_scored = targets != ignored
        predictions, targets = predictions[is_scored], targets[is_scored]
    return predictions.argmax(1) if are_scores else exact(predictions).softmax(1), targets


def of_labels(outputs: Tensor, targets: Tensor, are_probabilities: bool) -> tuple[Tensor, Tensor]:
    """Return what metrics of zeros and ones take.

    Args:
        outputs: Logits or probabilities `(N, K)`.
        targets: Zeros and ones `(N, K)`.
        are_probabilities: Whether the outputs are probabilities.

    Returns:
        Probabilities and integer targets, each `(N, K)`, or `(N,)` if `K` is 1.
    """
    outputs = exact(outputs)
    return of_numbers(outputs if are_probabilities else outputs.sigmoid(), targets.long())


def of_numbers(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and targets `(N, K)` as `(N,)` if `K` is 1."""
    return (predictions.squeeze(1), targets.squeeze(1)) if predictions.shape[1] == 1 else (predictions, targets)


def _is_torchmetrics(metric: Metric) -> bool:
    return type(metric).__module__.partition(".")[0] == "torchmetrics"


def _described(values: Tensor) -> str:
    return f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
