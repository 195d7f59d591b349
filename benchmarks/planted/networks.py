"""Networks with a fault, as wrappers of sound ones.

Shapes: `B` batch; `...` one sample or output.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Ending = Literal["softmax", "sigmoid", "relu", "tanh", "softplus"]
_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


class Faulty(nn.Module):
    """A network with one fault; the arguments say which. Without them it is the network.

    Args:
        network: The sound network.
        ending: Activation after the last layer. A small number is added, as people do against `log(0)`.
        factor: Factor of the outputs.
        constant: Value of every weight and bias at the start.
        scale: Factor of the weights at the start.
        bias: Value of the biases of hidden layers at the start.
        freeze: Beginnings of the names of parameters that are not trained.
        detach: Name of the part whose outputs pass no gradient back.
        linear: Whether activations between layers are left out.
        without_norm: Whether normalisation layers are left out.
        norm_mode: `"eval"`: batch normalisation never uses the statistics of a batch. `"train"`: it always does, also
            in evaluation. `"stale"`: its running statistics hardly follow.
    """

    def __init__(
        self,
        network: nn.Module,
        ending: Ending | None = None,
        factor: float = 1.0,
        constant: float | None = None,
        scale: float = 1.0,
        bias: float | None = None,
        freeze: list[str] | None = None,
        detach: str | None = None,
        linear: bool = False,
        without_norm: bool = False,
        norm_mode: Literal["eval", "train", "stale"] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.ending = ending
        self.factor = factor
        self.norm_mode = norm_mode
        left_out: tuple[type[nn.Module], ...] = _ACTIVATIONS if linear else ()
        left_out += (_BatchNorm, nn.LayerNorm) if without_norm else ()
        for part in [*network.modules()]:
            for name, child in [*part.named_children()]:
                if isinstance(child, left_out):
                    setattr(part, name, nn.Identity())
                elif isinstance(child, _BatchNorm) and norm_mode == "stale":
                    child.momentum = 1e-4
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if constant is not None:
                    parameter.fill_(constant)
                if bias is not None and name.endswith("bias") and not name.startswith("output"):
                    parameter.fill_(bias)
                if parameter.ndim > 1:
                    parameter.mul_(scale)
                if name.startswith(tuple(freeze or ())):
                    parameter.requires_grad_(False)
        if detach is not None:
            network.get_submodule(detach).register_forward_hook(_detach)

    def train(self, mode: bool = True) -> "Faulty":
        """Set the mode of all parts, except of batch normalisation that stays in one."""
        super().train(mode)
        if self.norm_mode in ("eval", "train"):
            for part in self.modules():
                if isinstance(part, _BatchNorm):
                    part.train(self.norm_mode == "train")
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs `(B, ...)`."""
        outputs: Tensor = self.network(inputs)
        if self.factor != 1:
            outputs = outputs * self.factor
        if self.ending is None:
            return outputs
        if self.ending == "softmax":
            return outputs.softmax(-1) + 1e-7
        return getattr(torch.nn.functional, self.ending)(outputs) + 1e-7


def _detach(module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    return outputs.detach()


class Branches(nn.Module):
    """Two perceptrons beside each other, whose features are joined before the last layer.

    Args:
        in_features: Values of a sample.
        width: Hidden units of each branch.
        out_features: Number of outputs.
        detached: Whether the first branch passes no gradient back.
    """

    def __init__(self, in_features: int, width: int, out_features: int, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.first = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(in_features, 2), nn.ReLU())
        self.output = nn.Linear(width + 2, out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs `(B, out_features)` of inputs `(B, ...)`."""
        inputs = inputs.flatten(1)
        first = self.first(inputs)
        return self.output(torch.cat([first.detach() if self.detached else first, self.second(inputs)], 1))
