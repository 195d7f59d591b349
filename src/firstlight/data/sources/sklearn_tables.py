"""The tables that scikit-learn includes: breast cancer diagnoses and the progression of diabetes.

Sources: Street, Wolberg and Mangasarian, "Nuclear feature extraction for breast tumor diagnosis", 1993; Efron, Hastie,
Johnstone and Tibshirani, "Least Angle Regression", 2004.
"""

from sklearn.datasets import load_breast_cancer, load_diabetes

from firstlight.data.base import DataModule
from firstlight.data.samples import Samples


class BreastCancer(DataModule):
    """569 tumours with 30 measurements of their cell nuclei: malignant or benign. Nothing is downloaded.

    Inputs are `(B, 30)` float32, targets `(B, 1)` float32: 0 is malignant, 1 benign.
    """

    def load(self) -> Samples:
        """Return the measurements, the diagnoses and their names."""
        table = load_breast_cancer()
        names = [str(name) for name in table.target_names]
        return Samples(table.data, table.target[:, None], names, columns=[*table.feature_names.tolist(), "diagnosis"])


class Diabetes(DataModule):
    """442 patients with ten measurements: the progression of diabetes after one year. Nothing is downloaded.

    Inputs are `(B, 10)` float32, targets `(B, 1)` float32: a score from 25 to 346, not scaled.
    """

    def load(self) -> Samples:
        """Return the measurements in their own units, and the scores."""
        # scikit-learn's scaling would use statistics of all patients, including those of the test split.
        table = load_diabetes(scaled=False)
        return Samples(table.data, table.target, columns=[*table.feature_names, "progression"])
