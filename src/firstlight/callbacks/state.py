"""Random states, and the state of objects that no checkpoint holds by itself."""

import inspect
import io
import marshal
import random
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from itertools import count, islice
from logging import Logger
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from firstlight.errors import restoring

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_GLOBAL = (random.random.__self__, np.random.mtrand._rand, torch.default_generator)  # type: ignore[attr-defined]
"""The generators that `snapshot` holds."""

_PRINTED = (
    *(bytearray, array, range, count, Decimal, Fraction, date, time, timedelta, Enum, PurePath),
    *(torch.dtype, torch.device),
)
"""Classes whose `repr` tells the value."""

CODE = (FunctionType, MethodType, BuiltinFunctionType, type)
"""Values whose name tells what they do."""

_PLAIN = (int, float, complex, str, bytes, np.generic, type(None), torch.Tensor, np.ndarray, *_PRINTED)
"""Values that `digest` compares, also in large containers."""

_POSITIONS = count()
"""A number for each look at an iterator, whose position nobody can ask for."""

_LARGE = 1000
"""Of containers with more entries, about this many are searched for objects."""

_SAMPLE = 2**20
"""Of arrays with more numbers, about this many are compared."""

_LARGE_BUFFER = 2**28
"""Memory of more bytes is not compared, if it is no array."""


def snapshot() -> dict[str, Any]:
    """Return the states of all generators of this process, as values that load with `weights_only=True`."""
    version, words, *gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        # Tensors, because pickling 2,500 numbers one by one takes most of the time of a small checkpoint.
        "python": (version, torch.tensor(words), *gauss),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),  # type: ignore[union-attr]  # the legacy form
        "torch": torch.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(states: Mapping[str, Any]) -> None:
    """Set all generators of this process to what `snapshot` returned.

    >>> states = snapshot()
    >>> first = random.random(), np.random.rand(), torch.rand(1)
    >>> restore(states)
    >>> first == (random.random(), np.random.rand(), torch.rand(1))
    True
    """
    with restoring("a random state"):
        version, words, *gauss = states["python"]
        random.setstate((version, tuple(torch.as_tensor(words).tolist()), *gauss))
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if states["devices"] and len(states["devices"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["devices"])


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator of torch, NumPy or Python."""
    return isinstance(value, _GENERATORS)


def find_stateful(roots: Mapping[str, Any]) -> dict[str, Any]:
    """Return by path the random generators, and the objects with `state_dict`, that are reachable from `roots`."""
    return {path: value for path, value in _walk(roots) if isinstance(value, _GENERATORS) or has_state_dict(value)}


def get_states(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of what `find_stateful` found, as plain values and tensors."""
    return {path: _get(each) for path, each in objects.items()}


def set_states(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set the states that `get_states` returned; objects without a saved state keep theirs."""
    for path, each in objects.items():
        if path in states:
            _set(each, states[path])


def fingerprints(roots: Mapping[str, Any]) -> dict[str, str]:
    """Return by path a text for each value that is reachable from `roots` and that nothing else restores.

    Two equal texts mean the same value, or objects of one class that nobody can compare. Objects are described by their
    class, functions by their name, and large containers and arrays by a digest.
    """
    found = {}
    for path, value in _walk(roots):
        if isinstance(value, _GENERATORS):
            continue
        if isinstance(value, list | tuple | dict | deque) and len(value) <= _LARGE and not has_state_dict(value):
            found[path] = f"{type(value).__name__} of {len(value)}"
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            found[path] = f"an iterator at {id(value)}"  # No two processes agree on it: its position is unknown.
        elif _is_frame(value):
            found[path] = _digest_frame(value)
        elif isinstance(value, (*_PLAIN, list, tuple, dict, set, frozenset, deque)) and not has_state_dict(value):
            found[path] = digest(value)
        else:
            found[path] = name_of(value) + _digest_buffer(value)
    return found


def is_position(text: str) -> bool:
    """Return whether `fingerprints` describes an iterator with this text, which no two processes share."""
    return text.startswith("an iterator at ")


def _walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield path and value of everything that is reachable from `roots` through attributes and containers."""
    pending, seen = deque(roots.items()), dict[int, Any]()
    while pending and len(seen) < 10_000:
        path, value = pending.popleft()
        if any(value is each for each in _GLOBAL):
            continue
        yield path, value
        if id(value) in seen or isinstance(value, type | ModuleType | nn.Module | Logger) or _is_frame(value):
            continue
        seen[id(value)] = value  # Kept alive, so that no other object gets its `id`.
        if isinstance(value, _GENERATORS + _PLAIN) or has_state_dict(value) or _digest_buffer(value):
            continue
        inner: Any = ()
        if isinstance(value, dict | list | tuple | deque):
            inner = _entries(value)
        elif isinstance(value, partial):
            inner = {"func": value.func, "args": value.args, **value.keywords}.items()
        elif callable(value) and hasattr(value, "__self__"):
            inner = {"self": value.__self__}.items()
        elif isinstance(value, FunctionType):
            inner = zip(
                value.__code__.co_freevars, (cell.cell_contents for cell in value.__closure__ or ()), strict=True
            )
        else:
            # Lightning keeps the arguments of loaders in attributes with this prefix.
            inner = [item for item in getattr(value, "__dict__", {}).items() if not item[0].startswith("__pl")]
            inner += slots(value).items()
        pending += [(f"{path}.{name}", each) for name, each in inner]


def _entries(value: Any) -> Any:
    """Return keys or positions and values of a container; of a large one, those that `digest` does not compare."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    if len(value) <= _LARGE:
        return entries
    some = islice(entries, 0, None, -(-len(value) // _LARGE))
    return [(name, each) for name, each in some if not _is_plain(each)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return len(value) > _LARGE or all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def name_of(value: Any) -> str:
    """Return the full name of a function, a method or a class, or that of the class of another object.

    >>> name_of(random.choice), name_of(random.Random), name_of(random.Random(1))
    ('random.Random.choice', 'random.Random', 'random.Random')
    """
    kind = value if isinstance(value, CODE) else type(value)
    return f"{getattr(kind, '__module__', None) or 'builtins'}.{kind.__qualname__}"


def _is_frame(value: Any) -> bool:
    pandas = sys.modules.get("pandas")  # Not imported here: it takes half a second.
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series | pandas.Index)


def _digest_frame(value: Any) -> str:
    """Return a text for values, index, columns and types of an object of pandas."""
    name, step = type(value).__name__, max(1, value.size // _SAMPLE)
    some = value[::step]
    try:
        content = sys.modules["pandas"].util.hash_pandas_object(some).to_numpy()
    except TypeError:  # It holds lists or arrays.
        content = digest(some.to_numpy().tolist())
    labels = [str(value.dtypes), str(list(value.columns))] if value.ndim == 2 else [str(value.dtype), str(value.name)]
    return f"{name} {value.shape} {zlib.crc32(repr([digest(content), *labels]).encode())}"


def _digest_buffer(value: Any) -> str:
    """Return a checksum of the memory that an object exports, as `multiprocessing.Value` does, or an empty text."""
    try:
        memory = memoryview(value)
        return f" {zlib.crc32(memory)}" if memory.nbytes <= _LARGE_BUFFER else ""
    except (TypeError, ValueError, BufferError):
        return ""


def slots(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that its classes keep in `__slots__`."""
    every = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = {name for each in every for name in ([each] if isinstance(each, str) else each)}
    return {name: getattr(value, name) for name in sorted(names - {"__dict__", "__weakref__"}) if hasattr(value, name)}


def digest(value: Any) -> str:
    """Return a text for a value. Two equal texts mean the same value, or objects of one class that nobody can compare.

    An iterator never has the same text again, because it may have been advanced.

    >>> digest([1, 2]) == digest([1, 2]), digest([1, 2]) == digest([1, 3])
    (True, False)
    """
    name = type(value).__name__
    if isinstance(value, int | float | complex | bool | np.generic | None):
        return repr(value)
    if isinstance(value, _PRINTED):
        return f"{name} {zlib.crc32(repr(value).encode())}"
    if isinstance(value, torch.Tensor) and value.layout != torch.strided:
        parts = value.detach().coalesce() if value.layout == torch.sparse_coo else None
        return name if parts is None else f"{name} {digest(parts.indices())} {digest(parts.values())}"
    if isinstance(value, torch.Tensor):
        return _digest_array(value.detach(), name)
    if isinstance(value, np.ndarray):
        return f"{name} {digest(value.tolist())}" if value.dtype == object else _digest_array(value, name)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) < 80 else f"{name} of {len(value)} {zlib.crc32(repr(value).encode())}"
    if isinstance(value, list | tuple | deque | dict | set | frozenset):
        try:
            plain: Any = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            content = marshal.dumps(plain, 2)
        except ValueError:  # It holds something else than numbers and texts.
            items = value.items() if isinstance(value, dict) else value
            content = [digest(each) for each in items]  # type: ignore[assignment]
            content = repr(sorted(content) if isinstance(value, set | frozenset) else content).encode()
        return f"{name} of {len(value)} {zlib.crc32(content)}"
    if isinstance(value, partial):
        return f"{name} {digest([value.func, value.args, value.keywords])}"
    if isinstance(value, MappingProxyType):
        return f"{name} {digest(dict(value))}"
    if has_state_dict(value):
        return f"{name} {digest(dict(value.state_dict()))}"
    if isinstance(value, CODE):
        return f"{name} {name_of(value)}"
    is_advanced = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
    return f"{name} {next(_POSITIONS)}" if is_advanced else name


def _digest_array(array: Any, name: str) -> str:
    size, version = int(np.prod(array.shape)), ""
    flat = array.reshape(-1)
    if size > _SAMPLE:
        flat = flat[:: size // _SAMPLE]
        if isinstance(array, torch.Tensor) and not array.is_inference():
            version = f" {array._version}"  # Counts changes in place.
    if isinstance(flat, torch.Tensor):
        flat = flat.cpu().contiguous().view(torch.uint8) if flat.numel() else flat.cpu()
    return f"{name} {tuple(array.shape)} {zlib.crc32(np.ascontiguousarray(flat).tobytes())}{version}"


def has_state_dict(value: Any) -> bool:
    """Return whether a value is an object that saves its state without arguments, and restores it."""
    if isinstance(value, type) or not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        return False
    try:
        inspect.signature(value.state_dict).bind()
    except (TypeError, ValueError):
        return False
    return True


def _get(each: Any) -> Any:
    if isinstance(each, torch.Generator):
        return each.get_state()
    if isinstance(each, np.random.Generator):
        return _plain(each.bit_generator.state)
    if isinstance(each, np.random.RandomState):
        return _plain(each.get_state(legacy=False))
    return each.getstate() if isinstance(each, random.Random) else each.state_dict()


def _set(each: Any, state: Any) -> None:
    if not is_generator(each):
        each.load_state_dict(state)
        return
    with restoring("a random state"):
        if isinstance(each, torch.Generator):
            each.set_state(state)
        elif isinstance(each, np.random.Generator):
            each.bit_generator.state = _arrays(state)
        elif isinstance(each, np.random.RandomState):
            each.set_state(_arrays(state))
        else:
            version, words, gauss = state
            each.setstate((version, tuple(words), gauss))


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return ["array", str(state.dtype), state.tolist()] if isinstance(state, np.ndarray) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _arrays(value) for name, value in state.items()}
    return np.array(state[2], state[1]) if isinstance(state, list) and state[:1] == ["array"] else state
