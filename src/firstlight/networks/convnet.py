"""Convolutional networks for images.

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from firstlight.errors import UsageError, check_range
from firstlight.networks.layers import ConvBlock, Layers


class ConvNet(Layers):
    """Stages of `ConvBlock`s with 2x2 max pooling between them, global average pooling, and one linear layer.

    Inputs are `(B, in_channels, H, W)`. `H` and `W` must be at least `2 ** (len(widths) - 1)`, because each pooling
    halves them. Outputs are `(B, out_features)`, without an activation.

    Args:
        in_channels: Channels of the images: 1 for grey, 3 for colour.
        widths: Channels of each stage, at least one stage.
        out_features: Number of outputs.
        blocks: Number of `ConvBlock`s in each stage.
        dropout: Probability of dropping a feature before the linear layer, in [0, 1).

    Raises:
        UsageError: If there is no stage, a number is below 1 or the dropout is outside [0, 1).
    """

    def __init__(
        self, in_channels: int, widths: list[int], out_features: int, blocks: int = 1, dropout: float = 0.0
    ) -> None:
        name = type(self).__name__
        check_range(name, "[1, inf)", in_channels=in_channels, widths=widths, out_features=out_features, blocks=blocks)
        check_range(name, "[0, 1)", dropout=dropout)
        if not widths:
            raise UsageError(f"{name} was given widths=[]: it must have at least one stage")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (inputs, width) in enumerate(pairwise([in_channels, *widths])):
            if index:
                layers[f"pool{index}"] = nn.MaxPool2d(2)
            layers[f"stage{index}"] = nn.Sequential(
                *(ConvBlock(width if block else inputs, width) for block in range(blocks))
            )
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        layers["output"] = nn.Linear(widths[-1], out_features)
        super().__init__(layers)
