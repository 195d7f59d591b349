"""What several families of networks are made of.

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict
from typing import Any, Literal, get_args

import torch
from torch import nn

from firstlight.errors import UsageError, did_you_mean

__all__ = ["ConvBlock", "Init", "Layers", "check_dropout", "check_sizes", "initialise"]

Init = Literal["default", "kaiming", "xavier"]


class Layers(nn.Sequential):
    """Layers one after another, of which a part, such as all but the last, is a plain `nn.Sequential`.

    `nn.Sequential` would make a part of the class itself, whose constructor takes something else than layers.
    """

    def __getitem__(self, index: int | slice) -> Any:
        """Return a layer, or several as a network."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class ConvBlock(Layers):
    """Convolution, batch normalisation, activation: `(B, in_channels, H, W)` to `(B, out_channels, H', W')`.

    The convolution is 3x3 with padding 1, so `H'` is `H / stride`, rounded up. It has no bias, because batch
    normalisation would take it away (Ioffe and Szegedy, 2015, section 3.2).

    Args:
        in_channels: Channels of the inputs.
        out_channels: Channels of the outputs.
        stride: Pixels that the kernel moves at a time.
        activation: Class of the activation; `torch.nn.Identity` leaves it out.

    Raises:
        UsageError: When a number is below 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        check_sizes(type(self).__name__, in_channels=in_channels, out_channels=out_channels, stride=stride)
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        # Convolutions on a processor are faster on weights with channels last. `contiguous` would leave one channel
        # as it is, and what follows the first layer would be turned around in each step.
        weight = convolution.weight.data
        convolution.weight.data = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)
        norm = nn.BatchNorm2d(out_channels)
        super().__init__(OrderedDict(convolution=convolution, norm=norm, activation=activation()))


def initialise(module: nn.Module, init: Init, activation: type[nn.Module]) -> None:
    """Draw the weights of every linear layer and convolution in `module` anew, and set their biases to 0.

    With `n` inputs and `m` outputs of a unit, `"xavier"` is uniform with variance `2 / (n + m)` (Glorot and Bengio,
    2010, equation 16). `"kaiming"` is normal with variance `1 / (n * E[activation(z)^2])` for a standard normal `z`:
    that is `2 / n` for ReLU (He et al., 2015, equation 10), and by the same argument keeps the variance from layer to
    layer for any other activation. `"default"` leaves what torch drew.

    Args:
        module: Changed in place.
        init: Name of the scheme.
        activation: What the outputs of the layers go through.

    Raises:
        UsageError: When there is no scheme of that name.
    """
    if init not in get_args(Init):
        known = get_args(Init)
        raise UsageError(f"init={init} is none of {', '.join(known)}" + did_you_mean(str(init), known))
    if init == "default":
        return
    gain = _gain(activation)
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=gain / layer.weight[0].numel() ** 0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_sizes(owner: str, **sizes: int | list[int]) -> None:
    """Refuse sizes below 1.

    Raises:
        UsageError: When one is.
    """
    for name, size in sizes.items():
        if min(size if isinstance(size, list) else [size], default=1) < 1:
            raise UsageError(
                f"{owner} was given {name}={size}: {'each' if isinstance(size, list) else 'it'} is at least 1"
            )


def check_dropout(owner: str, dropout: float) -> None:
    """Refuse what is no probability below 1.

    Raises:
        UsageError: When it is not in [0, 1).
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"{owner} was given dropout={dropout}: it is a probability in [0, 1)")


@torch.no_grad()
def _gain(activation: type[nn.Module]) -> float:
    """Return `1 / sqrt(E[activation(z)^2])` for a standard normal `z`, by a sum over a grid."""
    z = torch.linspace(-8, 8, 4001)
    density = torch.exp(-z.square() / 2)
    return float((density.sum() / (density * activation()(z).square()).sum()).sqrt())
