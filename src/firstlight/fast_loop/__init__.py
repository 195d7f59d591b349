"""Lightning's training loop without its overhead, for the duration of a fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler

from firstlight.fast_loop.epoch_loop import FastEpochLoop, FastEvaluationLoop
from firstlight.fast_loop.hooks import FastPath, NullProfiler
from firstlight.fast_loop.known import find_change

__all__ = ["fast_loop"]


@contextmanager
def fast_loop(trainer: Trainer, handles_signals: bool = False) -> Iterator[FastPath]:
    """Replace a trainer's epoch loop, validation loop and profiler in this context, if possible.

    With `handles_signals`, a callback stops all processes after a SIGTERM to one of them. Otherwise they ask each other
    before each batch, as in Lightning. The object that is yielded has a `reason`: None, or one clause that says why
    Lightning's own loop trains.
    """
    own: Any = trainer  # Its attributes are set outside the class.
    loop, val_loop, profiler = own.fit_loop.epoch_loop, own.fit_loop.epoch_loop.val_loop, own.profiler
    path = FastPath(own, handles_signals, _find_obstacle(own))
    if not path.is_open:
        yield path
        return
    loop.__class__, val_loop.__class__, own.profiler = FastEpochLoop, FastEvaluationLoop, NullProfiler()
    loop._path = val_loop._path = path
    try:
        yield path
    finally:
        path.is_open = False
        loop.__class__, val_loop.__class__, own.profiler = _TrainingEpochLoop, _EvaluationLoop, profiler
        del loop._path, val_loop._path


def _find_obstacle(trainer: Any) -> str | None:
    """Return why the loops of a trainer cannot be replaced, or None."""
    loop = trainer.fit_loop.epoch_loop
    if type(trainer.profiler) is not PassThroughProfiler:
        return "a profiler is on"
    if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
        return "the trainer is sent to spawned processes"
    own = {"advance", "on_advance_end"} & vars(loop).keys() or "_evaluation_step" in vars(loop.val_loop)
    if own or type(loop) is not _TrainingEpochLoop or type(loop.val_loop) is not _EvaluationLoop:
        return "the trainer has its own loop"
    return find_change()
