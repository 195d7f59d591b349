"""End a run, and its schedule, when a time is over."""

import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from firstlight.data import DataModule
from firstlight.errors import UsageError, check_range, check_saved
from firstlight.tasks import Task

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_CERTAIN = 16
"""Optimiser steps after which a plan is precise enough to refuse a warm-up."""


def parse_time(text: str) -> float:
    """Return the seconds of a time such as `90s`, `10m`, `2h` or `1h30m`.

    >>> parse_time("90s"), parse_time("1h30m")
    (90.0, 5400.0)
    """
    number = r"\d+(?:\.\d+)?"
    if not re.fullmatch("".join(f"(?:{number}{unit})?" for unit in _UNITS), text) or not text:
        raise UsageError(
            f"time {text!r} is not a time: write days, hours, minutes and seconds, for example 90s, 10m or 1h30m"
        )
    seconds = sum(float(value) * _UNITS[unit] for value, unit in re.findall(f"({number})(.)", text))
    check_range("time", "[1, inf)", seconds=seconds)
    return seconds


def steps_that_fit(seconds: float, step: float, pause: float, until_pause: int, per_pause: float) -> int:
    """Return how many optimiser steps fit into a time.

    Args:
        seconds: The time that is left, without what follows the last step.
        step: Seconds of an optimiser step.
        pause: Seconds of a pause: a validation, a checkpoint, or what else separates two epochs.
        until_pause: Steps until the next pause, at least 1.
        per_pause: Steps from one pause to the next, infinite if there is none.

    >>> steps_that_fit(10, step=1, pause=2, until_pause=3, per_pause=4)
    7
    """
    if seconds <= 0:
        return 0
    if seconds < until_pause * step + pause or math.isinf(per_pause):
        return int(min(seconds / step, until_pause if math.isfinite(per_pause) else math.inf))
    seconds -= until_pause * step + pause
    pauses, rest = divmod(seconds, per_pause * step + pause)
    return int(until_pause + pauses * per_pause + min(per_pause, rest / step))


class TimeLimit(Callback):
    """Plan the steps of a fit so that it ends when a time is over, with all that follows its last step.

    The seconds of an optimiser step and of a pause (validation, checkpoint, start of an epoch) are measured, without
    the first step, which is slow. The plan is made after 2, 3, 5, 9, ... steps. Later, it is made again each time a
    twentieth of the remaining steps is done. The schedule of a task follows the plan; another module is only stopped.
    The first process decides for all.

    The state holds the time used and the speed: a resumed run trains for the rest of its time.

    Args:
        seconds: Seconds of the whole run, with what it used before it was resumed.
        started: When the run started, by `clock`; `None` is the start of the fit.
        tests: Whether a test follows the fit.
        clock: Returns the time in seconds.

    Attributes:
        is_over: Whether the fit has done all steps that fit into the time.
    """

    def __init__(
        self,
        seconds: float,
        started: float | None = None,
        tests: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_range("TimeLimit", "(0, inf)", seconds=seconds)
        self.seconds, self.started, self.tests, self.clock = seconds, started, tests, clock
        self.is_over = False
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and tell a task that the time decides its plan."""
        if stage == "fit":
            self._began = self.clock() if self.started is None else self.started
            self.is_over, self._saved = False, {}
            self._step_seconds = self._pause_seconds = self._longest_pause = 0.0
            if isinstance(pl_module, Task):
                pl_module.optimization.is_timed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan at once if a resumed run knows its speed, and end it if its time is used up."""
        self._since: float | None = None  # When the steps that are measured began.
        self._pause_since: float | None = None
        self._paused = 0.0
        self._steps, self._pauses = [0.0, 0.0], [0.0, 0.0]  # Seconds and their number; older ones count less.
        self._step = trainer.global_step
        self._end = math.inf
        if self._saved:
            names = ("step_seconds", "pause_seconds", "longest_pause")
            self._step_seconds, self._pause_seconds, self._longest_pause = (self._saved[name] for name in names)
            is_over = self._saved["is_over"] and self.seconds <= self._saved["seconds"]
            if is_over or (self._step_seconds and not self._plan(trainer, pl_module)):
                self.is_over = trainer.should_stop = True
        self._next = self._step + 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End a pause."""
        if self._pause_since is not None:
            seconds, self._pause_since = self.clock() - self._pause_since, None
            if not self._pauses[1]:
                self._next = trainer.global_step + 1  # All processes see their first pause here.
            self._pauses = [self._pauses[0] + seconds, self._pauses[1] + 1]
            self._paused += seconds
            self._longest_pause = max(self._longest_pause, seconds)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Plan again if it is due, and stop after the last step of the plan."""
        step = trainer.global_step
        if step < self._next:
            return
        if self._since is None:
            self._since, self._step, self._paused = self.clock(), step, 0.0
            self._next = step + 1
            return
        if step < self._end:
            now, done = self.clock(), step - self._step
            self._steps = [self._steps[0] / 2 + now - self._since - self._paused, self._steps[1] / 2 + done]
            self._since, self._step, self._paused = now, step, 0.0
            self._step_seconds = max(self._steps[0] / self._steps[1], 1e-9)
            if self._pauses[1]:
                self._pause_seconds = self._pauses[0] / self._pauses[1]
                self._pauses = [self._pauses[0] / 2, self._pauses[1] / 2]
            left = self._plan(trainer, pl_module)
            self._next = step + max(1, min(left // 20, 2 * done))
        if step >= self._end:
            self.is_over = trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pause."""
        if not trainer.sanity_checking:
            self._begin_pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pause, unless a validation has begun it."""
        self._begin_pause()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds that the run has used and was given, its speed, and whether its time is over."""
        return {
            "used": self._used(),
            "seconds": self.seconds,
            "step_seconds": self._step_seconds,
            "pause_seconds": self._pause_seconds,
            "longest_pause": self._longest_pause,
            "is_over": self.is_over,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, or refuse a damaged one."""
        names = ("used", "seconds", "step_seconds", "pause_seconds", "longest_pause")
        check_saved("the time limit", state_dict, **dict.fromkeys(names, int | float))
        values = [state_dict[name] for name in names]
        if not all(0 <= value < math.inf for value in values) or not isinstance(state_dict.get("is_over"), bool):
            raise UsageError("the checkpoint is damaged: the state of the time limit holds a value that is not a time")
        self._saved = state_dict

    @property
    def seconds_left(self) -> float:
        """Seconds that the fit still has, for the test as well."""
        return max(0.0, self.seconds - self._used())

    def _used(self) -> float:
        return float(self._saved.get("used", 0)) + self.clock() - self._began

    def _begin_pause(self) -> None:
        if self._pause_since is None:
            self._pause_since = self.clock()

    def _plan(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Plan the steps that are left, and return their number: the same on all processes."""
        step = trainer.global_step
        left = trainer.strategy.broadcast(self._left(trainer))
        if math.isfinite(self._end):  # A last delay must not keep the schedule from its end.
            left = max(left, int(min(self._end - step, math.ceil(step / 100))))
        limit = pl_module.optimization.limit(trainer) - step if isinstance(pl_module, Task) else math.inf
        self._end = step + left if left < limit else math.inf  # The trainer stops at its own limit.
        if isinstance(pl_module, Task):
            # One step says little of the speed: it does not yet refuse a long warm-up.
            with suppress(UsageError) if self._steps[1] < _CERTAIN / 2 else nullcontext():
                pl_module.optimization.plan_end(trainer, int(min(left, limit)))
        return left

    def _left(self, trainer: Trainer) -> int:
        """Return how many steps fit into what is left of the time, by the clock of this process."""
        accumulated = trainer.accumulate_grad_batches
        batches: float = trainer.num_training_batches
        pause, longest = self._pause_seconds, self._longest_pause
        if not longest:  # A guess for the first plans: a batch of validation takes as long as one of training.
            validated = sum(trainer.num_val_batches)
            pause = longest = self._step_seconds / accumulated * (validated if math.isfinite(validated) else 1)
        if isinstance(trainer.val_check_batch, int):
            batches = min(batches, trainer.val_check_batch)
        per_pause: float = batches if math.isinf(batches) else math.ceil(batches / accumulated)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready // accumulated
        until_pause = int(per_pause - done % per_pause) if math.isfinite(per_pause) else 1
        end = longest * (1 + self._test_share(trainer))
        seconds = self.seconds - self._used() - end
        return steps_that_fit(seconds, self._step_seconds, pause, until_pause, per_pause)

    def _test_share(self, trainer: Trainer) -> float:
        """Return how long the test at the end takes, as a multiple of a validation."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # set outside the class
        if not self.tests:
            return 0
        if isinstance(data, DataModule) and len(data.indices["val"]):
            return len(data.indices["test"]) / len(data.indices["val"])
        return 1
