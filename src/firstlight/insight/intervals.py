"""Confidence intervals of a mean over repetitions of a run."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev


def mean_interval(values: Sequence[float], test_to_train: float = 0.0, level: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of the mean of `values`.

    Repetitions of a cross-validation share training samples, so their values vary less than independent ones would.
    `test_to_train` corrects the variance of the mean from `s² / n` to `s² (1 / n + test_to_train)`.

    Source: Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003.

    Args:
        values: One value for each repetition, at least 2.
        test_to_train: Scored samples by training samples of a repetition, at least 0. It is `1 / (n - 1)` for `n`
            folds. 0 is the t interval of independent values.
        level: Probability that the interval contains the mean, in (0, 1).

    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0], test_to_train=1 / 2)]
    [-1.928, 5.928]
    """
    from scipy.stats import t  # Its import takes half a second.

    scale = stdev(values) * sqrt(1 / len(values) + test_to_train)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * scale
    return fmean(values) - half, fmean(values) + half
