"""Multi-layer perceptrons (Rumelhart, Hinton and Williams, 1986).

Shapes: `B` batch, `F` features.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

from torch import nn

from firstlight.errors import UsageError

__all__ = ["MLP", "RegularizedNet", "SimpleNet"]


class MLP(nn.Sequential):
    """Linear layers with an activation after each but the last.

    A hidden layer is linear, normalisation, activation, dropout, in this order. Inputs of any shape `(B, ...)` are
    flattened to `(B, in_features)`; outputs are `(B, out_features)`, without an activation.

    Args:
        in_features: Number of input features, after flattening.
        hidden: Widths of the hidden layers; an empty list gives a linear model.
        out_features: Number of outputs.
        activation: Class of the activation, for example `torch.nn.ReLU` or `torch.nn.GELU`.
        dropout: Probability that a hidden unit is dropped, in [0, 1).
        norm: `"batch"` (Ioffe and Szegedy, 2015), `"layer"` (Ba et al., 2016) or none.

    Raises:
        UsageError: When a width is below 1 or the dropout is outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        hidden: list[int],
        out_features: int,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
    ) -> None:
        widths = [in_features, *hidden]
        if min(widths) < 1 or out_features < 1:
            raise UsageError(f"MLP was given the widths {[*widths, out_features]}: each is at least 1")
        if not 0 <= dropout < 1:
            raise UsageError(f"MLP was given dropout={dropout}: it is a probability in [0, 1)")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            # Batch normalisation takes the mean away, so a bias before it would do nothing.
            layer: list[nn.Module] = [nn.Linear(inputs, outputs, bias=norm != "batch")]
            if norm is not None:
                layer.append(nn.BatchNorm1d(outputs) if norm == "batch" else nn.LayerNorm(outputs))
            layer.append(activation())
            if dropout:
                layer.append(nn.Dropout(dropout))
            layers[f"hidden{index}"] = nn.Sequential(*layer)
        layers["output"] = nn.Linear(widths[-1], out_features)
        super().__init__(layers)


class SimpleNet(MLP):
    """The net of the fundamentals: 784-256-128-10 with ReLU, ten logits for a 28x28 image."""

    def __init__(self) -> None:
        super().__init__(784, [256, 128], 10)


class RegularizedNet(MLP):
    """`SimpleNet` with dropout 0.3 after each hidden layer."""

    def __init__(self) -> None:
        super().__init__(784, [256, 128], 10, dropout=0.3)
