"""Mean losses and metrics of one split, computed for many batches at once.

Shapes: `B` batch; `...` the shape of one prediction or target.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torchmetrics import Metric, MetricCollection, SumMetric

from firstlight.errors import UsageError
from firstlight.metrics.added import AddedMetric
from firstlight.metrics.classes import ClassCounts
from firstlight.metrics.whole_split import MayBeUndefined, exact

_MAX_ELEMENTS = 2**22  # Elements of predictions kept before the metrics are updated: 16 MiB of float32, 32 of float64.
_ELEMENTS_PER_LOSS = 256  # Elements that a batch without predictions counts as, so that few enough batches are kept.


class SplitMetrics:
    """Weighted mean losses and metrics of a split, equal on every process after `compute`. Sums are float64.

    `update` only keeps references, so that a step does little work and never waits for the device. This class is no
    `nn.Module`, because a checkpoint does not hold metrics. It moves them to the device of the losses itself.

    Args:
        split: Prefix of the names, for example `"val"`.
        metrics: By name, metrics of predictions and targets; they are cloned.
        ignore_index: A target that does not count. If given, weights are counted from the targets for the metrics, for
            many batches at once, instead of those that `update` is given.
    """

    def __init__(self, split: str, metrics: Mapping[str, Metric], ignore_index: int | None = None) -> None:
        self.split = split
        self.ignore_index = ignore_index
        self.names = list(metrics)
        self.last_weight: Tensor | int | None = None  # Of the current batch, if it was added.
        self.is_open = True  # False while `update` leaves out batches: LBFGS evaluates one several times.
        self.copies_targets = False  # True if a loader may write a batch into the memory of the one before.
        self.missing_reasons: dict[str, str] = {}  # By name, why a metric of the last `compute` is NaN.
        self.class_counts: Tensor | None = None  # Of the last `compute`, see `ClassCounts.last_counts`.
        self._metrics = MetricCollection(dict(metrics)).clone(prefix=f"{split}/")
        self._weight = _new_sum()
        self._sums: dict[str, SumMetric] = {"loss": _new_sum()}
        self._batches: list[tuple[Tensor, dict[str, Tensor], Tensor | int, tuple[Tensor, Tensor] | None]] = []
        self._room = _MAX_ELEMENTS
        self._is_updated = False

    def update(
        self,
        loss: Tensor,
        weight: Tensor | int,
        inputs: tuple[Tensor, Tensor] | None = None,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: Mean loss `()` of the batch.
            weight: What the loss is a mean of: the number of samples or tokens, or the sum of class weights, `()`.
            inputs: Predictions `(B, ...)` and targets `(B, ...)` for the metrics. `None` if the metrics are computed
                from the losses and weights of the batches, for example perplexity.
            terms: By name, the terms `()` of the loss, if it is a sum of several. Every batch has the same names.
        """
        self.last_weight = weight
        if not self.is_open:
            return
        named = {name: _kept(term) for name, term in terms.items()} if terms else {}
        if inputs is None:
            self._room -= _ELEMENTS_PER_LOSS
        else:
            predictions, targets = inputs
            base = predictions._base  # A step changes parameters and their views in place.
            predictions = predictions.detach() if base is None or not base.is_leaf else predictions.detach().clone()
            inputs = predictions, targets.clone() if self.copies_targets else targets
            self._room -= predictions.numel()
        self._batches.append((_kept(loss), named, weight, inputs))
        if self._room < 0:
            self._update_metrics()

    def compute(self) -> dict[str, Tensor]:
        """Return the means and metrics of the batches since the last call, by name; `{}` if there were none."""
        self._update_metrics()
        if not self._is_updated:
            return {}
        weight = self._weight.compute()
        values = {f"{self.split}/{name}": total.compute() / weight for name, total in self._sums.items()}
        values |= self._metrics.compute()
        if self.split != "train":  # Reading a value waits for the device.
            metrics = list(self._metrics.items(keep_base=False, copy_state=False))
            self.class_counts = next((each.last_counts for _, each in metrics if isinstance(each, ClassCounts)), None)
            reasons = {name: each.missing_reason for name, each in metrics if isinstance(each, MayBeUndefined)}
            self.missing_reasons = {name: why for name, why in reasons.items() if why and values[name].isnan()}
        self.reset()
        return values

    def undefined(self, targets: Tensor) -> dict[str, str]:
        """Return by name why a metric of a split with these targets `(N, ...)` is undefined."""
        metrics = self._metrics.items(keep_base=False, copy_state=False)
        reasons = {name: each.undefined(targets) for name, each in metrics if isinstance(each, MayBeUndefined)}
        return {name: reason for name, reason in reasons.items() if reason}

    def try_added(self, predictions: Tensor, targets: Tensor) -> None:
        """Refuse an `AddedMetric` that cannot be computed from a few predictions and targets `(N, ...)`."""
        for metric in self._metrics.values(copy_state=False):
            if isinstance(metric, AddedMetric):
                metric.function(predictions, targets)

    def reset(self) -> None:
        """Forget all batches."""
        self._batches.clear()
        self._room = _MAX_ELEMENTS
        self._is_updated = False
        with torch.inference_mode(False):  # Otherwise a later fit could not add to zeros made by a validation.
            self._weight.reset()
            for total in self._sums.values():
                total.reset()
            self._metrics.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the batches since the last `compute`, as tensors on the CPU and plain values.

        The batches themselves are saved, not their sums: a resumed run then adds the same numbers in the same order as
        an uninterrupted run. Returns `{}` if some batches were summed already because there was no room for more.
        """
        if not self._batches or self._is_updated:
            return {}
        losses, terms, weights, inputs = zip(*self._batches, strict=True)
        state: dict[str, Any] = {
            "has_metrics": bool(self.names),
            "losses": torch.stack(losses).cpu(),
            "terms": {name: torch.stack([each[name] for each in terms]).cpu() for name in terms[0]},
            "weights": _stack_weights(weights, losses[0].device).cpu(),
            "room": self._room,
        }
        if inputs[0] is not None:
            for name, parts in zip(("predictions", "targets"), zip(*inputs, strict=True), strict=True):
                state[name] = torch.cat([part.flatten() for part in parts]).cpu()
                state[f"{name}_shapes"] = [list(part.shape) for part in parts]
        return state

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace all batches by those of `state_dict()`, unless they were kept for other metrics."""
        self.reset()
        if not state or state["has_metrics"] != bool(self.names):
            return
        state = move_data_to_device(state, device)
        count = len(state["losses"])
        terms = [{name: values[i] for name, values in state["terms"].items()} for i in range(count)]
        inputs: list[Any] = [None] * count
        if "predictions" in state:
            inputs = list(
                zip(*(_split(state[name], state[f"{name}_shapes"]) for name in ("predictions", "targets")), strict=True)
            )
        self._batches += zip(state["losses"], terms, state["weights"], inputs, strict=True)
        self._room = state["room"]

    def _update_metrics(self) -> None:
        if not self._batches:
            return
        losses, terms, weights, inputs = zip(*self._batches, strict=True)
        self._check_names(terms)
        for name, value in {"loss": losses[0], **terms[0]}.items():
            if value.ndim:
                raise UsageError(
                    f"the {name} of a {self.split} batch has the shape {tuple(value.shape)}: it must be a mean over "
                    "the batch, of shape ()"
                )
        means = {"loss": exact(torch.stack(losses))}
        means |= {name: exact(torch.stack([each[name] for each in terms])) for name in terms[0]}
        if self.ignore_index is None or inputs[0] is None:
            counts = _stack_weights(weights, losses[0].device)
        else:
            counts = _count_scored([targets for _, targets in inputs], self.ignore_index)
        counts = counts.to(means["loss"])
        if self._weight.device != counts.device:
            metrics: list[Metric | MetricCollection] = [self._weight, *self._sums.values(), self._metrics]
            for metric in metrics:
                if counts.device.type == "mps":
                    metric.set_dtype(torch.float32)  # It has no float64.
                metric.to(counts.device)
        if self._sums.keys() != means.keys():
            self._sums = {name: self._sums.get(name, _new_sum().to(counts.device)) for name in means}
        for name, values in means.items():
            self._sums[name].update((values * counts).where(counts > 0, 0).sum())  # A mean over nothing is nan.
        self._weight.update(counts.sum())
        if inputs[0] is not None:
            for predictions, targets in _joined(inputs):
                self._metrics.update(predictions, targets)
        elif self.names:
            self._metrics.update(means["loss"], counts)
        self._batches.clear()
        self._room = _MAX_ELEMENTS
        self._is_updated = True

    def _check_names(self, terms: tuple[dict[str, Tensor], ...]) -> None:
        names = set(self._sums) - {"loss"} if self._is_updated else set(terms[0])
        for each in terms:
            if set(each) != names:
                raise UsageError(
                    f"the loss has the terms {', '.join(each) or 'none'} in one {self.split} batch and "
                    f"{', '.join(names) or 'none'} in another: compute_loss must always return the same names"
                )
        if taken := sorted(names & {"loss", *self.names}):
            raise UsageError(
                f"the loss has a term {taken[0]}, but a metric or the sum of the terms has this name: rename the term"
            )


def _new_sum() -> SumMetric:
    # MeanMetric of torchmetrics 1.9 ignores its weights with nan_strategy="disable", and every other strategy waits for
    # the device. Two sums replace it. They are also used outside inference mode.
    with torch.inference_mode(False):
        total = SumMetric(nan_strategy="disable")
        total.set_dtype(torch.float64)
        return total


def _kept(value: Tensor) -> Tensor:
    """Return a value without its gradient; a copy if it may be a parameter or buffer, which changes in place."""
    value_now = value.detach()
    return value_now.clone() if value.grad_fn is None or value._base is not None else value_now


def _joined(batches: tuple[tuple[Tensor, Tensor], ...]) -> list[tuple[Tensor, Tensor]]:
    """Return predictions and targets of all batches together, or of each batch if their shapes differ."""
    if len({(predictions.shape[1:], targets.shape[1:]) for predictions, targets in batches}) > 1:
        return list(batches)
    predictions, targets = zip(*batches, strict=True)
    return [(torch.cat(predictions), torch.cat(targets))]


def _split(values: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """Return the tensors of these shapes that were flattened and joined to `values`."""
    parts = torch.split(values, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _stack_weights(weights: tuple[Tensor | int, ...], device: torch.device) -> Tensor:
    """Return the weights `(N,)`. Those of a resumed run are tensors, and integers may follow them."""
    if Tensor in map(type, weights):
        stacked = torch.stack([torch.as_tensor(weight, device=device) for weight in weights])
        if stacked.ndim > 1:
            raise UsageError(
                f"batch_weight returns the shape {tuple(stacked.shape[1:])}: it must return one number, ()"
            )
        return stacked
    return torch.tensor(weights, device=device)


def _count_scored(targets: list[Tensor], ignore_index: int) -> Tensor:
    """Return how many targets of each batch are scored, `(N,)`."""
    is_scored = torch.cat([each.flatten() for each in targets]).ne(ignore_index)
    sizes = [each.numel() for each in targets]
    if len(set(sizes)) == 1:
        return is_scored.view(len(sizes), sizes[0]).sum(dim=1)
    return torch.stack([part.sum() for part in torch.split(is_scored, sizes)])
