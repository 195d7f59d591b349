"""What the layers of a network do with one batch: shapes, parameters, memory, and units that are dead or saturated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_BOUNDED = {nn.Sigmoid: (0.0, 1.0), nn.Tanh: (-1.0, 1.0), nn.Softsign: (-1.0, 1.0)}
_NEAR = 0.01
"""Share of its range in which the output of a bounded activation is saturated."""


@dataclass
class Layer:
    """A layer that was called in the forward pass.

    Args:
        name: Its path in the module.
        kind: Name of its class.
        shape: Shape of its first output, with the batch first; empty if that is not a tensor.
        parameters: Its own parameters, without those of its children and of earlier layers.
        nbytes: Bytes of its output.
        dead: Share of the units of a ReLU that are 0 for all samples; None for other layers.
        saturated: Share of the values of a bounded activation that are within 1 % of a bound; None for other layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    dead: float | None = None
    saturated: float | None = None


@dataclass
class Pass:
    """A forward pass: the layers in the order of their calls, and the bytes that autograd keeps for the gradient."""

    layers: list[Layer] = field(default_factory=list)
    kept_bytes: int = 0
    called: set[str] = field(default_factory=set)

    def owner_was_called(self, parameter: str) -> bool:
        """Return whether the module that holds a parameter was called, as the outermost one always is."""
        owner = parameter.rpartition(".")[0]
        return not owner or owner in self.called


@contextmanager
def watched(module: nn.Module) -> Iterator[Pass]:
    """Watch the forward pass in this context. Layers are modules without children, or with parameters of their own."""
    seen, counted, storages = Pass(), set[int](), set[int]()
    parameters = {each.untyped_storage().data_ptr() for each in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages | parameters:
                storages.add(storage.data_ptr())
                seen.kept_bytes += storage.nbytes()
        return tensor

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if name in seen.called:
                return
            seen.called.add(name)
            own = [each for each in layer.parameters(recurse=False) if id(each) not in counted]
            counted.update(map(id, own))
            if own or next(layer.children(), None) is None:
                seen.layers.append(_describe(name, layer, outputs, sum(each.numel() for each in own)))

        return layer.register_forward_hook(hook)

    hooks = [watch(name, layer) for name, layer in module.named_modules() if name]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _describe(name: str, layer: nn.Module, outputs: Any, parameters: int) -> Layer:
    first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    if not isinstance(first, Tensor):
        return Layer(name, type(layer).__name__, (), parameters, 0)
    found = Layer(name, type(layer).__name__, tuple(first.shape), parameters, first.nbytes)
    with torch.no_grad():
        if isinstance(layer, _RECTIFIERS) and first.ndim > 1 and len(first) > 1:
            found.dead = _dead(first)
        elif (bounds := _BOUNDED.get(type(layer))) is not None:
            low, high = bounds
            near = _NEAR * (high - low)
            found.saturated = float(((first < low + near) | (first > high - near)).double().mean())
    return found


def _dead(outputs: Tensor) -> float:
    """Return the share of units of outputs `(B, C)`, `(B, C, H, W)`, `(B, T, C)` or `(B, C, T)` that are always 0."""
    axes = {3: (1, 2), 4: (1,)}.get(outputs.ndim, (outputs.ndim - 1,))  # Nothing tells tokens from a Conv1d.
    return max(float((outputs.movedim(axis, 0).flatten(1) == 0).all(1).double().mean()) for axis in axes)


def table(layers: list[Layer], rows: int = 40) -> list[str]:
    """Return lines with layer, output shape, parameters, their share and the bytes of the output.

    >>> for line in table([Layer("output", "Linear", (32, 10), 650, 1280)]):
    ...     print(line)
    layer   kind    output   parameters  share  output bytes
    output  Linear  32 x 10         650  100 %         1,280
    """
    total = sum(each.parameters for each in layers) or 1
    cells = [("layer", "kind", "output", "parameters", "share", "output bytes")]
    for each in layers[:rows]:
        shape, share = " x ".join(map(str, each.shape)), f"{100 * each.parameters / total:.0f} %"
        cells.append((each.name, each.kind, shape, f"{each.parameters:,}", share, f"{each.nbytes:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join([*left, *right]))
    more = len(layers) - rows
    return [*lines, f"{more:,} more layers"] if more > 0 else lines
