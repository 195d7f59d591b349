"""How well the probabilities of a classifier agree with how often it is right.

Shapes: `N` samples, `K` classes, `M` bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Confidence and accuracy of predictions in bins of equal width.

    Args:
        confidence: Mean probability of the predicted class in each bin with samples, `(M,)`.
        accuracy: Share of right predictions, `(M,)`.
        samples: Number of samples, `(M,)`.
        error: Expected calibration error in [0, 1], the mean difference of both, weighted by samples.
    """

    confidence: Numbers
    accuracy: Numbers
    samples: NDArray[np.int64]
    error: float


def calibration(probabilities: Numbers, targets: NDArray[np.int64], bins: int = 15) -> Calibration:
    """Return the calibration of probabilities `(N, K)` of class targets `(N,)`.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, which takes 15 bins.
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == targets
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    filled = counts > 0
    mean = np.bincount(index, confidence, bins)[filled] / counts[filled]
    accuracy = np.bincount(index, is_right, bins)[filled] / counts[filled]
    error = float((counts[filled] * np.abs(mean - accuracy)).sum() / counts.sum())
    return Calibration(mean, accuracy, counts[filled], error)


def temperature(probabilities: Numbers, targets: NDArray[np.int64]) -> float:
    """Return the temperature in [0.05, 20] whose scaled logits have the least log loss. Source: Guo et al., 2017.

    A value above 1 means that the network is too sure.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        chosen = np.take_along_axis(scaled(probabilities, np.exp(log_temperature)), targets[:, None], axis=1)
        return float(-np.log(np.maximum(chosen, 1e-300)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log([0.05, 20.0]), method="bounded").x))


def scaled(probabilities: Numbers, temperature: float) -> Numbers:
    """Return the probabilities `(N, K)` whose logits are divided by a temperature."""
    logits = np.log(np.maximum(probabilities, 1e-300)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
