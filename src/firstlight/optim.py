"""Parameter groups for `torch.optim`."""

from typing import Any

from torch import nn

__all__ = ["parameter_groups", "weights"]


def weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters with at least two axes, to which penalties and weight decay apply.

    Biases and the scales and shifts of normalisation layers have fewer axes. Shrinking them does not regularise (Goyal
    et al., "Accurate, Large Minibatch SGD", 2017, section 5.3). A shared parameter is listed once.

    >>> [tuple(weight.shape) for weight in weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))]
    [(3, 4)]
    """
    return [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim >= 2]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser: the `weights`, and the other trainable parameters without decay.

    Empty groups are left out.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))]
    [1, 3]
    """
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights(module)}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
