"""What a task sees of one split, gathered at next to no cost and read when something is logged.

Shapes: `B` batch; `...` whatever one output or target is shaped like.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

__all__ = ["Observed"]

_MOST_ELEMENTS = 2**22
"""Outputs kept before they are counted: 16 MiB of float32."""


class Observed(nn.Module):
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

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor, scored: Tensor | None = None) -> None:
        """Take a batch: its mean loss `()`, outputs `(B, ...)` and targets `(B, ...)`.

        Args:
            loss: `()`, a mean.
            outputs: `(B, ...)`.
            targets: `(B, ...)`.
            scored: `()`, of how many targets the loss is the mean: `B` when it is not given.
        """
        if self._room[0] < 0:
            self._update()
        self._kept.append((loss.detach(), outputs.detach(), targets, targets.shape[0] if scored is None else scored))
        self._room[0] -= outputs.numel()

    def read(self) -> dict[str, Tensor]:
        """Return what was seen since the last call, by name; nothing when nothing was seen."""
        if not self._kept:
            return {}
        self._update()
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
        """Return what was seen since it was last read, as values on the CPU that load with `weights_only=True`.

        What is kept is not counted for it: sums are those of a run that was never stopped, to the last bit.
        """
        if not self._kept:
            return {}
        losses, outputs, targets, scored = zip(*self._kept, strict=True)
        return {
            "losses": torch.stack(losses).cpu(),
            "outputs": torch.cat(outputs).cpu(),
            "targets": torch.cat(targets).cpu(),
            "scored": torch.stack(scored).cpu() if isinstance(scored[0], Tensor) else list(scored),
            "sizes": [each.shape[0] for each in targets],
            "counted": [move_data_to_device(each.metric_state, "cpu") for each in self._metrics() if self._counted],
        }

    def restore(self, unread: Mapping[str, Any]) -> None:
        """Go on from what `unread` returned."""
        self.reset()
        if not unread:
            return
        unread = move_data_to_device(unread, self.loss.device)
        sizes = unread["sizes"]
        outputs, targets = unread["outputs"].split(sizes), unread["targets"].split(sizes)
        self._kept += zip(unread["losses"], outputs, targets, unread["scored"], strict=True)
        self._room[0] -= unread["outputs"].numel()
        self._counted = bool(unread["counted"])
        for metric, state in zip(self._metrics() if self._counted else (), unread["counted"], strict=True):
            for name, value in state.items():
                setattr(metric, name, value)

    def _metrics(self) -> list[Metric]:
        return [self.loss, self.samples, *self.metrics.values()]

    def _update(self) -> None:
        losses, outputs, targets, scored = map(list, zip(*self._kept, strict=True))
        means = torch.stack(losses).float()  # Sums of half precision would overflow.
        counts = torch.stack(scored).to(means) if isinstance(scored[0], Tensor) else means.new_tensor(scored)
        self.loss.update(means @ counts)
        self.samples.update(counts.sum())
        self.metrics.update(torch.cat(outputs), torch.cat(targets))
        self._kept.clear()
        self._room[0] = _MOST_ELEMENTS
        self._counted = True
