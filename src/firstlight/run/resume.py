"""Compare the configuration of a resumed run with the saved one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from firstlight.errors import UsageError

_BREAK_EXACT_RESUME = (
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "model.init_args.monitor",
    "monitor",
    "mode",
)
"""Options whose change breaks exact resume, besides the options of the data."""

_HARMLESS = (".num_workers", ".on_device", ".path", ".root")
"""Data options that may change. A file may move, because its content is compared when it is read."""

_COUNTS_OR_FRACTIONS = (
    *(f"trainer.limit_{split}_batches" for split in ("train", "val", "test", "predict")),
    "trainer.overfit_batches",
    "trainer.val_check_interval",
)
"""Options that count batches as an int, and are a share of all batches as a float."""

_VALIDATION = ("trainer.limit_val_batches", "trainer.overfit_batches")
"""Options that change which samples are validated, besides the options of the data."""


def config_diff(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return by path the options that differ between two configurations: the saved value and the value now.

    A limit of 1 is one batch, and 1.0 is all batches, so these differ.

    >>> config_diff({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    {'a.b': (1, 3)}
    >>> config_diff({"trainer": {"overfit_batches": 1}}, {"trainer": {"overfit_batches": 1.0}})
    {'trainer.overfit_batches': (1, 1.0)}
    """
    diff: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*saved, *now]):
        old, new, path = saved.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            diff |= config_diff(old, new, f"{path}.")
        elif old != new or (path in _COUNTS_OR_FRACTIONS and type(old) is not type(new)):
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


def start_anew(
    diff: Mapping[str, Any], callbacks: Sequence[Callback], metrics: Collection[str], allow_inexact: bool
) -> str | None:
    """Let callbacks start anew whose monitored metric cannot be compared with the saved one, and return why, or None.

    Args:
        diff: The config diff.
        callbacks: The callbacks of the run.
        metrics: Names of the metrics of the task, which do not depend on its loss.
        allow_inexact: Whether the run may resume nevertheless.

    Raises:
        UsageError: When there are such callbacks and `allow_inexact` is off.
    """
    why = None
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if not isinstance(each, EarlyStopping | Checkpoint) or monitor is None:
            continue
        if options := _options_of_metric(diff, monitor.rpartition("/")[2] not in metrics):
            why = f"changing {', '.join(options)} changes what {monitor} means"
            if not allow_inexact:
                raise UsageError(
                    f"{why}, which decides the best checkpoint or early stopping: keep the saved value, or resume with "
                    "--allow_inexact, which starts them anew"
                )
            each.load_state_dict = lambda state_dict: None  # type: ignore[method-assign]  # It forgets what it saw.
    return why


def _options_of_metric(diff: Mapping[str, Any], follows_loss: bool) -> list[str]:
    """Return the options of a config diff that change what a validation metric means."""
    return [
        path
        for path in diff
        if path in _VALIDATION
        or (path.startswith("data.") and not path.endswith((*_HARMLESS, ".batch_size")))
        or (path.startswith("model.init_args.loss") and follows_loss)
    ]
