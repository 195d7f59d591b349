"""Lightning's hooks without what nobody uses, for as long as a fit lasts.

Lightning 2.6.6 enters a context of its profiler for each callback and hook of a step, 84 with the callbacks of a
run though nothing is profiled, most of them around functions that do nothing; it sets an attribute of the module
through `torch.nn.Module.__setattr__` 44 times; and it inspects the signature of `training_step` at every step.
The functions here call the same hooks with the same arguments in the same order, but for those whose body is empty.
They take the place of Lightning's only where Lightning's are, letter for letter, those that they were written for.
A trainer that runs within the fit of another one shares them, so that a profiler of its own sees no hooks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core import module
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop, utilities
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.autograd import _profiler_enabled, profiler  # type: ignore[attr-defined]  # torch does not list the first
from torch.autograd.profiler import record_function
from torchmetrics import Metric

from firstlight.lean.acting import Acting
from firstlight.lean.known import HOOKS, STEP, are_known
from firstlight.lean.names import has_work, named
from firstlight.lean.step import Step

__all__ = ["lean"]


_PATCHING = threading.Lock()
"""Held while functions are replaced or put back: trainers may fit in threads."""


@contextmanager
def lean(trainer: Trainer, heeds_signals: bool = False) -> Iterator[bool]:
    """Call hooks without their overhead in a context; yield whether that is so.

    It is not, and all is as Lightning has it, with a profiler, inside another such context, where processes are
    spawned, and where Lightning's functions are others than those of 2.6.6.

    Args:
        trainer: Of the fit.
        heeds_signals: Whether a callback sees to it that all processes end on a SIGTERM to one of them, so that
            Lightning need not ask all of them before each batch.
    """
    stack = ExitStack()
    with _PATCHING:
        profiled = trainer.profiler  # type: ignore[attr-defined]  # set outside the class
        pickled = getattr(trainer.strategy.launcher, "_start_method", None) == "spawn"  # The trainer is, then.
        is_lean = type(profiled) is PassThroughProfiler and are_known(HOOKS) and not pickled
        for owner, name, ours in _replacements(trainer, heeds_signals) if is_lean else ():
            stack.enter_context(patch.object(owner, name, ours))
    try:
        yield is_lean
    finally:
        with _PATCHING:
            stack.close()


def _replacements(trainer: Trainer, heeds_signals: bool) -> list[tuple[Any, str, Any]]:
    """Return what is replaced: whose, its name, and by what."""
    takes, acting = lru_cache(is_param_in_hook_signature), Acting(trainer)
    replaced: list[tuple[Any, str, Any]] = [
        (call, "_call_callback_hooks", _callbacks(trainer, acting)),
        (call, "_call_lightning_module_hook", _module_hook),
        (call, "_call_strategy_hook", _strategy_hook),
        (call, "_call_lightning_datamodule_hook", _datamodule_hook),
        (_DataHookSelector, "get_instance", _remembered(_DataHookSelector.get_instance)),
        (Trainer, "_active_loop", property(_active_loop)),
        (_ResultMetric, "to", _moved(_ResultMetric.to)),
        *(
            (each, "is_param_in_hook_signature", takes)
            for each in (training_epoch_loop, evaluation_loop, utilities, module)
        ),
        *_batches(trainer, acting, heeds_signals),
    ]
    if not torch.cuda.is_available():
        # torch's optimisers ask at each step, and Lightning lets torch look for NVIDIA's library on the disk each time.
        # No device comes while a fit lasts.
        replaced.append((torch.cuda, "is_available", lambda: False))
        replaced.append((record_function, "__enter__", _labelled(record_function.__enter__)))
    return replaced


def _labelled(enter: Callable[..., Any]) -> Callable[..., Any]:
    """Return how a label is entered: not at all, where it is of an optimiser and no profiler of torch records.

    torch's optimisers label their `step` and `zero_grad` through its dispatcher. Other labels are left alone, and so
    are all with CUDA, where torch has further ways to record. An `ExecutionTraceObserver` alone, without a profiler,
    sees no labels of optimisers.
    """

    def labelled(label: Any) -> Any:
        if not label.name.startswith("Optimizer.") or _profiler_enabled() or profiler._is_profiler_enabled:
            return enter(label)
        label.run_callbacks_on_exit = False
        return label

    return labelled


def _callbacks(trainer: Trainer, acting: Acting) -> Callable[..., None]:
    """Return `_call_callback_hooks` for one trainer."""
    original = call._call_callback_hooks

    def call_hooks(whose: Trainer, hook: str, *args: Any, monitoring_callbacks: Any = None, **kwargs: Any) -> None:
        if whose is not trainer or monitoring_callbacks is not None:
            original(whose, hook, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        active, many = acting.find(hook), len(callbacks)
        if not active:
            return
        module = trainer._accelerator_connector.strategy._lightning_module
        attributes: dict[str, Any] = vars(module)
        before = attributes["_current_fx_name"]
        attributes["_current_fx_name"] = hook
        for each in active:
            getattr(each, hook)(trainer, module, *args, **kwargs)
        for each in callbacks[many:]:  # A hook may bring a callback along, whose turn is now.
            getattr(each, hook)(trainer, module, *args, **kwargs)
        attributes["_current_fx_name"] = before

    return call_hooks


def _module_hook(
    trainer: Trainer, hook: str, *args: Any, pl_module: LightningModule | None = None, **kwargs: Any
) -> Any:
    module = pl_module or trainer.lightning_module
    function = getattr(module, hook)
    if not callable(function) or not has_work(function):
        return None
    return named(module, hook, function, *args, **kwargs)


def _strategy_hook(trainer: Trainer, hook: str, *args: Any, **kwargs: Any) -> Any:
    function = getattr(trainer.strategy, hook)
    if not callable(function) or not has_work(function):
        return None
    return named(trainer.lightning_module, hook, function, *args, **kwargs)


def _datamodule_hook(trainer: Trainer, hook: str, *args: Any, **kwargs: Any) -> Any:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set outside the class
    if datamodule is None:
        raise TypeError("No `LightningDataModule` is available to call hooks on.")
    function = getattr(datamodule, hook)
    return function(*args, **kwargs) if callable(function) else None


def _remembered(get_instance: Callable[..., Any]) -> Callable[..., Any]:
    """Look up once whose hook is called, which depends on the classes of module and data module."""
    found: dict[tuple[int, int, str], Any] = {}

    def get(self: _DataHookSelector, hook: str) -> Any:
        key = id(self.model), id(self.datamodule), hook
        if key not in found:
            found[key] = get_instance(self, hook)
        return found[key]

    return get


def _batches(trainer: Trainer, acting: Acting, heeds_signals: bool) -> list[tuple[Any, str, Any]]:
    """Return what trains with each batch by `Step`, where all that it stands for is what it was written for."""
    loop = trainer.fit_loop.epoch_loop
    own = {"advance", "on_advance_end"} & vars(loop).keys() or "_evaluation_step" in vars(loop.val_loop)
    usual = type(loop) is _TrainingEpochLoop and type(loop.val_loop) is _EvaluationLoop
    if own or not usual or not are_known(STEP):
        return []
    step = Step(trainer, acting, heeds_signals)
    log = _ResultCollection.log

    def noted(results: _ResultCollection, *args: Any, **kwargs: Any) -> None:
        step.note_logging()
        log(results, *args, **kwargs)

    return [
        (loop, "advance", step.advance),
        (loop, "on_advance_end", step.on_advance_end),
        (loop.val_loop, "_evaluation_step", step.validate),
        (_TrainingEpochLoop, "done", property(step.is_epoch_done)),
        (_TrainingEpochLoop, "global_step", property(lambda loop: step.global_step(loop.trainer))),
        (Trainer, "global_step", property(step.global_step)),
        (_ResultCollection, "log", noted),
    ]


def _active_loop(trainer: Trainer) -> Any:
    """Return the loop of the stage, which Lightning compares as texts, some hundred times an epoch."""
    stage = trainer.state.stage
    if stage is RunningStage.TRAINING:
        return trainer.fit_loop
    if stage is RunningStage.PREDICTING:
        return trainer.predict_loop
    return None if stage is None else trainer._evaluation_loop


def _moved(to: Callable[..., Any]) -> Callable[..., Any]:
    """Move a number that was logged, unless all of it is there."""

    def moved(metric: _ResultMetric, device: Any, *args: Any, **kwargs: Any) -> _ResultMetric:
        held = [each for each in vars(metric).values() if isinstance(each, Tensor | Metric)]
        if not args and not kwargs and all(isinstance(each, Tensor) and each.device == device for each in held):
            return metric
        result: _ResultMetric = to(metric, device, *args, **kwargs)
        return result

    return moved
