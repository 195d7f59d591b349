"""The callbacks that every run has unless it disables them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.pytorch import Callback

from firstlight.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from firstlight.callbacks.early_stopping import EarlyStopping
from firstlight.callbacks.graceful_shutdown import GracefulShutdown
from firstlight.callbacks.gradient_norm import GradientNorm
from firstlight.callbacks.hparams import HParams
from firstlight.callbacks.insight import Insight
from firstlight.callbacks.learning_rate import LearningRate
from firstlight.callbacks.nonfinite import NonFinite
from firstlight.callbacks.progress import Progress
from firstlight.callbacks.random_state import RandomState
from firstlight.errors import UsageError, did_you_mean

DEFAULTS: dict[str, type[Callback]] = {
    "early_stopping": EarlyStopping,
    "random_state": RandomState,
    "gradient_norm": GradientNorm,
    "nonfinite": NonFinite,  # After GradientNorm, which logs the gradient as it was.
    "lr": LearningRate,
    "insight": Insight,
    "progress": Progress,
    "best": BestCheckpoint,
    "hparams": HParams,  # Lightning calls it before all checkpoint callbacks.
    "last": LastCheckpoint,
    "shutdown": GracefulShutdown,
}
"""Default callbacks in the order in which they are called, by name. The name is also their group of options."""

LINKED = {"monitor", "mode", "dirpath", "best", "allow_inexact"}
"""Arguments that follow from the task, the run, or an option of the command, and are not options of a callback."""


MONITORING = ("early_stopping", "best", "hparams")
"""Default callbacks that need a monitored metric."""


class Monitored(Protocol):
    """An object that names the metric which decides what is best, for example a task."""

    monitor: str
    mode: Literal["min", "max"]


def defaults(
    task: Monitored | None, dirpath: Path | None = None, disable: Collection[str] = (), **options: Mapping[str, Any]
) -> list[Callback]:
    """Return the default callbacks for a task.

    Args:
        task: Its `monitor` and `mode` decide what is best. `None` leaves out the callbacks in `MONITORING`.
        dirpath: Folder of the checkpoints; `None` leaves it to the logger.
        disable: Names in `DEFAULTS` to leave out. Without `best` there is no `hparams` either.
        **options: Arguments of a callback, by name: `early_stopping={"patience": 3}`.

    Raises:
        UsageError: When a name is not in `DEFAULTS`.
    """
    for name in (*disable, *options):
        if name not in DEFAULTS:
            raise UsageError(
                f"unknown default callback {name}; available: {', '.join(DEFAULTS)}" + did_you_mean(name, DEFAULTS)
            )
    monitored = {} if task is None else {"monitor": task.monitor, "mode": task.mode}
    linked: dict[str, dict[str, Any]] = {
        "early_stopping": monitored,
        "best": {**monitored, "dirpath": dirpath},
        "last": {"dirpath": dirpath},
    }
    built: dict[str, Callback] = {}
    for name, kind in DEFAULTS.items():
        if name in disable or (name == "hparams" and "best" not in built) or (task is None and name in MONITORING):
            continue
        if name == "hparams":
            linked[name] = {"best": built["best"]}
        built[name] = kind(**linked.get(name, {}), **options.get(name, {}))
    return list(built.values())
