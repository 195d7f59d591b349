"""What a network is made of, and whether a pass through it has side effects."""

from typing import Any

from torch import nn
from torch.nn.modules.activation import MultiheadAttention
from torch.nn.modules.dropout import _DropoutNd

from firstlight.callbacks.activations import NORMS, layers, main_weight
from firstlight.tasks import Task


def network_of(module: nn.Module) -> nn.Module | None:
    """Return the network of a task, or the only child with parameters of another module."""
    parts = [each for each in module.children() if next(each.parameters(), None) is not None]
    has_own = next(module.parameters(recurse=False), None) is not None
    network = module.network if isinstance(module, Task) else parts[0] if len(parts) == 1 and not has_own else None
    return network if isinstance(network, nn.Module) else None


def of_network(module: nn.Module) -> dict[str, Any]:
    """Return layers, dropout, normalisation and the weights of a network before training."""
    measured = layers(module)
    spread, constant = {}, []
    for name, layer in measured.items():
        weight = main_weight(layer)
        if weight is None or not weight.is_floating_point() or weight.numel() < 2:
            continue
        values = weight.detach().float()
        spread[name] = float(values.std())
        # Normalisation starts at one on purpose.
        if not isinstance(layer, NORMS) and weight.ndim > 1 and bool((values == values.flatten()[0]).all()):
            constant.append(name)
    modules = list(module.modules())
    return {
        "layers": [
            {
                "name": name,
                "kind": type(layer).__name__,
                "parameters": sum(each.numel() for each in _own(layer)),
                "trainable": any(each.requires_grad for each in _own(layer)),
            }
            for name, layer in layers(module, 1000).items()
        ],
        "measured_layers": list(measured),
        "activation_modules": sorted(
            {
                type(each).__name__
                for each in modules
                if type(each).__module__ == "torch.nn.modules.activation" and not isinstance(each, MultiheadAttention)
            }
        ),
        "dropout": [each.p for each in modules if isinstance(each, _DropoutNd)],
        "normalisation": sorted({type(each).__name__ for each in modules if isinstance(each, NORMS)}),
        "weights_std": spread,
        "constant_weights": constant,
    }


def with_gradients(found: list[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Return the layers of `of_network` with whether each got a gradient."""
    every = dict(module.named_modules())
    return [
        {**each, "has_gradient": any(p.grad is not None for p in _own(every[each["name"]]))}
        for each in found
        if each["name"] in every
    ]


def evaluating(module: nn.Module) -> list[str]:
    """Return the names of modules in evaluation mode, without those inside of others that are, `""` for the whole.

    >>> network = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.ReLU()).eval())
    >>> evaluating(network)
    ['1']
    """
    found: list[str] = []
    for name, each in module.named_modules():
        is_inside = any(outer == "" or name == outer or name.startswith(f"{outer}.") for outer in found)
        if not each.training and not is_inside and not type(each).__module__.startswith("torchmetrics"):
            found.append(name)
    return found


def synchronises(module: nn.Module) -> bool:
    """Return whether a forward pass in training mode waits for other processes."""
    return any(isinstance(each, nn.SyncBatchNorm) for each in module.modules())


def is_compiled(module: nn.Module) -> bool:
    """Return whether a part of a module is compiled, so that a hook or another batch would compile it again.

    >>> import torch
    >>> network = nn.Sequential(nn.Linear(1, 1))
    >>> is_compiled(network), is_compiled(nn.Sequential(torch.compile(network)))
    (False, True)
    """
    modules = list(module.modules())
    is_called = any(each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in modules)
    return is_called or getattr(module, "_compiler_ctx", None) is not None


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return [
        each for each in layer.parameters(recurse=False) if not isinstance(each, nn.parameter.UninitializedParameter)
    ]
