"""Compare the configuration of a resumed run with the saved one."""

from collections.abc import Mapping
from typing import Any

from firstlight.errors import UsageError

_BREAK_EXACT_RESUME = (
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.limit_train_batches",
    "model.init_args.monitor",
    "monitor",
    "mode",
)
"""Options whose change breaks exact resume, besides the options of the data."""

_HARMLESS = (".num_workers", ".on_device", ".path", ".root")
"""Data options that may change. A file may move, because its content is compared when it is read."""


def config_diff(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return by path the options that differ between two configurations: the saved value and the value now.

    >>> config_diff({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    {'a.b': (1, 3)}
    """
    diff: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*saved, *now]):
        old, new, path = saved.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            diff |= config_diff(old, new, f"{path}.")
        elif old != new:
            diff[path] = (old, new)
    return diff


def inexact_options(diff: Mapping[str, Any]) -> list[str]:
    """Return the options of a config diff that break exact resume: the run would not end with the same bits.

    >>> inexact_options({"data.init_args.batch_size": (32, 64), "trainer.max_epochs": (2, 3)})
    ['data.init_args.batch_size']
    """
    return [
        path
        for path in diff
        if path in _BREAK_EXACT_RESUME or (path.startswith("data.") and not path.endswith(_HARMLESS))
    ]


def refuse_inexact(diff: Mapping[str, tuple[Any, Any]], allow_inexact: bool) -> bool:
    """Return whether a run resumes exactly with this config diff.

    Raises:
        UsageError: When the class of the optimiser changed, or when the run does not resume exactly and
            `allow_inexact` is off.
    """
    if optimizer := diff.get("model.init_args.optimizer.class_path"):
        raise UsageError(
            f"cannot resume with another optimizer (was {optimizer[0]}, now {optimizer[1]}): start a new run"
        )
    inexact = inexact_options(diff)
    if inexact and not allow_inexact:
        raise UsageError(
            f"changing {', '.join(inexact)} breaks exact resume: keep the saved value, or resume with --allow_inexact"
        )
    return not inexact
