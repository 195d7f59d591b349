"""Learning-rate schedules: pure functions of the optimiser step.

A schedule is called as `schedule(step, total_steps)` and returns the factor in [0, 1] by which the peak learning rate
is multiplied for that step. `step` counts optimiser steps from 0; `total_steps` is what the whole run plans to do.
Nothing is remembered between calls, so a schedule can be drawn without training:

>>> from firstlight.schedules import WarmupCosine
>>> schedule = WarmupCosine(warmup_steps=3)
>>> [round(schedule(step, 8), 2) for step in range(9)]
[0.25, 0.5, 0.75, 1.0, 0.9, 0.65, 0.35, 0.1, 0.0]
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from firstlight.errors import UsageError

__all__ = ["Constant", "Cosine", "Schedule", "WarmupCosine"]


class Schedule(ABC):
    """What every schedule offers."""

    @abstractmethod
    def __call__(self, step: int, total_steps: float) -> float:
        """Return the factor of the peak learning rate at `step`.

        Args:
            step: Optimiser steps done so far, from 0.
            total_steps: Optimiser steps that the run plans, `math.inf` where nobody knows.

        Raises:
            UsageError: When the run has no steps, or the schedule needs to know its end and `total_steps` is infinite.
        """

    def warmup_length(self, total_steps: float) -> int:
        """Return the number of steps that lie below the peak at the start of a run of `total_steps`."""
        return 0

    def continued(self, first_total: float) -> "Schedule":
        """Return the schedule for a run that was first planned with `first_total` steps and now has another horizon.

        What was planned in steps stays as it was, so that a warm-up is never repeated.
        """
        return self


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak learning rate at every step."""

    def __call__(self, step: int, total_steps: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to the floor (Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts).

    Args:
        floor: The factor at the end of the run, in [0, 1].
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a floor outside [0, 1]."""
        _check_floor(self.floor)

    def __call__(self, step: int, total_steps: float) -> float:
        """Return `floor + (1 - floor) * (1 + cos(pi * step / total_steps)) / 2`."""
        _check_horizon(self, total_steps)
        return _cosine(step / total_steps, self.floor)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """A linear warm-up (Goyal et al., "Accurate, Large Minibatch SGD", 2017), then `Cosine` over the steps that remain.

    With `W` warm-up steps, step `s < W` gives `(s + 1) / (W + 1)`: the first step already moves, step `W` is the peak.

    Args:
        warmup: Length of the warm-up as a share of the run, in [0, 1). 0.05 when neither length is given.
        warmup_steps: Length of the warm-up in optimiser steps, instead of `warmup`.
        floor: The factor at the end of the run, in [0, 1].
    """

    warmup: float | None = None
    warmup_steps: int | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse two lengths at once and values outside their range."""
        _check_floor(self.floor)
        if self.warmup is not None and self.warmup_steps is not None:
            raise UsageError(
                f"WarmupCosine was given warmup={self.warmup} and warmup_steps={self.warmup_steps}: give one of them"
            )
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise UsageError(f"WarmupCosine was given warmup={self.warmup}: it is a share of the run, in [0, 1)")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UsageError(f"WarmupCosine was given warmup_steps={self.warmup_steps}: it cannot be negative")

    def __call__(self, step: int, total_steps: float) -> float:
        """Return the factor at `step`: linear during the warm-up, half a cosine afterwards."""
        warmup_steps = self.warmup_length(total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return _cosine((step - warmup_steps) / (total_steps - warmup_steps), self.floor)

    def warmup_length(self, total_steps: float) -> int:
        """Return the number of warm-up steps in a run of `total_steps`.

        Raises:
            UsageError: When the warm-up does not end before the run does, or nobody knows when that is.
        """
        _check_horizon(self, total_steps)
        if self.warmup_steps is None:
            share = 0.05 if self.warmup is None else self.warmup
            return min(round(share * total_steps), int(total_steps) - 1)
        if self.warmup_steps >= total_steps:
            raise UsageError(
                f"WarmupCosine has warmup_steps={self.warmup_steps}, but the whole run is {total_steps} optimiser "
                "steps: make the warm-up shorter or the run longer (one that goes on keeps its first warm-up)"
            )
        return self.warmup_steps

    def continued(self, first_total: float) -> "WarmupCosine":
        """Return the schedule with the warm-up as many steps long as it was when the run was first planned."""
        return WarmupCosine(warmup_steps=self.warmup_length(first_total), floor=self.floor)


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _check_floor(floor: float) -> None:
    if not 0 <= floor <= 1:
        raise UsageError(f"floor={floor} is no factor of the peak learning rate: it lies in [0, 1]")


def _check_horizon(schedule: Schedule, total_steps: float) -> None:
    if total_steps < 1:
        raise UsageError("the run has no optimiser steps: give it at least one")
    if not math.isfinite(total_steps):
        raise UsageError(
            f"{type(schedule).__name__} must know how many optimiser steps the run has: set trainer.max_steps, or "
            "trainer.max_epochs with a data loader that has a length"
        )
