"""Multi-layer perceptrons (Rumelhart, Hinton and Williams, 1986).

Shapes: `B` batch, `F` features.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from firstlight.errors import UsageError, check_range
from firstlight.networks.layers import Init, Layers, check_choice, initialise


class MLP(Layers):
    """Linear layers with an activation after each but the last.

    A hidden layer consists of linear, normalisation, activation and dropout, in this order. Inputs of any shape
    `(B, ...)` are flattened to `(B, in_features)`. Outputs are `(B, out_features)`, without an activation.

    Args:
        in_features: Number of input features, after flattening.
        hidden: Widths of the hidden layers; an empty list gives a linear model.
        out_features: Number of outputs.
        activation: Class of the activation, for example `torch.nn.ReLU` or `torch.nn.GELU`.
        dropout: Probability of dropping a hidden unit, in [0, 1).
        norm: `"batch"` (Ioffe and Szegedy, 2015), `"layer"` (Ba et al., 2016) or None.
        residual: Whether to add the input of a hidden layer to its output, after the activation, where both have the
            same width. The identity path passes the gradient back unchanged (He et al., "Identity Mappings in Deep
            Residual Networks", 2016).
        init: `"kaiming"` (He et al., 2015), `"xavier"` (Glorot and Bengio, 2010) or `"default"`, which is torch's. See
            `firstlight.networks.layers.initialise`.

    Raises:
        UsageError: If an argument is out of range, or if `residual` is set and no hidden layer is as wide as its input.
    """

    def __init__(
        self,
        in_features: int,
        hidden: list[int],
        out_features: int,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
        residual: bool = False,
        init: Init = "default",
    ) -> None:
        name = type(self).__name__
        check_range(name, "[1, inf)", in_features=in_features, hidden=hidden, out_features=out_features)
        check_range(name, "[0, 1)", dropout=dropout)
        check_choice(name, ("batch", "layer", None), norm=norm)
        widths = [in_features, *hidden]
        if residual and not any(inputs == outputs for inputs, outputs in pairwise(widths)):
            raise UsageError(f"{name} was given residual=True and widths {widths}: two adjacent widths must be equal")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            # Batch normalisation subtracts the mean, so a bias before it has no effect.
            layer: list[nn.Module] = [nn.Linear(inputs, outputs, bias=norm != "batch")]
            if norm is not None:
                layer.append(nn.BatchNorm1d(outputs) if norm == "batch" else nn.LayerNorm(outputs))
            layer.append(activation())
            if dropout:
                layer.append(nn.Dropout(dropout))
            layers[f"hidden{index}"] = (_Residual if residual and inputs == outputs else nn.Sequential)(*layer)
        layers["output"] = nn.Linear(widths[-1], out_features)
        super().__init__(layers)
        initialise(self, init, activation)


class SimpleNet(MLP):
    """The first network of the fundamentals: 784-256-128-10 with ReLU, ten logits for a 28x28 image."""

    def __init__(self) -> None:
        super().__init__(784, [256, 128], 10)


class RegularizedNet(MLP):
    """`SimpleNet` with dropout 0.3 after each hidden layer."""

    def __init__(self) -> None:
        super().__init__(784, [256, 128], 10, dropout=0.3)


class _Residual(nn.Sequential):
    """A sequence of layers plus a shortcut: the input is added to the output."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        return inputs + outputs
