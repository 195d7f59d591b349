"""Layers, classes and functions that training replaces, which no checkpoint can hold: they are compared by name."""

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from torch.nn.modules.lazy import LazyModuleMixin

from firstlight.callbacks.attributes import own_attributes
from firstlight.callbacks.state import CODE, name_of

_PATCHES = ("lightning.", "firstlight.")
"""Beginnings of the names of functions that are set for a while, for example `log` of callbacks."""

_MISSING = "missing or an object"


def names_of_code(objects: Mapping[str, Any], module: LightningModule) -> dict[str, str]:
    """Return by path the classes of layers and objects, and the functions and classes that attributes hold.

    Args:
        objects: What `attributes.holders` returns.
        module: The module that is trained.
    """
    names = {path: name_of(_later(each)) for path, each in _layers(module).items()}
    for key, each in objects.items():
        if key not in names:
            names[f"the class of {key}"] = name_of(each)
        names |= {f"{key}.{name}": name_of(value) for name, value in _functions(each)}
    return names


def replaced(now: Mapping[str, str], initial: Mapping[str, str]) -> dict[str, str]:
    """Return the names that training changed from `initial`. Objects that it made or removed are compared elsewhere."""
    changed = {path: now.get(path, _MISSING) for path in {**initial, **now} if now.get(path) != initial.get(path)}
    return {
        path: name
        for path, name in changed.items()
        if not path.startswith("the class of ") or (path in now and path in initial)
    }


def find_replaced(saved: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return which layer, class or function training replaced, and is another one now, or None."""
    for path, name in saved.items():
        if (found := now.get(path, _MISSING)) != name:
            return f"{path} became {name} during training, and is {found} at the start"
    return None


def _layers(module: LightningModule) -> dict[str, Any]:
    return {f"module {name}".strip(): each for name, each in module.named_modules()}


def _functions(owner: Any) -> Iterator[tuple[str, Any]]:
    for name, value in own_attributes(owner).items():
        # Strategies set `forward` to what it is.
        is_own = isinstance(value, MethodType) and value.__func__ is getattr(type(owner), name, None)
        if isinstance(value, CODE) and not is_own and not name_of(value).startswith(_PATCHES):
            yield name, value


def _later(layer: Any) -> Any:
    """Return the class that a lazy layer gets with its first batch, or the layer."""
    return (layer.cls_to_become if isinstance(layer, LazyModuleMixin) else None) or layer
