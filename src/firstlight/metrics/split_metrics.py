"""What a task sees of one split, gathered at next to no cost and read when something is logged.

Shapes: `B` batch; `...` whatever one output or target is shaped like.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torchmetrics import MetricCollection, SumMetric

__all__ = ["SplitMetrics"]

_MOST_ELEMENTS = 2**22
"""Outputs kept before they are counted: 16 MiB of float32."""


class SplitMetrics(nn.Module):
    """Mean loss over the samples of a split, and its metrics, equal on every process once they are read.

    `add` only keeps references; they are computed with many batches at once, and no device is waited for until `read`.

    Args:
        split: Prefix of the names, for example `"val"`.
        metrics: Metrics of `(outputs, targets)`; they are cloned.
    """

    def __init__(self, split: str, metrics: MetricCollection) -> None:
        super().__init__()
        self.split = split
        # "disable": the other strategies look at every value, which waits for the device. MeanMetric of torchmetrics
        # 1.9 forgets its weights with it, hence two sums.
        self.loss = SumMetric(nan_strategy="disable")
        self.samples = SumMetric(nan_strategy="disable")
        self.metrics = metrics.clone(prefix=f"{split}/")
        self._kept: list[tuple[Tensor, Tensor, Tensor, Tensor | int]] = []
        self._room = [_MOST_ELEMENTS]  # In a list: setting an attribute of a module takes 5 µs.
        self._counted = False

    def update(self, loss: Tensor, outputs: Tensor, targets: Tensor, scored: Tensor | None = None) -> None:
        """Take a batch: its mean loss `()`, outputs `(B, ...)` and targets `(B, ...)`.

        Args:
            loss: `()`, a mean.
            outputs: `(B, ...)`.
            targets: `(B, ...)`.
            scored: `()`, of how many targets the loss is the mean: `B` when it is not given.
        """
        self._kept.append((loss.detach(), outputs.detach(), targets, targets.shape[0] if scored is None else scored))
        self._room[0] -= outputs.numel()
        if self._room[0] < 0:
            self._update()

    def compute(self) -> dict[str, Tensor]:
        """Return what was seen since the last call, by name; nothing when nothing was seen."""
        self._update()
        if not self._counted:
            return {}
        values = {f"{self.split}/loss": self.loss.compute() / self.samples.compute(), **self.metrics.compute()}
        self.reset()
        return values

    def reset(self) -> None:
        """Forget what was seen."""
        self._kept.clear()
        self._room[0] = _MOST_ELEMENTS
        self._counted = False
        with torch.inference_mode(False):  # Validation's zeros could not be added to in a fit that follows.
            self.loss.reset()
            self.samples.reset()
            self.metrics.reset()

    def unread(self) -> dict[str, Any]:
        """Return what was seen since it was last read, for `restore`: values on the CPU, safe to load.

        It is as it was seen, so that sums are those of a run that was never stopped, to the last bit. Nothing is
        returned where batches were counted already, because there was no room for more of them.
        """
        if not self._kept or self._counted:
            return {}
        losses, outputs, targets, scored = map(list, zip(*self._kept, strict=True))
        unread: dict[str, Any] = {
            "losses": torch.stack(losses).cpu(),
            "scored": _counts(scored, self.loss.device).cpu(),
            "room": self._room[0],
        }
        if self.metrics:
            for name, batches in (("outputs", outputs), ("targets", targets)):
                unread |= {name: torch.cat(batches).cpu(), f"{name}_sizes": [each.shape[0] for each in batches]}
        return unread

    def restore(self, unread: Mapping[str, Any]) -> None:
        """Go on from what `unread` returned; what was seen before is forgotten."""
        self.reset()
        if unread and ("outputs" in unread) == bool(self.metrics):
            unread = move_data_to_device(unread, self.loss.device)
            outputs = targets = unread["losses"]  # at which nobody looks where there are no metrics
            if self.metrics:
                outputs, targets = (unread[name].split(unread[f"{name}_sizes"]) for name in ("outputs", "targets"))
            self._kept += zip(unread["losses"], outputs, targets, unread["scored"], strict=True)
            self._room[0] = unread["room"]

    def _update(self) -> None:
        if not self._kept:
            return
        losses, outputs, targets, scored = map(list, zip(*self._kept, strict=True))
        means = torch.stack(losses).float()  # Sums of half precision would overflow.
        counts = _counts(scored, means.device).to(means)
        self.loss.update(means @ counts)
        self.samples.update(counts.sum())
        if self.metrics:
            self.metrics.update(torch.cat(outputs), torch.cat(targets))
        self._kept.clear()
        self._room[0] = _MOST_ELEMENTS
        self._counted = True


def _counts(scored: list[Tensor | int], device: torch.device) -> Tensor:
    """Return `(n,)`; those of a run that goes on are tensors, and others may follow."""
    if any(isinstance(each, Tensor) for each in scored):
        return torch.stack([torch.as_tensor(each, device=device) for each in scored])
    return torch.tensor(scored, device=device)
