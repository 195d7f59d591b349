"""The callbacks that every run has unless it is told otherwise."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from firstlight.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from firstlight.callbacks.early_stopping import EarlyStopping
from firstlight.callbacks.graceful_shutdown import GracefulShutdown
from firstlight.callbacks.gradient_norm import GradientNorm
from firstlight.callbacks.hparams import HParams
from firstlight.callbacks.learning_rate import LearningRate
from firstlight.callbacks.nonfinite import NonFinite
from firstlight.callbacks.progress import Progress
from firstlight.callbacks.random_state import RandomState
from firstlight.errors import UsageError, did_you_mean

__all__ = ["DEFAULTS", "LINKED", "defaults", "refuse_collisions"]

DEFAULTS: dict[str, type[Callback]] = {
    "early_stopping": EarlyStopping,
    "best": BestCheckpoint,
    "last": LastCheckpoint,
    "random_state": RandomState,
    "gradient_norm": GradientNorm,
    "nonfinite": NonFinite,
    "lr": LearningRate,
    "hparams": HParams,
    "progress": Progress,
    "stop": GracefulShutdown,
}
"""By name, which is also the name of its options on the command line."""

LINKED = {"monitor", "mode", "dirpath", "best"}
"""Arguments that follow from the task and the run, and are no options."""


class Monitored(Protocol):
    """What says which metric counts, as a task does."""

    monitor: str
    mode: Literal["min", "max"]


def defaults(
    task: Monitored, dirpath: Path | None = None, disable: Collection[str] = (), **options: Mapping[str, Any]
) -> list[Callback]:
    """Return the default callbacks for a task.

    Args:
        task: Its `monitor` and `mode` decide what is best.
        dirpath: Folder of the checkpoints; `None` leaves it to the logger.
        disable: Names in `DEFAULTS` that are left out. HParams are left out with `best`.
        **options: By name, arguments of a callback: `early_stopping={"patience": 3}`.

    Raises:
        UsageError: When there is no default callback of a name.
    """
    for name in (*disable, *options):
        if name not in DEFAULTS:
            raise UsageError(
                f"there is no default callback {name}: {', '.join(DEFAULTS)}" + did_you_mean(name, DEFAULTS)
            )
    given = {name: options.get(name, {}) for name in DEFAULTS if name not in disable}
    monitored: dict[str, Any] = {"monitor": task.monitor, "mode": task.mode}
    callbacks: list[Callback] = []
    if "early_stopping" in given:
        callbacks.append(EarlyStopping(**monitored, **given["early_stopping"]))
    if "random_state" in given:
        callbacks.append(RandomState(**given["random_state"]))
    if "gradient_norm" in given:
        callbacks.append(GradientNorm(**given["gradient_norm"]))
    if "nonfinite" in given:
        # After the norm of the gradient, which is to be seen as it was.
        callbacks.append(NonFinite(**given["nonfinite"]))
    if "lr" in given:
        callbacks.append(LearningRate(**given["lr"]))
    if "progress" in given:
        callbacks.append(Progress(**given["progress"]))
    if "best" in given:
        best = BestCheckpoint(**monitored, dirpath=dirpath, **given["best"])
        callbacks += [HParams(best), best] if "hparams" in given else [best]
    if "last" in given:
        callbacks.append(LastCheckpoint(dirpath, **given["last"]))
    if "stop" in given:
        callbacks.append(GracefulShutdown(**given["stop"]))
    return callbacks


def refuse_collisions(own: Sequence[Callback], default: Sequence[Callback]) -> None:
    """Refuse a callback that does what a default one does already.

    Raises:
        UsageError: Naming the default callback. Lightning would refuse some of these with a traceback, and let others
            write one file or decide what is best by their order.
    """
    for mine in own:
        for theirs in default:
            name = next(name for name, kind in DEFAULTS.items() if type(theirs) is kind)
            bars = isinstance(mine, ProgressBar) and isinstance(theirs, ProgressBar)
            files = isinstance(mine, ModelCheckpoint) and (mine.filename == name or (name == "last" and mine.save_last))
            # Where neither has a state, classes may share a name.
            same = mine.state_key == theirs.state_key and (type(mine) is type(theirs) or bool(mine.state_dict()))
            if same or bars or files:
                raise UsageError(
                    f"trainer.callbacks holds {type(mine).__name__}, which the default callback {name} does already: "
                    f"set the options of {name}, or leave it out with --disable {name}"
                )
