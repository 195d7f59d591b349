"""The learning-rate range test (Smith, 2017): copies of a module train while the rate rises.

Lightning 2.6.6 has this test in `Tuner.lr_find`; `docs/upstream.md` lists the faults that keep it from serving.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from firstlight.callbacks.finite import not_finite
from firstlight.callbacks.graceful_shutdown import interruptible
from firstlight.callbacks.state import find_stateful, get_states, set_states
from firstlight.errors import UsageError, is_users, printing
from firstlight.optim import skip_nvml_check
from firstlight.preflight import draw, rules
from firstlight.preflight.lr_range import LOWEST, Suggestion, has_diverged, mean_curve, spaced, steps_in, suggest
from firstlight.preflight.probe import probe_splits
from firstlight.tasks import Task
from firstlight.tasks.gradient_weights import count_samples

ORDERS = 3
"""Orders of the data, each with a sweep."""
SECONDS = 60.0
"""Longest time of a sweep, unless it has the fewest steps."""
_TIMED = 6
"""Steps that are timed before. The fastest counts, so that other work on the machine does not change the sweeps."""
_ENDLESS = 10**6
"""Optimiser steps that schedules of the copies plan. A sweep ends long before."""


@dataclass
class Sweep:
    """Rates of optimiser steps, and the losses after them.

    Args:
        rates: Learning rate of each step, rising.
        losses: Loss of each step, before its update; one for each rate. The last one may not be finite.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Args:
        suggestion: The rate to use.
        sweeps: What was recorded, for each order of the data.
        own: The configured rate of the first parameter group.
        batch_size: Samples of an optimiser step, over all its batches and processes; 0 if unknown.
        epoch_steps: Optimiser steps of an epoch; infinite if unknown.
        step_seconds: Time of an optimiser step.
        processes: How many train together.
        seconds: Time of the whole test.
    """

    suggestion: Suggestion
    sweeps: Sequence[Sweep]
    own: float
    batch_size: int
    epoch_steps: float
    step_seconds: float
    processes: int
    seconds: float

    def lines(self) -> list[str]:
        """Return the smoothed losses as a plot, then steps and time."""
        curve = mean_curve(self.suggestion.curves)
        steps = sum(len(each.losses) for each in self.sweeps)
        return [
            f"loss     over the learning rate; ^ is the suggestion{', o yours' if self.own > 0 else ''}",
            *draw.range_as_text(curve.rates, curve.losses, self.suggestion.rate, self.own),
            f"test     {steps:,} steps on copies, {self.seconds:.2g} s",
        ]

    @property
    def sentence(self) -> str:
        """The suggestion, for which batches it holds, and its reason."""
        found = self.suggestion
        batches = f", batches of {self.batch_size:,}" if self.batch_size else ""
        return (
            f"lr {found.rate:.2g} ({found.low:.2g} to {found.high:.2g} over {len(self.sweeps)} orders of the data"
            f"{batches}): {found.reason}; yours is {self.own:.2g}"
        )

    def plot(self, path: Path) -> None:
        """Write a PNG with the losses of all sweeps."""
        sweeps = [(each.rates, each.losses) for each in self.sweeps]
        curves = [(each.rates, each.losses) for each in self.suggestion.curves]
        found = self.suggestion
        draw.range_as_png(path, sweeps, curves, (found.rate, found.low, found.high), self.own)


class RateSweep(Callback):
    """Raise the learning rate at each optimiser step, record the losses, and end the fit.

    Schedules do nothing meanwhile. Parameter groups keep the ratios of their rates; a rate is that of the first group.
    The loss of a step is the mean over its batches and processes, by their weights.

    Args:
        rates: One for each step.
        stop: Called with the losses so far; whether the sweep ends.
    """

    def __init__(self, rates: Sequence[float], stop: Callable[[Sequence[float]], bool]) -> None:
        self.rates, self.stop = rates, stop
        self.sweep = Sweep()
        self.own = math.nan
        self.step_seconds = math.inf
        self.batch_size = 0
        self.epoch_steps = math.inf
        self.processes = 1
        self._ratios: list[float] = []
        self._window = [0.0, 0.0, 0.0]
        self._ended = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no learning rate, and switch the schedules off."""
        groups = _only_optimizer(trainer, pl_module).param_groups
        peaks = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self.own = peaks[0]
        self._ratios = [peak / peaks[0] if peaks[0] > 0 else 1.0 for peak in peaks]
        self.epoch_steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.processes = trainer.world_size
        trainer.strategy.lr_scheduler_configs = []  # One that waits for a validation metric would raise.
        rules.refuse_single_samples(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the rate of the step to which the batch belongs."""
        rate = self.rates[len(self.sweep.losses)]
        for group, ratio in zip(trainer.optimizers[0].param_groups, self._ratios, strict=True):
            lr = group["lr"]
            group["lr"] = torch.full_like(lr, rate * ratio) if isinstance(lr, Tensor) else rate * ratio

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss; after the last batch of a step, record it, and end the fit if it was the last one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:  # `training_step` may leave a batch out.
            weight = float(pl_module.weight_of_batch()) if isinstance(pl_module, Task) else 1.0
            self._window[0] += weight * float(loss) * trainer.accumulate_grad_batches  # Lightning has divided it.
            self._window[1] += weight
        self._window[2] += count_samples(batch)
        if trainer.global_step == len(self.sweep.losses):
            return  # More batches are accumulated.
        total, weight, samples = _sum(trainer, self._window)
        self._window = [0.0, 0.0, 0.0]
        self.batch_size = max(self.batch_size, round(samples))
        self.sweep.rates.append(self.rates[len(self.sweep.losses)])
        self.sweep.losses.append(total / weight if weight else math.nan)
        now = time.perf_counter()
        self.step_seconds, self._ended = min(self.step_seconds, now - self._ended), now
        if len(self.sweep.losses) == len(self.rates) or self.stop(self.sweep.losses):
            if trainer.world_size > 1:  # All processes must make as many steps.
                self.step_seconds = trainer.strategy.broadcast(self.step_seconds)
            raise _TunerExitException  # Lightning ends the fit, without a validation.


class Fit(Protocol):
    """What a sweep needs of an experiment."""

    task: LightningModule
    datamodule: LightningDataModule
    options: Mapping[str, Any]

    def trainer(self, **changes: Any) -> Trainer:
        """Return a trainer; `changes` replace options."""


def range_test(fit: Fit, loop: Callable[[Trainer], AbstractContextManager[Any]]) -> RangeTest:
    """Return a learning rate for a fit, from sweeps over three orders of its data.

    Args:
        fit: The experiment. Its module, data order, random states and files stay as they are.
        loop: Context of a trainer's fit, for its speed.

    Raises:
        UsageError: When the fit cannot be tested so, or its loss falls at no rate.
    """
    started = time.perf_counter()
    rules.refuse_options(fit.options)
    probe_splits(fit.task, fit.datamodule, reads_test=False)
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    timed = run_sweep(fit, loop, [LOWEST] * _TIMED, lambda _: False, seed)
    steps = steps_in(SECONDS, timed.step_seconds)
    sweeps = [run_sweep(fit, loop, spaced(steps), has_diverged, seed + order) for order in range(ORDERS)]
    found = suggest([(each.sweep.rates, each.sweep.losses) for each in sweeps], sweeps[0].own)
    return RangeTest(
        found,
        [each.sweep for each in sweeps],
        own=sweeps[0].own,
        batch_size=sweeps[0].batch_size,
        epoch_steps=timed.epoch_steps,
        step_seconds=timed.step_seconds,
        processes=timed.processes,
        seconds=time.perf_counter() - started,
    )


def run_sweep(
    fit: Fit,
    loop: Callable[[Trainer], AbstractContextManager[Any]],
    rates: Sequence[float],
    stop: Callable[[Sequence[float]], bool],
    seed: int,
) -> RateSweep:
    """Train a copy of the module at rising rates, and return what was recorded.

    The module, the generators of its data, random states and the environment stay as they are. A step that makes the
    weights not finite ends the sweep.

    Args:
        fit: The experiment; its callbacks, loggers and validation are left out.
        loop: Context of a trainer's fit, for its speed.
        rates: Learning rate of each optimiser step.
        stop: Called with the losses so far; whether the sweep ends.
        seed: Of the order of the data, and of dropout.

    Raises:
        UsageError: When the module cannot be trained so.
    """
    recorder = RateSweep(rates, stop)
    # The command line, to which the optimiser's constructor refers, holds the data and their trainer.
    module = deepcopy(fit.task, {id(fit.datamodule): fit.datamodule})
    trainer = fit.trainer(
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=-1,
        max_steps=_ENDLESS,
        **dict.fromkeys(("min_epochs", "min_steps", "max_time")),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        fast_dev_run=False,
        detect_anomaly=False,
    )
    rules.refuse_sizes(fit.datamodule, trainer)
    skip_nvml_check()
    with _seeded(seed), _kept_generators(fit.datamodule), warnings.catch_warnings(), printing("quiet"):
        warnings.simplefilter("ignore")  # The run itself shows them.
        try:
            with loop(trainer), interruptible(trainer, lambda: "interrupted; nothing was written"):
                trainer.fit(module, datamodule=fit.datamodule)
        except MisconfigurationException as error:
            if is_users(error):
                raise
            raise UsageError(f"trainer: {error}") from error
        except RuntimeError:
            # Some losses of torch raise for outputs that are not finite.
            if not recorder.sweep.losses or not not_finite(module):
                raise
    rules.refuse_no_batches(trainer)
    return recorder


def _sum(trainer: Trainer, values: Sequence[float]) -> list[float]:
    """Return the sums of values over all processes."""
    if trainer.world_size == 1:
        return [*values]
    of_process = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(of_process, reduce_op="sum").tolist()


def _only_optimizer(trainer: Trainer, module: LightningModule) -> Optimizer:
    """Return the optimiser of a module, or refuse one whose learning rate nobody can set."""
    if not module.automatic_optimization:  # Otherwise Lightning refuses several optimisers.
        raise UsageError(f"lr sets the learning rate of each step, but {type(module).__name__} optimises by hand")
    optimizer = trainer.optimizers[0]
    if any("lr" not in group for group in optimizer.param_groups):
        raise UsageError(f"{type(optimizer).__name__} has no learning rate: no `lr` in its parameter groups")
    return optimizer


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all generators and new loaders in this context; restore generators and environment."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    with isolate_rng():
        seed_everything(seed, workers=True, verbose=False)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _kept_generators(datamodule: LightningDataModule) -> Iterator[None]:
    """Restore the random generators and the objects with a state that a data module holds."""
    objects = find_stateful({name: each for name, each in vars(datamodule).items() if name != "trainer"})
    states = deepcopy(get_states(objects))
    try:
        yield
    finally:
        set_states(objects, states)
