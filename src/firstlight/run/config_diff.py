"""What a run that goes on has otherwise than before."""

from collections.abc import Mapping
from typing import Any

__all__ = ["config_diff", "inexact_options"]

_EXACT = (
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.limit_train_batches",
    "model.init_args.monitor",
)
"""Options without which the batches, what becomes of them, or what is best are others; with all options of the data."""

_SAME = (".num_workers", ".on_device", ".path", ".root")
"""Options of the data that may change: the content of a file is compared when it is read."""


def config_diff(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return by path the values that differ between two configurations, each with the one before and the one now.

    >>> config_diff({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    {'a.b': (1, 3)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*before, *now]):
        old, new, path = before.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= config_diff(old, new, f"{path}.")
        elif old != new:
            found[path] = (old, new)
    return found


def inexact_options(paths: Mapping[str, Any]) -> list[str]:
    """Return those of the changed paths with which no run ends with the bits of one that was never stopped.

    >>> inexact_options({"data.init_args.batch_size": (32, 64), "trainer.max_epochs": (2, 3)})
    ['data.init_args.batch_size']
    """
    return [path for path in paths if path in _EXACT or (path.startswith("data.") and not path.endswith(_SAME))]
