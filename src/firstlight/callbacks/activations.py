"""Which layers of a network are measured, and what is measured at their inputs, outputs, weights and gradients.

Shapes: `B` batch, `F` features of a layer, `...` positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

from firstlight.callbacks.gradient_norm import dense

MOST = 40
"""Layers that are measured at most."""

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_SAMPLE = 2**16
"""Tensors with more numbers are thinned, to at least 16 samples."""

_NAMES = {
    "Relu": "ReLU", "Threshold": "ReLU", "LeakyRelu": "LeakyReLU", "Sigmoid": "Sigmoid", "Tanh": "Tanh",
    "Gelu": "GELU", "Silu": "SiLU", "Elu": "ELU", "Softplus": "Softplus", "Hardtanh": "Hardtanh", "Mish": "Mish",
    "Hardsigmoid": "Hardsigmoid", "Hardswish": "Hardswish", "Prelu": "PReLU", "PreluKernel": "PReLU",
    "Softmax": "Softmax", "LogSoftmax": "LogSoftmax",
}  # fmt: skip
"""Names of activations by the operation that autograd records."""

_VIEWS = {"View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias"}
_ENDS = {"Tanh": -1.0, "Sigmoid": 0.0, "Hardsigmoid": 0.0}
"""The lower end of activations with two ends; the upper one is 1."""


def layers(module: nn.Module, most: int = MOST) -> dict[str, nn.Module]:
    """Return by dotted name the modules that have parameters of their own, at most so many, evenly chosen.

    Averaged copies of modules are left out: they are not trained.

    >>> list(layers(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))))
    ['0', '2']
    """
    copies = {part for each in module.modules() if isinstance(each, AveragedModel) for part in each.modules()}
    found = [
        (name, each)
        for name, each in module.named_modules()
        if next(each.parameters(recurse=False), None) is not None and not isinstance(each, Metric) and name
        if each not in copies
    ]
    if len(found) > most:
        found = [found[round(index * (len(found) - 1) / (most - 1))] for index in range(most)]
    return dict(found)


def main_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return the weight of a layer: the largest one of its own parameters."""
    own = [each for each in layer.parameters(recurse=False) if not isinstance(each, nn.UninitializedParameter)]
    return max(own, key=lambda each: each.numel(), default=None)


def activation_before(inputs: Tensor) -> tuple[str, Tensor]:
    """Return the activation that made the inputs of a layer, and its values before dropout; `""` if it is unknown.

    >>> weight = torch.ones(2, 4, requires_grad=True)
    >>> activation_before(nn.functional.dropout(weight.relu(), 0.5).flatten(1))
    ('ReLU', tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.]]))
    """
    node: Any = inputs.grad_fn
    for _ in range(6):
        if node is None:
            break
        operation = node.name().rstrip("0123456789").removesuffix("Backward")
        if operation in _NAMES:
            values = inputs
            if node is not inputs.grad_fn:
                try:
                    values = node._saved_result
                except (AttributeError, RuntimeError):  # It saves its inputs, or they changed in place.
                    values = inputs
            is_same = values.numel() == inputs.numel()
            return _NAMES[operation], values.detach().reshape(inputs.shape) if is_same else inputs.detach()
        if operation in _VIEWS or operation == "NativeDropout" or (operation == "Mul" and _is_mask(node)):
            node = node.next_functions[0][0]
        else:
            break
    return "", inputs.detach()


def _is_mask(node: Any) -> bool:
    """Return whether a product is with something that needs no gradient, as dropout's mask on the CPU."""
    return len(node.next_functions) > 1 and node.next_functions[1][0] is None


@torch.no_grad()
def measure_layer(layer: nn.Module, inputs: Any, outputs: Any) -> tuple[str, dict[str, Tensor]]:
    """Return the activation before a layer, and numbers `()` on its device.

    `zeros`: share of exact zeros in the layer's inputs; `dead`: share of their features that are zero in all samples;
    `saturated`: share within 0.01 of the ends of a sigmoid or tanh. They are measured before dropout, and not for
    data, tokens, and normalisation layers. `std`: standard deviation of the outputs over samples, mean over features.

    Args:
        layer: The layer.
        inputs: The first argument of its call.
        outputs: What it returned.
    """
    found, activation = {}, ""
    is_measured = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.requires_grad
    if is_measured and inputs.numel() and inputs.ndim > 1 and not isinstance(layer, NORMS):
        activation, values = activation_before(inputs)
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else values.ndim - 1
        values = _sample(values)
        alive = values.count_nonzero([each for each in range(values.ndim) if each != axis])
        found["zeros"] = 1 - alive.sum() / values.numel()
        found["dead"] = (alive == 0).float().mean()
        if activation in _ENDS:
            low = _ENDS[activation]
            found["saturated"] = ((values < low + 0.01) | (values > 0.99)).float().mean()
    if isinstance(outputs, tuple) and outputs:
        outputs = outputs[0]
    if isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.numel() and outputs.ndim > 1:
        values = _sample(outputs.detach()).float()
        found["std"] = (values - values.mean(0)).square_().mean(0).sqrt_().mean()
    return activation, found


def _sample(values: Tensor) -> Tensor:
    """Return every n-th sample of a large tensor."""
    every = values.numel() // _SAMPLE
    return values[:: min(every, max(len(values) // 16, 1))] if every > 1 else values


class Update:
    """The weights of layers before a step of an optimiser, to compare them afterwards.

    Args:
        weights: By layer; a sample of a large weight is kept.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._before = {name: _entries(weight).clone() for name, weight in weights.items()}

    def ratios(self) -> dict[str, Tensor]:
        """Return for each layer the norm `()` of the change of its weight, divided by the norm before the step."""
        if not self._before:
            return {}
        before = list(self._before.values())
        changes = torch._foreach_sub([_entries(self._weights[name]) for name in self._before], before)
        norms = zip(torch._foreach_norm(changes), torch._foreach_norm(before), strict=True)
        return {name: change / norm for name, (change, norm) in zip(self._before, norms, strict=True)}


def gradient_norms(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the 2-norm `()` of the gradient of each weight that has one."""
    found = {name: dense(weight.grad) for name, weight in weights.items() if weight.grad is not None}
    return dict(zip(found, torch._foreach_norm(list(found.values())), strict=True)) if found else {}


def _entries(weight: Tensor) -> Tensor:
    """Return all entries of a weight, or every n-th of a large one, `(N,)`."""
    values = weight.detach()
    flat = values.reshape(-1) if values.is_contiguous() else values.permute(_memory_order(values)).reshape(-1)
    return flat[:: flat.numel() // _SAMPLE] if flat.numel() > 2 * _SAMPLE else flat


def _memory_order(values: Tensor) -> list[int]:
    """Return the axes in the order in which memory has them, so that a flat view needs no copy."""
    strides = values.stride()
    return sorted(range(values.ndim), key=lambda axis: strides[axis], reverse=True)


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return numbers `()` as floats, waiting for the device once."""
    if not values:
        return {}
    tensors: Sequence[Tensor] = list(values.values())
    device = tensors[0].device
    stacked = torch.stack([each.to(device, torch.float32) for each in tensors])
    return dict(zip(values, stacked.tolist(), strict=True))
