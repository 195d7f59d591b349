"""Plain values that a module, a data module or a callback of the user changes in a run, and no checkpoint holds."""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

__all__ = ["holders", "plain_values", "set_changed"]

_LIBRARIES = {"lightning", "torch", "torchmetrics", "firstlight"}
_LARGE = 1000


def holders(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return by name the user's callbacks, data module and modules, without those that save their state themselves."""
    all_holders: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside the class
        # Not its index in the list: a resumed run may have other callbacks.
        kind = f"{type(callback).__module__}.{type(callback).__qualname__}"
        all_holders[f"callback {kind} {counts[kind]}"] = callback
        counts[kind] += 1
    all_holders |= {f"module {name}": each for name, each in module.named_modules()}
    all_holders["data"] = getattr(trainer, "datamodule", None)
    hooks = ("state_dict", "on_save_checkpoint", "get_extra_state")
    return {
        name: each
        for name, each in all_holders.items()
        if not _is_library(type(each)) and all(_is_library(getattr(type(each), hook, None)) for hook in hooks)
    }


def plain_values(objects: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return copies of the attributes that are numbers, texts, small tensors, or small containers of these."""
    return {
        key: {
            name: deepcopy(value)
            for name, value in vars(each).items()
            if name not in _base_names() and not name.startswith("__") and _is_plain(value)
        }
        for key, each in objects.items()
    }


def set_changed(objects: Mapping[str, Any], initial: Any, saved: Any, fresh: Any) -> None:
    """Set the attributes that the saved run changed from `initial` to `saved`.

    An attribute that is another one in a `fresh` object than it was initially is configured otherwise, and stays.
    """
    for key, each in objects.items():
        before, after, now = (values.get(key, {}) for values in (initial, saved, fresh))
        for name, value in after.items():
            is_changed = name not in before or not _same(before[name], value)
            is_configured = (name in before) != (name in now) or (name in now and not _same(before[name], now[name]))
            if is_changed and not is_configured:
                current = getattr(each, name, None)
                device = current.device if isinstance(current, Tensor) else None
                setattr(each, name, value.to(device) if isinstance(value, Tensor) else deepcopy(value))


@cache
def _base_names() -> frozenset[str]:
    return frozenset([*vars(LightningModule()), *vars(LightningDataModule()), *vars(nn.Module())])


def _is_library(thing: Any) -> bool:
    module = getattr(thing, "__module__", None)
    return thing in (None, type(None)) or (module or "").partition(".")[0] in _LIBRARIES


def _is_plain(value: Any) -> bool:
    if type(value) is Tensor:
        return value.numel() <= _LARGE and not value.requires_grad
    if type(value) in (list, tuple, dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return len(inner) <= _LARGE and all(_is_plain(each) for each in inner)
    return type(value) in (int, float, bool, str, type(None))


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or one != one)
