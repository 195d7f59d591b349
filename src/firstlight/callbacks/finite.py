"""Checks that tensors are finite."""

import cmath
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the plain tensors, and the DTensors of each device mesh: torch 2.13 refuses one call for all of them.

    >>> [len(group) for group in by_mesh([torch.ones(1), torch.ones(2)])]
    [2]
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def surely_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether the sums of all tensors are finite; if so, every number in them is. Waits for the device.

    On the CPU a sum is much faster than a check of each number. If a sum of finite numbers overflows, it is `False`.

    >>> surely_finite([torch.ones(2), torch.zeros(1)]), surely_finite([torch.tensor([1.0, float("nan")])])
    (True, False)
    """
    return cmath.isfinite(sum([tensor.sum().item() for tensor in tensors]))


def all_finite(value: Any) -> bool:
    """Return whether all numbers in a tensor, or in nested tuples, lists and dictionaries, are finite.

    >>> all_finite({"a": [torch.ones(2), "text"]}), all_finite((torch.tensor(float("nan")),))
    (True, False)
    """
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def not_finite(module: nn.Module) -> str | None:
    """Return the name of the first parameter or running statistic of a normalisation that is not finite, or `None`.

    Other buffers may hold infinity, for example a mask. Waits for the device once.
    """
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for path, part in module.named_modules():
        if isinstance(part, _NormBase):
            named |= {f"{path}.{name}": buffer for name, buffer in part.named_buffers(recurse=False)}
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in named.values()]
    if all(tensor.is_cpu for tensor in local) and surely_finite(local):
        return None
    finite = torch.stack([tensor.isfinite().all().to(local[0].device) for tensor in local]).tolist()
    return next((name for name, is_finite in zip(named, finite, strict=True) if not is_finite), None)
