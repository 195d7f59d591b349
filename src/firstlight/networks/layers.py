"""Layers, initialisation and checks that several networks share.

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from firstlight.errors import UsageError, check_range, did_you_mean

Init = Literal["default", "kaiming", "xavier"]


class Layers(nn.Sequential):
    """A sequence of layers whose slices, for example `network[:-1]`, are plain `nn.Sequential`s.

    `nn.Sequential` builds a slice with `type(self)(...)`, but subclasses take sizes and not layers.
    """

    def __getitem__(self, index: int | slice) -> Any:
        """Return one layer, or a slice of layers as a network."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class ConvBlock(Layers):
    """Convolution, batch normalisation, activation: `(B, in_channels, H, W)` to `(B, out_channels, H', W')`.

    The convolution is 3x3 with padding 1, so `H'` is `H / stride`, rounded up. It has no bias, because batch
    normalisation subtracts it (Ioffe and Szegedy, 2015, section 3.2).

    Args:
        in_channels: Channels of the inputs.
        out_channels: Channels of the outputs.
        stride: Stride of the convolution.
        activation: Class of the activation; `torch.nn.Identity` for none.

    Raises:
        UsageError: If a number is below 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
        check_range(type(self).__name__, "[1, inf)", **sizes)
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        norm = nn.BatchNorm2d(out_channels)
        super().__init__(OrderedDict(convolution=channels_last(convolution), norm=norm, activation=activation()))


def channels_last(convolution: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution with weights in channels-last order, which is faster on the CPU.

    `contiguous` does not change a weight with one input channel, so outputs of the first layer would be converted to
    channels-last in each step.
    """
    weight = convolution.weight.data
    convolution.weight.data = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)
    return convolution


def initialise(module: nn.Module, init: Init, activation: type[nn.Module]) -> None:
    """Initialise the weights of every linear layer and convolution in `module`, and set their biases to 0.

    Let a unit have `n` inputs and `m` outputs. `"xavier"` is uniform with variance `2 / (n + m)` (Glorot and Bengio,
    2010, equation 16). `"kaiming"` is normal with variance `1 / (n * E[activation(z)^2])` for a standard normal `z`.
    For ReLU that is `2 / n` (He et al., 2015, equation 10); for other activations the same argument keeps the
    variance from layer to layer. `"default"` keeps torch's initialisation.
    """
    check_choice(type(module).__name__, get_args(Init), init=init)
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


def check_choice(owner: str, choices: Sequence[object], **values: object) -> None:
    """Refuse a value that is not one of `choices`; `owner` is the class that was given the values, for the message."""
    for name, value in values.items():
        if value not in choices:
            known = [str(choice) for choice in choices]
            rule = f"it must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
            raise UsageError(f"{owner} was given {name}={value}: {rule}")


@torch.no_grad()
def _gain(activation: type[nn.Module]) -> float:
    """Return `1 / sqrt(E[activation(z)^2])` for a standard normal `z`, computed as a sum over a grid."""
    z = torch.linspace(-8, 8, 4001)
    density = torch.exp(-z.square() / 2)
    return float((density.sum() / (density * activation()(z).square()).sum()).sqrt())
