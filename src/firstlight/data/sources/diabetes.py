"""How far diabetes went on in a year, from ten measurements of 442 patients.

Source: Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression", 2004; it comes with scikit-learn.
"""

from sklearn.datasets import load_diabetes

from firstlight.data.base import DataModule
from firstlight.data.samples import Samples

__all__ = ["Diabetes"]


class Diabetes(DataModule):
    """Inputs `(B, 10)` float32, targets `(B, 1)` float32: a score from 25 to 346, as it is. Nothing is downloaded."""

    def load(self) -> Samples:
        """Return the measurements in their own units, and the scores."""
        # As scikit-learn scales them, every patient has a part in the statistics.
        found = load_diabetes(scaled=False)
        return Samples(found.data, found.target, columns=[*found.feature_names, "progression"])
