"""Residual networks for small images (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2).

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from firstlight.errors import UsageError, check_range
from firstlight.networks.layers import ConvBlock, Layers, initialise


class ResNet(Layers):
    """The CIFAR-10 residual network of the paper, with its initialisation (He et al., 2015).

    The network is a `ConvBlock`, three stages of residual blocks, global average pooling and one linear layer. A
    residual block has two convolutions. The stages have `width`, `2 * width` and `4 * width` channels; the second and
    the third halve height and width. There the shortcut is option A of the paper, its choice for CIFAR-10: it takes
    every other pixel and pads the new channels with zeros, without parameters.

    Inputs are `(B, in_channels, H, W)` of any size; outputs are `(B, out_features)`, without an activation.

    Args:
        in_channels: Channels of the images: 1 for grey, 3 for colour.
        out_features: Number of outputs.
        depth: Number of layers with weights, `6 * n + 2` for `n` blocks per stage, at least 8.
        width: Channels of the first stage.

    Raises:
        UsageError: If a number is below 1 or the depth is not one of 8, 14, 20, ...
    """

    def __init__(self, in_channels: int, out_features: int, depth: int = 20, width: int = 16) -> None:
        name = type(self).__name__
        check_range(name, "[1, inf)", in_channels=in_channels, out_features=out_features, width=width)
        if depth < 8 or depth % 6 != 2:
            raise UsageError(f"{name} was given depth={depth}: it must be 6 * n + 2, for example 8, 14, 20 or 32")
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBlock(in_channels, width))
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            blocks = []
            for _ in range(depth // 6):
                blocks.append(_ResidualBlock(inputs, outputs))
                inputs = outputs
            layers[f"stage{stage}"] = nn.Sequential(*blocks)
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["output"] = nn.Linear(inputs, out_features)
        super().__init__(layers)
        initialise(self, "kaiming", nn.ReLU)


class _ResidualBlock(nn.Module):
    """Two `ConvBlock`s and a shortcut, added before the last ReLU; the stride is 2 where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.new_channels = out_channels - in_channels
        self.first = ConvBlock(in_channels, out_channels, self.stride)
        self.second = ConvBlock(out_channels, out_channels, activation=nn.Identity)

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return relu(shortcut + self.second(self.first(inputs)))
