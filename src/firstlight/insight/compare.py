"""Intervals of metrics and of differences between runs, and what they show in words.

Three things vary: the test samples, the seeds and the folds. Which of them counts follows from what is given:

- One run on each side: the samples. Differences are paired by sample. The interval is Student's, and a difference of
  accuracies must also pass McNemar's test. It tells which of the two checkpoints is better.
- Several seeds: seeds and samples, both random. See `difference_of_groups`. It tells which configuration is better.
- Folds: see `of_folds`.

`docs/compare.md` shows how often each is right. Shapes: `S` runs, `N` samples, `k` folds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]

LEVEL = 0.95
"""Confidence of an interval."""

_POWER = float(stats.norm.ppf(0.8))
_MAX_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A value with its interval. NaN ends: the interval is unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Difference(Interval):
    """A difference with its interval.

    Args:
        is_shown: Whether the difference is not 0, at the confidence of the interval.
        p: The p-value of its test, NaN if there is none.
        needed: What would show the difference if it is as large as it seems, with a power of 80 %; or `""`.
    """

    is_shown: bool = False
    p: float = math.nan
    needed: str = ""


def of_share(right: Array, level: float = LEVEL) -> Interval:
    """Return the share of samples `(N,)` that are right, with Wilson's interval."""
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(level, "wilson")
    return Interval(float(right.mean()), float(found.low), float(found.high))


def of_samples(values: Array, level: float = LEVEL) -> Interval:
    """Return the mean of independent values `(N,)` with Student's interval.

    A BCa bootstrap is no better, see `docs/compare.md`.
    """
    mean = float(values.mean())
    return _student(mean, float(stats.sem(values)), len(values) - 1, level) if len(values) > 1 else Interval(mean)


def of_runs(values: Array, level: float = LEVEL) -> Interval:
    """Return the mean of runs: over seeds and samples for `(S, N)`, over seeds for `(S,)`; `S` is at least 2."""
    parts = _parts(values)
    return _student(parts.mean, math.sqrt(parts.variance), parts.freedom, level)


def difference_of_samples(a: Array, b: Array, level: float = LEVEL) -> Difference:
    """Return `b - a` for one run on each side, paired by sample `(N,)`.

    If all values are 0 or 1, the difference also has to pass McNemar's test. Its p-value is the mid-p, because the
    exact one is conservative if few samples differ. Source: Fagerland et al., "The McNemar test for binary
    matched-pairs data", 2013.
    """
    each = b - a
    found = of_samples(each, level)
    low, high, p = found.low, found.high, math.nan
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        p = mcnemar(int((each > 0).sum()), int((each < 0).sum()))
        if not each.any():  # As many samples may hide a difference of this size.
            high = 1 - ((1 - level) / 2) ** (1 / len(each))
            low = -high
    is_shown = not low <= 0 <= high and not p >= 1 - level
    needed = ""
    if not is_shown and found.value:
        size = ((stats.norm.ppf((1 + level) / 2) + _POWER) * each.std(ddof=1) / found.value) ** 2
        needed = f"about {_rounded(max(size - len(each), 1))} more test samples would be needed"
    return Difference(found.value, low, high, is_shown, p, needed)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided mid-p of McNemar's test for the samples that only one of two runs has right.

    >>> round(mcnemar(9, 1), 4)
    0.0117
    """
    count = better + worse
    if not count:
        return 1.0
    exact = stats.binomtest(better, count).pvalue
    return float(exact - stats.binom.pmf(better, count, 0.5))


def difference_of_groups(a: Array, b: Array, is_paired: bool = False, level: float = LEVEL) -> Difference:
    """Return `b - a` for several runs on a side: over seeds and samples for `(S, N)`, over seeds for `(S,)`.

    Runs and samples are two crossed random factors. The variance of the mean is that of the seeds, plus what the
    samples add; the degrees of freedom are Satterthwaite's. Source: Hillis et al., "Recent developments in the
    Dorfman-Berbaum-Metz procedure for multireader ROC study analysis", 2008, where readers are seeds here, and cases
    samples. A two-level bootstrap is not calibrated: for two equal configurations it shows a difference in 0.5 %.

    Args:
        a: Values of the runs of one side. One run is taken to vary as much as those of the other side.
        b: Values of the other side.
        is_paired: Whether runs at the same place belong together, for example by their seed.
        level: Confidence of the interval.
    """
    if is_paired:
        parts = _parts(b - a)
    else:
        parts = _joined(_parts(a, b), _parts(b, a), a, b)
    found = _student(parts.mean, math.sqrt(parts.variance), parts.freedom, level)
    is_known = parts.variance > 0
    is_shown = not found.low <= 0 <= found.high
    p = float(2 * stats.t.sf(abs(found.value) / math.sqrt(parts.variance), parts.freedom)) if is_known else math.nan
    seeds = min(len(a), len(b))
    needed = "" if is_shown or not is_known or not found.value else _seeds_needed(parts, seeds, level)
    return Difference(found.value, found.low, found.high, is_shown, p, needed)


def difference_of_folds(a: Array, b: Array, level: float = LEVEL) -> Difference:
    """Return `b - a` for two runs of the same folds, `(k,)` each, with the correction of Nadeau and Bengio.

    Training sets of folds overlap, so their differences are not independent: the variance is
    `(1 / k + 1 / (k - 1)) * s**2`. Source: Nadeau and Bengio, "Inference for the generalization error", 2003.
    """
    each, folds = b - a, len(a)
    error = math.sqrt((1 / folds + 1 / (folds - 1)) * each.var(ddof=1))
    found = _student(float(each.mean()), error, folds - 1, level)
    p = float(2 * stats.t.sf(abs(found.value) / error, folds - 1)) if error else math.nan
    return Difference(found.value, found.low, found.high, not found.low <= 0 <= found.high, p)


def of_folds(values: Array, level: float = LEVEL) -> Interval:
    """Return the mean over folds `(k,)` with the interval of `difference_of_folds`."""
    found = difference_of_folds(np.zeros(len(values)), values, level)
    return Interval(found.value, found.low, found.high)


def sign_flip(differences: Array) -> float:
    """Return the two-sided p-value of the sign-flip test for the differences `(S,)` of pairs; at least `2 / 2**S`.

    >>> sign_flip(np.array([0.5, 0.9, 0.7, 0.8, 0.6]))
    0.0625
    """
    return float(stats.permutation_test((differences,), np.mean, permutation_type="samples").pvalue)


@dataclass(frozen=True)
class _Parts:
    """The mean of runs, and what its variance comes from."""

    mean: float
    seeds: float  # Variance of the mean from seeds.
    samples: float  # What the choice of samples adds.
    freedom: float

    @property
    def variance(self) -> float:
        return self.seeds + self.samples


def _parts(values: Array, others: Array | None = None) -> _Parts:
    """Return the parts of the mean of `(S, N)` or `(S,)`; a single run has the variances of `others`."""
    known = values if len(values) > 1 or others is None else others
    runs = known if known.ndim == 1 else known.mean(1)
    seeds = float(runs.var(ddof=1)) / len(values)
    samples, _ = (0.0, 0.0) if known.ndim == 1 else _of_samples(known)
    return _with_freedom(float(values.mean()), seeds, samples, len(runs) - 1, known)


def _joined(a: _Parts, b: _Parts, values_a: Array, values_b: Array) -> _Parts:
    """Return the parts of `b - a` of independent runs on the same samples."""
    seeds = a.seeds + b.seeds
    counts = [len(each) for each in (values_a, values_b)]
    if min(counts) == 1:
        freedom = float(max(counts) - 1)
    else:
        below = a.seeds**2 / (counts[0] - 1) + b.seeds**2 / (counts[1] - 1)
        freedom = seeds**2 / below if below else float(sum(counts) - 2)
    samples = 0.0
    if values_a.ndim == 2:
        of_columns = (values_b.mean(0) - values_a.mean(0)).var(ddof=1) / values_a.shape[1]
        noise = 0.0
        for values, others in ((values_a, values_b), (values_b, values_a)):
            known = values if len(values) > 1 else others
            noise += _of_samples(known)[1] * len(known) / len(values)
        samples = max(0.0, float(of_columns) - noise)
    return _with_freedom(b.mean - a.mean, seeds, samples, freedom, values_a)


def _with_freedom(mean: float, seeds: float, samples: float, freedom: float, values: Array) -> _Parts:
    if samples:
        below = seeds**2 / freedom + samples**2 / (values.shape[1] - 1)
        freedom = (seeds + samples) ** 2 / below
    return _Parts(mean, seeds, samples, freedom)


def _of_samples(values: Array) -> tuple[float, float]:
    """Return what samples add to the variance of the mean of `(S, N)`, and the part of it that is interaction."""
    runs, samples = values.shape
    residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    noise = float((residuals**2).sum()) / ((runs - 1) * (samples - 1)) / (runs * samples)
    return max(0.0, float(values.mean(0).var(ddof=1)) / samples - noise), noise


def _seeds_needed(parts: _Parts, seeds: int, level: float) -> str:
    """Return how many more seeds on each side would show the difference, if it is as large as it seems."""
    counts = np.arange(seeds + 1, _MAX_SEEDS + 1)
    reach = stats.t.ppf((1 + level) / 2, counts - 1) + _POWER
    enough = counts[abs(parts.mean) >= reach * np.sqrt(parts.seeds * seeds / counts + parts.samples)]
    if len(enough):
        more = int(enough[0]) - seeds
        return f"{more} more seed{'s' * (more > 1)} would be needed"
    if parts.samples * (stats.norm.ppf((1 + level) / 2) + _POWER) ** 2 >= parts.mean**2:
        return "more seeds alone would not be enough: there are too few test samples"
    return f"more than {_MAX_SEEDS:,} seeds would be needed"


def _student(mean: float, error: float, freedom: float, level: float) -> Interval:
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * float(error) if error else 0.0
    return Interval(mean, mean - half, mean + half)


def _rounded(count: float) -> str:
    """Return a number with two digits that count.

    >>> _rounded(1234.5)
    '1,200'
    """
    return f"{float(f'{count:.2g}'):,.0f}"
