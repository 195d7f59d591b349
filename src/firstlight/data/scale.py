"""Statistics of the training split, which give inputs mean zero and deviation one.

Shapes: `N` samples, `B` of a batch, `C` columns or channels; `...` the pixels of a channel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from firstlight.errors import UsageError

__all__ = ["Scale", "statistics"]


class Scale:
    """Takes the mean and the standard deviation of the training split out of inputs, on whatever device they are."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._there: dict[tuple[float, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: Tensor, fitted: Mapping[str, Any], unit: float = 1) -> Tensor:
        """Return scaled floats.

        Args:
            inputs: `(B, C, ...)`, of which `unit` stands for 1 in the statistics: 255 for pixels.
            fitted: Its `mean` and `std` are `(C, 1, ...)`, as `statistics` returns them.
            unit: See `inputs`.
        """
        if fitted["mean"] is not self._mean:
            self._mean, self._there = fitted["mean"], {}
        key = unit, inputs.device
        if key not in self._there:  # One pass over a batch less than to divide it by the unit first.
            self._there[key] = (fitted["mean"].to(inputs.device) * unit, fitted["std"].to(inputs.device) * unit)
        mean, std = self._there[key]
        # On a CPU a batch of 128 images is taken and scaled in 0.12 ms like this, in 0.16 as below.
        if inputs.dtype == torch.uint8 and inputs.is_cpu:
            return inputs.to(mean.dtype).sub_(mean).div_(std)
        return torch.sub(inputs, mean).div_(std)


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column or channel, `(C, 1, ...)` to fit one sample.

    The deviation of a constant column is 1. Of numbers they are float64, so that large ones keep their differences;
    pixels are counted, so that no float copy of them is made, and theirs are float32.

    Args:
        inputs: `(N, C, ...)`, uint8 to be divided by 255, or floats, of which NaN are left out.

    Raises:
        UsageError: When a column holds nothing but NaN.
    """
    shape = (-1, *[1] * (inputs.ndim - 2))
    if inputs.dtype == torch.uint8:
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in inputs.unbind(1)]
        ).double()
        shares, levels = counts / counts.sum(1, keepdim=True), torch.linspace(0, 1, 256, dtype=torch.float64)
        mean = shares @ levels
        deviation = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
        std = deviation.where(shares.amax(1) < 1, 1.0)
        return mean.float().reshape(shape), std.float().reshape(shape)
    values = inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
    empty = values.isnan().all(0).nonzero()
    if len(empty):
        raise UsageError(f"column {empty[0].item()} has no value in the whole training split")
    scaler = StandardScaler().fit(values.double().numpy())
    mean, std = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
    return mean.reshape(shape), std.reshape(shape)
