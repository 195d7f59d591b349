"""What a checkpoint may hold: tensors and plain values, in containers that can be copied."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MOST_LEVELS, _MOST_SHARED = 100, 10
_MANY = 1_000_000
_CONTAINERS = (dict, list, tuple, set)


def find_tangle(content: object) -> str:
    """Return which containers cannot be copied or walked through; an empty text if all can.

    Such containers hold themselves, are nested too deeply, or hold each other so often that a copy would be huge.
    """
    known: dict[int, float] = {}

    def size(value: Any, level: int) -> float:
        """Return how many containers a container is, if each place has its own copy."""
        if id(value) not in known:
            if level > _MOST_LEVELS:
                return float("inf")
            known[id(value)] = float("inf")  # Of a container within itself.
            inner = value.values() if isinstance(value, dict) else value
            known[id(value)] = 1 + sum(size(each, level + 1) for each in inner if isinstance(each, _CONTAINERS))
        return known[id(value)]

    total = size(content, 0) if isinstance(content, _CONTAINERS) else 0
    if total == float("inf"):
        return f"a container that holds itself, or containers of more than {_MOST_LEVELS} levels"
    if total > _MANY and total > _MOST_SHARED * len(known):
        return f"{len(known):,} containers that hold each other, and expand to {total:,.0f}"
    return ""


def find_unreadable(content: object) -> str:
    """Return the place and kind of the first value that a checkpoint cannot hold, and what to store instead.

    The text is empty if all values load with `weights_only=True`.

    >>> find_unreadable({"epoch": 1, "mine": {"best": np.float64(0.5)}})
    'mine.best, a numpy.float64: store its .item()'
    >>> find_unreadable({"epoch": 1})
    ''
    """
    if wrong := find_tangle(content):
        return wrong

    def search(value: Any, place: str) -> str:
        if type(value) in _CONTAINERS:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            keys = value if isinstance(value, dict) else ()
            found = (search(each, f"{place}.{key}" if place else str(key)) for key, each in pairs)
            return next(filter(None, (*(search(key, f"a key of {place}") for key in keys), *found)), "")
        if value is None or type(value) in (bool, int, float, str, torch.Tensor) or _loads(value):
            return ""
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return f"{place}, a {name}: store {_instead(value)}"

    return search(content, "")


def _loads(value: object) -> bool:
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # The methods that pickle an object may be the user's.
        return False
    return True


def _instead(value: object) -> str:
    """Return what to store in place of an object that a checkpoint cannot hold."""
    if isinstance(value, np.generic):
        return "its .item()"
    if isinstance(value, np.ndarray):
        return "torch.from_numpy of it"
    if isinstance(value, Path):
        return "str of it"
    if isinstance(value, Mapping):
        return "dict of it"
    if isinstance(value, Sequence):
        return "list of it"
    return "plain values and tensors"
