"""What a fit has nothing of that would have a say in a step, asked once an epoch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _MaxSizeCycle
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["accumulates", "clips_itself", "comes_alone", "is_mixed", "is_plain", "preparations", "scheduler_of"]

_OF_ALL = (
    "backward",
    "batch_to_device",
    "on_train_batch_start",
    "post_training_step",
    "training_step",
    "validation_step",
)
"""What a strategy may have in a way of its own."""

_UNCHANGED = {DataHooks.on_before_batch_transfer, DataHooks.on_after_batch_transfer}


def is_plain(trainer: Trainer, module: LightningModule) -> bool:
    """Tell whether nothing but the module and its hooks has a say in a step."""
    strategy = trainer.strategy
    model = strategy.model
    quiet = all(getattr(type(strategy), name) is getattr(Strategy, name) for name in ("pre_backward", "post_backward"))
    alone = type(strategy) is SingleDeviceStrategy and model is module and quiet
    averages = (
        type(strategy) is DDPStrategy
        and strategy._model_averager is None
        and type(model) is DistributedDataParallel
        and model.module is module
    )
    usual = all(getattr(type(strategy), name) is getattr(Strategy, name) for name in _OF_ALL)
    return (
        module.automatic_optimization
        and (alone or averages)
        and usual
        and (type(strategy.precision_plugin) is Precision or is_mixed(trainer))
        and getattr(module.optimizer_step, "__func__", None) is LightningModule.optimizer_step
        and not isinstance(trainer.optimizers[0], LightningOptimizer)
    )


def is_mixed(trainer: Trainer) -> bool:
    """Tell whether a step is made in `torch.autocast` and is otherwise as in full precision: without a scaler."""
    precision = trainer.strategy.precision_plugin
    return type(precision) is MixedPrecision and precision.scaler is None


def accumulates(trainer: Trainer, loop: _TrainingEpochLoop) -> bool:
    """Tell whether the batch under way is followed by another one before the optimiser steps."""
    progress = loop.batch_progress
    ready: int = progress.current.ready
    return (
        ready % trainer.accumulate_grad_batches != 0
        and ready != trainer.num_training_batches
        and not progress.is_last_batch
    )


def comes_alone(fetcher: Any) -> bool:
    """Tell whether batches come from one loader, as they are, and until a number of them that is known."""
    combined = fetcher._combined_loader
    numbered = combined._iterator
    is_single = (
        type(combined) is CombinedLoader
        and type(numbered) is _MaxSizeCycle
        and len(numbered.iterators) == 1
        and combined._spec.is_leaf()
    )
    return is_single and fetcher.iterator is combined and fetcher.length is not None and not fetcher.batches


def preparations(trainer: Trainer) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Return what is done with a batch before it is trained with: name, function and further arguments."""
    selector = trainer._data_connector._datahook_selector
    assert selector is not None
    device = trainer.strategy.root_device
    found: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    for name, arguments in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        function = getattr(selector.get_instance(name), name)
        original = getattr(function, "__func__", None)
        if original is DataHooks.transfer_batch_to_device:
            found.append((name, partial(_stay_or, function), arguments))
        elif original not in _UNCHANGED:
            found.append((name, function, arguments))
    return found


def _stay_or(transfer: Callable[..., Any], batch: Any, device: torch.device, index: int) -> Any:
    """Leave a batch that is nothing but tensors on the device where it is."""
    if type(batch) is not tuple:
        return transfer(batch, device, index)
    for each in batch:
        if type(each) is not Tensor or each.device != device:
            return transfer(batch, device, index)
    return batch


def scheduler_of(strategy: Strategy, module: LightningModule | None) -> Any:
    """Return the schedule where there is but one, which is stepped after each step of the optimiser."""
    configs = strategy.lr_scheduler_configs
    if len(configs) != 1:
        return None
    (config,) = configs
    step = getattr(module, "lr_scheduler_step", None)
    usual = getattr(step, "__func__", None) is LightningModule.lr_scheduler_step
    each = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
    return config.scheduler if usual and each else None


def clips_itself(module: LightningModule) -> bool:
    """Tell whether a module clips gradients in a way of its own."""
    return any(
        getattr(getattr(module, name), "__func__", None) is not getattr(LightningModule, name)
        for name in ("configure_gradient_clipping", "clip_gradients")
    )
