"""Lightning's training loop without its overhead, for as long as a fit lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler

from firstlight.fast_loop.epoch_loop import FastEpochLoop, FastEvaluationLoop
from firstlight.fast_loop.hooks import Fit, NullProfiler
from firstlight.fast_loop.known import find_unknown

__all__ = ["fast_loop"]


@contextmanager
def fast_loop(trainer: Trainer, handles_signals: bool = False) -> Iterator[Fit]:
    """Replace a trainer's epoch loop, validation loop and profiler in this context; `reason` tells if that is not so.

    Args:
        trainer: Of the fit.
        handles_signals: Whether a callback ends all processes on a SIGTERM to one of them. Then Lightning need not ask
            all of them before each batch.
    """
    own: Any = trainer  # Its attributes are set outside the class.
    loops, loop, profiler = own.fit_loop, own.fit_loop.epoch_loop, own.profiler
    validation, fit = loop.val_loop, Fit(own, _find_obstacle(own))
    if not fit.is_open:
        yield fit
        return
    # Lightning sets it. Without a GPU, each optimizer step then looks for NVIDIA's library on the disk, for 40 µs.
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    nvml = None if torch.cuda.is_available() else os.environ.pop(variable, None)
    loops.epoch_loop = FastEpochLoop(loop, fit, handles_signals)
    loop.val_loop, own.profiler = FastEvaluationLoop(validation, fit), NullProfiler()
    try:
        yield fit
    finally:
        fit.is_open = False
        loops.epoch_loop, loop.val_loop, own.profiler = loop, validation, profiler
        del loop._results.log
        if nvml is not None:
            os.environ[variable] = nvml


def _find_obstacle(trainer: Any) -> str | None:
    """Return what keeps the fast loop from taking the place of Lightning's."""
    loop = trainer.fit_loop.epoch_loop
    if type(trainer.profiler) is not PassThroughProfiler:
        return "a profiler is on"
    if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
        return "the trainer is sent to spawned processes"
    own = {"advance", "on_advance_end"} & vars(loop).keys() or "_evaluation_step" in vars(loop.val_loop)
    if own or type(loop) is not _TrainingEpochLoop or type(loop.val_loop) is not _EvaluationLoop:
        return "the trainer has a loop of its own"
    return find_unknown()
