"""Attributes of the user's objects that change in a run, and that no checkpoint holds by itself."""

import ast
import copy
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from firstlight.callbacks.state import digest, has_state_dict, is_generator, slots

_LIBRARIES = {"lightning", "torch", "torchmetrics", "firstlight"}
_HOOKS = ("state_dict", "on_save_checkpoint", "get_extra_state")
_OPTIONS = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Attributes of a trainer that a callback may change."""
_SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, Counter, OrderedDict, defaultdict)}
_KINDS: dict[str, Any] = {**_SEQUENCES, **_MAPPINGS}
_LEAVES = ("tensor", "array", "state", "lost")
"""Kinds of saved values that may follow from the weights."""
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_PLAIN: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytearray: (bytes, bytearray),
    array: (lambda value: [value.typecode, value.tolist()], lambda saved: array(*saved)),
    range: (lambda value: [value.start, value.stop, value.step], lambda saved: range(*saved)),
    count: (lambda value: _count_state(value), lambda saved: count(*saved)),
    Decimal: (str, Decimal),
    Fraction: (str, Fraction),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    type(Path()): (str, Path),
    timedelta: (lambda value: [value.days, value.seconds, value.microseconds], lambda saved: timedelta(*saved)),
    torch.Size: (list, torch.Size),
    torch.dtype: (str, lambda saved: _DTYPES[saved]),
    torch.device: (str, torch.device),
}
"""How values of classes of Python and torch are saved and restored."""
_PLAIN_NAMES = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _PLAIN}
_COMPARED = (
    *(int, float, complex, str, bytes, np.ndarray, np.generic, Enum, partial, MappingProxyType, Iterator),
    *_KINDS.values(),
)
"""Classes whose values `digest` compares, also those of classes that extend them."""
_HOLDERS = {"types", "argparse", "collections", "queue"}
"""Modules of Python whose classes hold what the user puts in, for example `SimpleNamespace` and `UserDict`."""


class _Opaque(Exception):
    """A value of a class that cannot be saved as plain values."""


def holders(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return by name the objects whose attributes a checkpoint must hold.

    These are the trainer, and the user's callbacks, data module, modules and optimisers, without those that save their
    state themselves, and objects of the user's packages that these hold.
    """
    roots: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside the class
        # Not its index in the list: a resumed run may have other callbacks.
        kind = f"{type(callback).__module__}.{type(callback).__qualname__}"
        roots[f"callback {kind} {counts[kind]}"] = callback
        counts[kind] += 1
    roots["data"] = getattr(trainer, "datamodule", None)
    roots |= {f"optimiser {index}": each for index, each in enumerate(trainer.optimizers)}
    modules = {
        f"module {name}".strip(): each
        for name, each in module.named_modules()
        if not type(each).__module__.startswith("firstlight.metrics")
    }
    own = {name: each for name, each in (roots | modules).items() if not _restores_itself(each)}
    packages = {_package(type(each)) for each in own.values()} - _LIBRARIES
    layers = {
        name: each for name, each in modules.items() if isinstance(each, Metric) or _package(type(each)) == "torch"
    }
    found: dict[str, Any] = {"trainer": trainer}
    pending, seen = deque([*own.items(), *layers.items()]), set[int]()
    while pending:
        key, each = pending.popleft()
        if id(each) not in seen and len(seen) < 10_000:
            seen.add(id(each))
            found[key] = each
            pending += [item for item in _inner(key, each) if _package(type(item[1])) in packages | _HOLDERS]
    return found


def digests(objects: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return a text for the value of each attribute: two equal texts mean the same value."""
    return {
        key: {name: digest(value) for name, value in values.items()} for key, values in _all_attributes(objects).items()
    }


def changed_values(objects: Mapping[str, Any], initial: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, as plain values and tensors, the attributes that differ from their `initial` digests."""
    changed: dict[str, dict[str, Any]] = {}
    for key, values in _all_attributes(objects).items():
        before = initial.get(key, {})
        for name, value in values.items():
            if digest(value) != before.get(name):
                try:
                    changed.setdefault(key, {})[name] = _encode(value)
                except _Opaque as kind:
                    if isinstance(value, _COMPARED) or has_state_dict(value):
                        changed.setdefault(key, {})[name] = {"kind": "lost", "what": str(kind)}
    return changed


def find_lost(objects: Mapping[str, Any], initial: Any, saved: Any, fresh: Any) -> str | None:
    """Return what `set_changed` cannot restore, or None."""
    now = _all_attributes(objects)
    for key, name, value in _to_restore(initial, saved, fresh):
        if key not in now:
            if any(key.startswith(f"{each}.") for each in objects):  # Not a callback that was removed.
                return f"{key}.{name} changed during training, and its object does not exist at the start"
        elif (found := _find_lost(value, now[key].get(name))) is not None:
            return f"{key}.{name} changed during training, and {found}"
    return None


def set_changed(objects: Mapping[str, Any], initial: Any, saved: Any, fresh: Any) -> None:
    """Set the attributes that the saved run changed from `initial` to `saved`.

    A number, text or list that differs in a `fresh` object from the initial one is configured otherwise, and stays.
    """
    now = _all_attributes(objects)
    holds = Counter(id(value) for values in now.values() for value in values.values())
    for key, name, value in _to_restore(initial, saved, fresh):
        if key in now and _is_own(objects[key], name):
            current = now[key].get(name)
            if _find_lost(value, current) is None:
                # In place, because a sampler or an optimiser may use the same object.
                restored = _decode(value, current, in_place=holds[id(current)] == 1)
                (object.__setattr__ if _is_frozen(objects[key]) else setattr)(objects[key], name, restored)


def _to_restore(initial: Any, saved: Any, fresh: Any) -> Iterator[tuple[str, str, Any]]:
    for key, values in saved.items():
        for name, value in values.items():
            # Tensors may be made from weights, which a resumed run has loaded at its start.
            if initial.get(key, {}).get(name) == fresh.get(key, {}).get(name) or _holds_tensor(value):
                yield key, name, value


def _holds_tensor(saved: Any) -> bool:
    if not isinstance(saved, dict):
        return False
    return saved["kind"] in _LEAVES or any(_holds_tensor(each) for _, each in _pairs(saved))


def _all_attributes(objects: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the attributes of all `holders`, without optimisers and schedules that a checkpoint holds."""
    trainer = objects["trainer"]
    held = {id(each) for each in [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]}
    return {
        key: {name: value for name, value in _attributes(each).items() if id(value) not in held}
        for key, each in objects.items()
    }


def _attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object that a checkpoint must hold."""
    return {
        name: each
        for name, each in own_attributes(owner).items()
        if not is_generator(each)
        and not isinstance(each, FunctionType | MethodType)  # `replaced` compares them.
        and not isinstance(each, Trainer | LightningModule | LightningDataModule | DataLoader)
        and not isinstance(each, Dataset | Sampler)  # `ResumableLoader` compares them.
    }


def own_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object without those of its base class in a library."""
    if isinstance(owner, Trainer):
        return {name: getattr(owner, name) for name in _OPTIONS}
    if isinstance(owner, Metric):
        return {name: getattr(owner, name) for name in [*owner._defaults, "_update_count", "_computed"]}
    values = {**getattr(owner, "__dict__", {}), **slots(owner)}
    values = {name: each for name, each in values.items() if _is_own(owner, name)}
    if isinstance(owner, nn.Module):
        values |= {name: owner._buffers[name] for name in owner._non_persistent_buffers_set}
        if _package(type(owner)) == "torch":
            values = {name: each for name, each in values.items() if not name.startswith("_")}
    return values


def _is_own(owner: Any, name: str) -> bool:
    """Return whether an attribute may be saved and set; a crafted checkpoint may name those of a base class."""
    return name in _OPTIONS if isinstance(owner, Trainer) else name not in _base_names() and not name.startswith("__")


def _inner(key: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield by path the plain objects that attributes hold, directly or in a container."""
    for name, value in _attributes(owner).items():
        items: Any = [(f"{key}.{name}", value)]
        if isinstance(value, list | tuple | dict) and len(value) <= 1000:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            items += [(f"{key}.{name}.{index}", each) for index, each in pairs]
        for path, each in items:
            if (hasattr(each, "__dict__") or slots(each)) and not _restores_itself(each):
                yield path, each


def _is_frozen(each: Any) -> bool:
    """Return whether an object is a data class that refuses to set its attributes."""
    return is_dataclass(each) and bool(vars(type(each))["__dataclass_params__"].frozen)


def _restores_itself(each: Any) -> bool:
    kind = type(each)
    if each is None or isinstance(each, type | Enum) or _package(kind) in _LIBRARIES:
        return True
    hooks = _HOOKS if has_state_dict(each) else _HOOKS[1:]
    return not all(_is_library(getattr(kind, hook, None)) for hook in hooks)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_library(function: Any) -> bool:
    return function is None or (getattr(function, "__module__", None) or "").partition(".")[0] in _LIBRARIES


@cache
def _base_names() -> frozenset[str]:
    bases = LightningModule(), LightningDataModule(), nn.Module(), Optimizer([torch.zeros(1)], {})
    # Lightning makes them when they are first read. They hold the configuration, which a resumed run has.
    hyperparameters = {"_hparams", "_hparams_initial", "_hparams_name"}
    return frozenset(name for each in bases for name in vars(each)) | hyperparameters


def _encode(value: Any) -> Any:
    """Return a value as numbers, texts and tensors in lists and dictionaries, with the kinds of other containers."""
    kind = type(value)
    if kind in (int, float, complex, bool, str, bytes, type(None)):
        return value
    if isinstance(value, Tensor):
        return {"kind": "tensor", "value": value.detach().clone(), "grad": value.is_leaf and value.requires_grad}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc" and value.dtype != np.longdouble:
        numbers = np.array(value, value.dtype.newbyteorder("="))
        return {"kind": "array", "value": torch.from_numpy(numbers), "scalar": kind is not np.ndarray}
    if kind in _PLAIN:
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "value": _PLAIN[kind][0](value)}
    if isinstance(value, Enum):
        return {"kind": "enum", "value": _encode(value.value)}
    if has_state_dict(value):
        return {"kind": "state", "value": _encode(dict(value.state_dict()))}
    base = _base(value)
    if base is None:
        raise _Opaque(kind.__name__)
    extra = {"maxlen": value.maxlen} if base is deque else {}
    if base is not kind:
        extra["own"] = True
    if issubclass(base, dict):
        return {"kind": base.__name__, "items": [[_encode(key), _encode(each)] for key, each in value.items()], **extra}
    return {"kind": base.__name__, "items": [_encode(each) for each in value], **extra}


def _find_lost(saved: Any, current: Any) -> str | None:
    """Return why a saved value cannot be restored, or None."""
    if not isinstance(saved, dict):
        return None
    if saved["kind"] == "lost":
        return f"a {saved['what']} in it cannot be saved"
    if saved["kind"] in _PLAIN_NAMES:
        _decode(saved)  # A damaged one is refused here.
    if saved["kind"] == "enum" and not _is_member(_decode(saved["value"]), current):
        return "its Enum does not exist at the start, or has no such member"
    if saved.get("own") and (_base(current) is not _KINDS[saved["kind"]] or type(current) is _base(current)):
        return f"it is no {saved['kind']} of a class of its own at the start"
    if saved["kind"] == "state" and not has_state_dict(current):
        return "its object does not exist at the start"
    if saved["kind"] == "defaultdict" and not isinstance(current, defaultdict):
        return "it is not a defaultdict at the start"
    for key, each in _pairs(saved):
        if (found := _find_lost(each, _child(current, key))) is not None:
            return found
    return None


def _decode(saved: Any, current: Any = None, in_place: bool = False) -> Any:
    """Return a saved value; `in_place` changes the object that holds the `current` value, if it can hold this one."""
    if not isinstance(saved, dict):
        return saved
    kind: str = saved["kind"]
    value: Any = saved.get("value")
    if kind == "tensor":
        if not isinstance(current, Tensor):
            return value.clone().requires_grad_(saved["grad"])
        fits = (current.shape, current.dtype) == (value.shape, value.dtype) and current.is_contiguous()
        if fits and current.is_leaf and not current.is_inference() and (in_place or current.requires_grad):
            with torch.no_grad():
                return current.copy_(value)
        return value.to(current.device, copy=True).requires_grad_(saved["grad"])
    if kind == "array":
        numbers = value.numpy().copy()
        fits = isinstance(current, np.ndarray) and (current.shape, current.dtype) == (numbers.shape, numbers.dtype)
        if fits and in_place and current.flags.writeable:
            current[...] = numbers
            return current
        return numbers[()] if saved["scalar"] else numbers
    if kind in _PLAIN_NAMES:
        return _PLAIN[_PLAIN_NAMES[kind]][1](value)
    if kind == "enum":
        return type(current)(_decode(value))
    if kind == "state":
        current.load_state_dict(_decode(value))
        return current
    items = [(key, _decode(each, _child(current, key))) for key, each in _pairs(saved)]
    values = [each for _, each in items]
    if kind in ("tuple", "frozenset"):
        made: Any = tuple(values) if kind == "tuple" else frozenset(values)
        return getattr(type(current), "_make", type(current))(made) if saved.get("own") else made
    if kind == "deque":
        made = deque(values, saved["maxlen"])
    elif kind == "defaultdict":
        made = defaultdict(current.default_factory, items)
    else:
        made = _KINDS[kind](dict(items) if kind in _MAPPINGS else values)
    if saved.get("own"):
        current = current if in_place else copy.copy(current)
    elif not in_place or type(current) is not type(made) or getattr(current, "maxlen", 0) != getattr(made, "maxlen", 0):
        return made
    current.clear()
    current.extend(made) if isinstance(current, list | deque) else current.update(made)
    return current


def _pairs(saved: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return the keys or positions of a saved container, and its saved values."""
    if saved["kind"] not in _KINDS:
        return []
    if saved["kind"] in _MAPPINGS:
        return [(_decode(key), each) for key, each in saved["items"]]
    return list(enumerate(saved["items"]))


def _is_member(value: Any, current: Any) -> bool:
    """Return whether a value is one of a member of the Enum of `current`."""
    try:
        return isinstance(current, Enum) and isinstance(type(current)(value), Enum)
    except ValueError:
        return False


def _count_state(value: Any) -> list[Any]:
    """Return start and step of `itertools.count`."""
    try:
        return list(ast.literal_eval(f"[{repr(value)[6:-1]}]"))
    except (ValueError, SyntaxError):  # It counts something else than numbers of Python.
        raise _Opaque("count") from None


def _base(value: Any) -> type | None:
    """Return the kind of container that a value is, maybe of a class of its own, or None."""
    return next((kind for kind in [*_KINDS.values()][::-1] if isinstance(value, kind)), None)


def _child(container: Any, key: Any) -> Any:
    """Return what a container holds at a key or position, or None."""
    if isinstance(container, dict):
        return container.get(key)
    return container[key] if isinstance(container, list | tuple | deque) and key < len(container) else None
