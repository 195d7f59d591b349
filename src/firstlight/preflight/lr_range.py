"""From the losses of a learning-rate range test (Smith, "Cyclical Learning Rates", 2017) to a rate. Pure functions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.errors import UsageError

LOWEST, HIGHEST = 1e-7, 10.0
"""Rates between which a sweep rises."""
STEPS, FEWEST = 200, 60
"""Steps of a sweep, and of one whose steps take long."""
WORSE = 4.0
"""A sweep ends at so many times its lowest loss."""
WIDTH = 0.2
"""Standard deviation of the smoothing, in decades of the rate."""
RISE = 0.25
"""Share of its fall by which the loss rises when the rate is too high."""
SHARE = 2.0
"""The suggestion is the rate with the lowest loss, divided by this. With half the steps, the loss is lowest at about
twice the rate, because each rate acts half as long, so a sweep with fewer steps divides by more."""
_STRIDE = 3.0
_LEAST = 5
"""Finite losses without which a sweep shows nothing."""
_ERRORS = 5.0
"""Standard errors by which a loss must fall. Noise alone falls by as many in 5 % of range tests."""


@dataclass(frozen=True)
class Curve:
    """The smoothed losses of a sweep, up to its end.

    Args:
        rates: Learning rates, rising.
        losses: Smoothed loss after a step at each rate; finite.
        error: Standard error of a smoothed loss.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    error: float

    @property
    def lowest(self) -> float:
        """The rate with the lowest loss, before the loss rises again by more than `RISE` of its fall."""
        best = 0
        for place, loss in enumerate(self.losses):
            fall = self.losses[0] - self.losses[best]
            if fall > _ERRORS * self.error and loss > self.losses[best] + RISE * fall:
                break  # A loss that is lower at a still higher rate is luck.
            best = place if loss < self.losses[best] else best
        return self.rates[best]

    @property
    def falls(self) -> bool:
        """Whether the loss falls by more than chance."""
        return self.losses[0] - min(self.losses) > _ERRORS * self.error


@dataclass(frozen=True)
class Suggestion:
    """A learning rate and why.

    Args:
        rate: The median over the sweeps, with two digits.
        low: Lowest rate that a sweep suggests.
        high: Highest rate that a sweep suggests.
        reason: What the losses show.
        curves: The smoothed losses of each sweep.
        problem: Why the losses say nothing about the rate, which is the configured one then; `""`: they do.
    """

    rate: float
    low: float
    high: float
    reason: str
    curves: Sequence[Curve]
    problem: str = ""


def spaced(steps: int) -> list[float]:
    """Return the rates of the steps: from `LOWEST` to `HIGHEST`, each the same multiple of the one before.

    >>> [f"{rate:.0e}" for rate in spaced(5)]
    ['1e-07', '1e-05', '1e-03', '1e-01', '1e+01']
    """
    return [LOWEST * (HIGHEST / LOWEST) ** (index / (steps - 1)) for index in range(steps)]


def steps_in(seconds: float, of_step: float) -> int:
    """Return the steps of a sweep: `STEPS`, or as many as fit into `seconds`, at least `FEWEST`.

    >>> steps_in(60, 0.001), steps_in(60, 0.4), steps_in(60, 3)
    (200, 150, 60)
    """
    return min(STEPS, max(FEWEST, round(seconds / max(of_step, 1e-9))))


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether a sweep is over: the last loss is not finite, or the last three are far above the lowest one.

    That is `WORSE` times the lowest loss, unless it is near 0 or negative: then its distance to the first one counts.

    >>> has_diverged([2.0, 1.0, 9.0]), has_diverged([2.0, 1.0, 4.1, 9.0, 4.2]), has_diverged([2.0, 1.0, math.nan])
    (False, True, True)
    """
    if not math.isfinite(losses[-1]):
        return True
    return len(losses) > 3 and min(losses[-3:]) > _ceiling(min(losses), losses[0])


def smoothed(rates: Sequence[float], losses: Sequence[float]) -> Curve:
    """Return the losses after each rate, smoothed with a Gaussian over the logarithm of the rate, up to their end.

    Args:
        rates: Rising learning rates.
        losses: Loss of each step, before its update, so that a rate acts on the next loss. The last may not be finite.
    """
    after = [loss for loss in losses[1:] if math.isfinite(loss)]
    if len(after) < _LEAST:
        return Curve([], [], math.nan)
    known = np.log10(rates[: len(after)])
    top = 2 * _ceiling(min(after), losses[0]) - min(after)  # A loss of 1e30 would hide all others.
    clipped = np.minimum(after, top)
    weights = np.exp(-0.5 * (np.subtract.outer(known, known) / WIDTH) ** 2)
    smooth = [float(loss) for loss in weights @ clipped / weights.sum(1)]
    ends = (place for place in range(1, len(smooth)) if smooth[place] > _ceiling(min(smooth[:place]), smooth[0]))
    end = next(ends, len(smooth))
    before = clipped[: max(int(np.argmin(smooth[:end])), _LEAST)]
    noise = math.sqrt(float(np.mean(np.diff(before) ** 2)) / 2)
    middle = weights[len(weights) // 2]
    error = noise * math.sqrt(float((middle**2).sum())) / float(middle.sum())
    return Curve([*rates[:end]], smooth[:end], error)


def suggest(sweeps: Sequence[tuple[Sequence[float], Sequence[float]]], own: float) -> Suggestion:
    """Return the rate that sweeps over several orders of the data suggest.

    Args:
        sweeps: Rates and losses of each sweep.
        own: The configured rate.

    Raises:
        UsageError: When the loss is not finite before the first step, or does not fall by more than chance.
    """
    if wrong := [losses[0] for _, losses in sweeps if not math.isfinite(losses[0])]:
        raise UsageError(f"the loss is {wrong[0]} before the first step: firstlight check looks for the cause")
    curves = [smoothed(rates, losses) for rates, losses in sweeps]
    if not all(curve.rates for curve in curves) or not mean_curve(curves).falls:
        raise UsageError(
            f"the loss falls at no learning rate from {LOWEST:g} to {HIGHEST:g}, in {len(sweeps[0][0])} steps: "
            "firstlight check looks for the cause"
        )
    if mean_curve(curves).lowest > HIGHEST / 2:
        reason = f"the loss is lowest at the highest rate, {HIGHEST:g}"
        problem = (
            f"{reason}: an optimiser that limits its steps itself takes any rate, so the test says nothing; keep the "
            "rate that its documentation names, or try firstlight sweep"
        )
        return Suggestion(own, own, own, reason, curves, problem)
    lowest = [curve.lowest for curve in curves]
    share = SHARE * STEPS / (1 + round(math.log(HIGHEST / LOWEST) / math.log(sweeps[0][0][1] / sweeps[0][0][0])))
    found = [float(f"{rate / share:.2g}") for rate in lowest]
    reason = f"1/{share:.2g} of {statistics.median(lowest):.2g}, where the loss is lowest"
    return Suggestion(statistics.median(found), min(found), max(found), reason, curves)


def next_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate that a search for the lowest loss tries next; None when its neighbours are known.

    The search climbs in steps of 3, and then looks half a step to both sides of the best rate.

    Args:
        losses: Loss of each rate that was tried; infinite where training failed.

    >>> next_rate({0.1: 1.0}), next_rate({0.1: 1.0, 0.3: 2.0}), next_rate({0.1: 1.0, 0.3: 2.0, 0.033: 2.0})
    (0.3, 0.033, 0.17)
    >>> next_rate({0.1: 1.0, 0.3: 2.0, 0.033: 2.0, 0.17: 1.5, 0.058: 1.1})
    """
    best = min(losses, key=lambda rate: losses[rate])
    for factor in (_STRIDE, math.sqrt(_STRIDE)):
        for ratio in (factor, 1 / factor):
            near, far = sorted((best * ratio**0.5, best * ratio**1.1))
            if not any(near <= rate <= far for rate in losses):
                return float(f"{best * ratio:.2g}")
    return None


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of curves at the rates that all of them have."""
    shortest = min(curves, key=lambda curve: len(curve.rates))
    losses = [curve.losses[: len(shortest.rates)] for curve in curves]
    error = statistics.fmean(curve.error for curve in curves) / math.sqrt(len(curves))
    return Curve(shortest.rates, [statistics.fmean(each) for each in zip(*losses, strict=True)], error)


def _ceiling(lowest: float, first: float) -> float:
    """Return the loss from which a sweep is over."""
    return lowest + (WORSE - 1) * max(abs(lowest), first - lowest)
