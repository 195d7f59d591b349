"""Parameter groups for `torch.optim`."""

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into those that weight decay may shrink and those that it must not.

    Biases and the scales and shifts of normalisation layers have fewer than two axes. Decaying them takes away what
    they are for and regularises nothing (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.3).

    Args:
        module: Any module. Frozen parameters are left out, shared ones are listed once.

    Returns:
        Parameter groups for an optimiser: first the weights, then the others with `weight_decay` 0. A group without
        parameters is left out.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))]
    [1, 3]
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
