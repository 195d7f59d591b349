"""Statistics of the training split, which give inputs mean zero and deviation one."""

import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from firstlight.errors import UsageError

__all__ = ["statistics"]


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column or channel, float32 `(C, 1, ...)` to fit one sample.

    The deviation of a constant column is 1. Pixels are counted, so that no float copy of them is made.

    Args:
        inputs: `(N, C, ...)`, uint8 to be divided by 255, or floats, of which NaN are left out.

    Raises:
        UsageError: When a column holds nothing but NaN.
    """
    if inputs.dtype == torch.uint8:
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in inputs.unbind(1)]
        ).double()
        shares, levels = counts / counts.sum(1, keepdim=True), torch.linspace(0, 1, 256, dtype=torch.float64)
        mean = shares @ levels
        deviation = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
        std = deviation.where(shares.amax(1) < 1, 1.0)
    else:
        values = inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
        empty = values.isnan().all(0).nonzero()
        if len(empty):
            raise UsageError(f"column {empty[0].item()} has no value in the whole training split")
        scaler = StandardScaler().fit(values.double().numpy())
        mean, std = torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_)
    shape = (-1, *[1] * (inputs.ndim - 2))
    return mean.float().reshape(shape), std.float().reshape(shape)
