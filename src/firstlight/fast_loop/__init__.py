"""Lightning's training loop without its overhead, for the duration of a fit."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pkgutil import resolve_name
from typing import Any

import lightning
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

from firstlight.fast_loop.epoch_loop import FastEpochLoop, FastEvaluationLoop
from firstlight.fast_loop.hooks import FastPath, LoggedValues, NullProfiler

__all__ = ["fast_loop"]

KNOWN = """
core.module:LightningModule. _call_batch_hook optimizer_step lr_scheduler_step
loops. evaluation_loop:_EvaluationLoop._evaluation_step training_epoch_loop:_TrainingEpochLoop._is_training_done
loops.optimization.automatic: Closure _AutomaticOptimization._training_step
loops.optimization.automatic:_AutomaticOptimization. run _on_before_zero_grad _optimizer_step _optimizer_zero_grad
loops.training_epoch_loop:_TrainingEpochLoop. advance _should_accumulate _update_learning_rates update_lr_schedulers
plugins.precision.precision:Precision. pre_backward post_backward _wrap_closure _after_closure
strategies.strategy:Strategy. backward optimizer_step
trainer.call: _call_callback_hooks
trainer.connectors.logger_connector.logger_connector:_LoggerConnector. on_batch_start on_batch_end
"""
DIGEST = "7bb3f70f27293cab9b1292f1fd53a511ae1370d31afcf64b4467bab5daeb5e92"  # Lightning 2.6.4 to 2.6.6.


@contextmanager
def fast_loop(trainer: Trainer, handles_signals: bool = False) -> Iterator[FastPath]:
    """Replace a trainer's epoch loop, validation loop and profiler in this context, if possible.

    With `handles_signals`, a callback stops all processes after a SIGTERM to one of them. Otherwise they ask each other
    before each batch, as in Lightning. The yielded object's `reason` says why Lightning's own loop trains, or is None.
    """
    own: Any = trainer  # Its attributes are set outside the class.
    loop, val_loop, profiler = own.fit_loop.epoch_loop, own.fit_loop.epoch_loop.val_loop, own.profiler
    path = FastPath(own, handles_signals, _find_obstacle(own))
    if not path.is_open:
        yield path
        return
    loop.__class__, val_loop.__class__, own.profiler = FastEpochLoop, FastEvaluationLoop, NullProfiler()
    loop._results.__class__ = val_loop._results.__class__ = LoggedValues
    loop._path = val_loop._path = path
    try:
        yield path
    finally:
        path.is_open = False
        loop.__class__, val_loop.__class__, own.profiler = _TrainingEpochLoop, _EvaluationLoop, profiler
        loop._results.__class__ = val_loop._results.__class__ = _ResultCollection
        del loop._path, val_loop._path


def _find_obstacle(trainer: Any) -> str | None:
    loop = trainer.fit_loop.epoch_loop
    if type(trainer.profiler) is not PassThroughProfiler:
        return "a profiler is on"
    if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
        return "the trainer is sent to spawned processes"
    own = {"advance", "on_advance_end"} & vars(loop).keys() or "_evaluation_step" in vars(loop.val_loop)
    if own or type(loop) is not _TrainingEpochLoop or type(loop.val_loop) is not _EvaluationLoop:
        return "the trainer has its own loop"
    return find_change()


def find_change() -> str | None:
    """Return, in one clause, that a replaced function is another one than in the known versions, or None."""
    lines = [line.split() for line in KNOWN.strip().splitlines()]
    found = [resolve_name(f"lightning.pytorch.{place}{name}") for place, *names in lines for name in names]
    functions = tuple(getattr(each, "fget", each) for each in found)  # A property's own one.
    is_known = _digest(functions) == DIGEST
    return None if is_known else f"Lightning {lightning.__version__} has other functions than the fast loop replaces"


@cache
def _digest(functions: tuple[Any, ...]) -> str:
    sources = [None if hasattr(f, "__wrapped__") else inspect.getsource(f) for f in functions]  # Wrapped: not its own.
    return sha256(repr(sources).encode()).hexdigest()
