"""Learning-rate schedules: pure functions of the optimiser step.

A schedule is called as `schedule(step, total_steps)` and returns a factor in [0, 1]. The learning rate of that step is
the factor times the peak learning rate. `step` counts optimiser steps from 0; `total_steps` is the number of optimiser
steps of the whole run. A schedule has no state, so it can be plotted without training:

>>> from firstlight.schedules import WarmupCosine
>>> schedule = WarmupCosine(warmup_steps=3)
>>> [round(schedule(step, 8), 2) for step in range(9)]
[0.25, 0.5, 0.75, 1.0, 0.9, 0.65, 0.35, 0.1, 0.0]
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from firstlight.errors import UsageError, check_range

__all__ = ["Constant", "Cosine", "Schedule", "WarmupCosine"]


class Schedule(ABC):
    """Base class of all schedules."""

    @abstractmethod
    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor of the peak learning rate at `step`.

        Args:
            step: Optimiser steps done so far, from 0. They need not be whole in a run with a time limit.
            total_steps: Optimiser steps of the whole run, `math.inf` if unknown.

        Raises:
            UsageError: When the run has no steps, or when the schedule needs `total_steps` and it is infinite.
        """

    def warmup_steps_in(self, total_steps: float) -> int:
        """Return the number of warm-up steps in a run of `total_steps`."""
        return 0

    def with_fixed_warmup(self, total_steps: float) -> "Schedule":
        """Return this schedule with the warm-up steps that a run of `total_steps` has, whatever the new total is.

        A resumed run with more epochs calls it with its first total, so that it never repeats a part of its warm-up.
        """
        return self


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak learning rate at every step."""

    def __call__(self, step: float, total_steps: float) -> float:
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
        check_range("Cosine", "[0, 1]", floor=self.floor)

    def __call__(self, step: float, total_steps: float) -> float:
        """Return `floor + (1 - floor) * (1 + cos(pi * step / total_steps)) / 2`."""
        _check_total(self, total_steps)
        return _cosine(step / total_steps, self.floor)


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up (Goyal et al., "Accurate, Large Minibatch SGD", 2017), then `Cosine` over the remaining steps.

    With `W` warm-up steps, step `s < W` gives `(s + 1) / (W + 1)`: the first step is above 0, step `W` is the peak.

    Args:
        warmup: Warm-up as a share of the run, in [0, 1). The default is 0.05 if `warmup_steps` is not given either.
        warmup_steps: Warm-up in optimiser steps, at least 0, instead of `warmup`.
        floor: The factor at the end of the run, in [0, 1].
    """

    warmup: float | None = None
    warmup_steps: int | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse two warm-ups at once and values outside their range."""
        check_range("WarmupCosine", "[0, 1]", floor=self.floor)
        if self.warmup is not None and self.warmup_steps is not None:
            raise UsageError(
                f"WarmupCosine was given warmup={self.warmup} and warmup_steps={self.warmup_steps}: give one of them"
            )
        if self.warmup is not None:
            check_range("WarmupCosine", "[0, 1)", warmup=self.warmup)
        if self.warmup_steps is not None:
            check_range("WarmupCosine", "[0, inf)", warmup_steps=self.warmup_steps)

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor at `step`: linear during the warm-up, half a cosine afterwards."""
        warmup_steps = self.warmup_steps_in(total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return _cosine((step - warmup_steps) / (total_steps - warmup_steps), self.floor)

    def warmup_steps_in(self, total_steps: float) -> int:
        """Return the number of warm-up steps in a run of `total_steps`.

        Raises:
            UsageError: When the warm-up is not shorter than the run, or when the length of the run is unknown.
        """
        _check_total(self, total_steps)
        if self.warmup_steps is None:
            share = 0.05 if self.warmup is None else self.warmup
            return min(round(share * total_steps), int(total_steps) - 1)
        if self.warmup_steps >= total_steps:
            raise UsageError(
                f"WarmupCosine has warmup_steps={self.warmup_steps}, but the whole run is {total_steps} optimiser "
                "steps: shorten the warm-up or lengthen the run (a resumed run keeps its first warm-up)"
            )
        return self.warmup_steps

    def with_fixed_warmup(self, total_steps: float) -> "WarmupCosine":
        """Return this schedule with the warm-up steps that a run of `total_steps` has."""
        return WarmupCosine(warmup_steps=self.warmup_steps_in(total_steps), floor=self.floor)


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _check_total(schedule: Schedule, total_steps: float) -> None:
    if total_steps < 1:
        raise UsageError("the run has no optimiser steps: give it at least one")
    if not math.isfinite(total_steps):
        raise UsageError(
            f"{type(schedule).__name__} must know how many optimiser steps the run has: set trainer.max_steps, or "
            "trainer.max_epochs with a data loader that has a length"
        )
