"""Tumours described by 30 measurements of their cell nuclei: 569 samples, malignant or benign.

Source: Street, Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor diagnosis", 1993; it comes with
scikit-learn.
"""

from sklearn.datasets import load_breast_cancer

from firstlight.data.base import DataModule
from firstlight.data.samples import Samples

__all__ = ["BreastCancer"]


class BreastCancer(DataModule):
    """Inputs `(B, 30)` float32, targets `(B, 1)` float32: 0 is malignant, 1 benign. Nothing is downloaded."""

    def load(self) -> Samples:
        """Return the measurements, the diagnoses and their names."""
        found = load_breast_cancer()
        names = [str(name) for name in found.target_names]
        return Samples(found.data, found.target[:, None], names, columns=[*found.feature_names.tolist(), "diagnosis"])
