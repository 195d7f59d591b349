"""Residual networks for small images (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2).

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from firstlight.errors import UsageError
from firstlight.networks.layers import ConvBlock, Layers, check_sizes, initialise

__all__ = ["ResNet"]


class ResNet(Layers):
    """The CIFAR-10 residual network of the paper, with its initialisation (He et al., 2015).

    A `ConvBlock`, then three stages of residual blocks of two convolutions each, `width`, `2 * width` and `4 * width`
    channels wide, the second and third on half the pixels, then the mean over all pixels and one linear layer. Where
    the width changes, the shortcut takes every other pixel and has zeros in the new channels: option A of the paper,
    which has no parameters and is what it used on CIFAR-10.

    Inputs are `(B, in_channels, H, W)` of any size; outputs are `(B, out_features)`, without an activation.

    Args:
        in_channels: Channels of the images: 1 for grey, 3 for colour.
        out_features: Number of outputs.
        depth: Layers with weights, `6 * n + 2` for `n` blocks a stage, at least 8.
        width: Channels of the first stage.

    Raises:
        UsageError: When a number is below 1 or the depth is none of 8, 14, 20, ...
    """

    def __init__(self, in_channels: int, out_features: int, depth: int = 20, width: int = 16) -> None:
        check_sizes(type(self).__name__, in_channels=in_channels, out_features=out_features, width=width)
        if depth < 8 or depth % 6 != 2:
            raise UsageError(f"{type(self).__name__} was given depth={depth}: it is 6 * n + 2, so 8, 14, 20, 32, ...")
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
    """Two `ConvBlock`s with the shortcut added before the last ReLU, on half the pixels where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.new_channels = out_channels - in_channels
        self.first = ConvBlock(in_channels, out_channels, self.stride)
        self.second = ConvBlock(out_channels, out_channels, activation=nn.Identity)

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return relu(shortcut + self.second(self.first(inputs)))
