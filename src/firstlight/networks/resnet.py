"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", 2016): for small images and ImageNet.

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from firstlight.errors import UsageError, check_range
from firstlight.networks.layers import ConvBlock, Layers, channels_last, check_choice, initialise


class ResNet(Layers):
    """The CIFAR-10 residual network of the paper (section 4.2), with its initialisation (He et al., 2015).

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


class ImageNetResNet(Layers):
    """The ImageNet residual network of the paper (section 4.1), of blocks with two convolutions.

    The network is a 7x7 convolution with stride 2, a 3x3 max pooling with stride 2, four stages of residual blocks
    with 64, 128, 256 and 512 channels, global average pooling and one linear layer. Every stage but the first halves
    height and width. There the shortcut is option B of the paper: a 1x1 convolution with batch normalisation.

    The parameters have torchvision's names, so `load_state_dict` takes the weights of its `resnet18` and `resnet34`.

    Inputs are `(B, in_channels, H, W)`, best at least 64 pixels high and wide, because stages work at 1/4 to 1/32 of
    that; outputs are `(B, out_features)`, without an activation.

    Args:
        in_channels: Channels of the images: 1 for grey, 3 for colour.
        out_features: Number of outputs.
        depth: Number of layers with weights, 18 or 34.

    Raises:
        UsageError: If a number is below 1 or the depth is another one.
    """

    def __init__(self, in_channels: int, out_features: int, depth: int = 18) -> None:
        name = type(self).__name__
        check_range(name, "[1, inf)", in_channels=in_channels, out_features=out_features)
        check_choice(name, list(_BLOCKS), depth=depth)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=_convolution(in_channels, 64, kernel=7, stride=2),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        inputs = 64
        for stage, blocks in enumerate(_BLOCKS[depth]):
            outputs = 64 * 2**stage
            sizes = [(inputs, outputs, 1 if stage == 0 else 2)] + (blocks - 1) * [(outputs, outputs, 1)]
            layers[f"layer{stage + 1}"] = nn.Sequential(*[_BasicBlock(*each) for each in sizes])
            inputs = outputs
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(inputs, out_features)
        super().__init__(layers)
        initialise(self, "kaiming", nn.ReLU)


_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Blocks of each stage by depth, from Table 1 of the paper."""


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut that is added before the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, kernel=3, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _convolution(out_channels, out_channels, kernel=3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()
        if in_channels != out_channels:
            projection = _convolution(in_channels, out_channels, kernel=1, stride=stride)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = relu(self.bn1(self.conv1(inputs)))
        return relu(self.bn2(self.conv2(hidden)) + self.downsample(inputs))


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias whose outputs have `1 / stride` of the height and width, rounded up."""
    return channels_last(nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False))
