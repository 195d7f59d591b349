import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes

from firstlight.data import BreastCancer, Diabetes
from tests.data.helpers import ready


def test_breast_cancer_equals_that_of_scikit_learn():
    data = ready(BreastCancer())
    features, labels = load_breast_cancer(return_X_y=True)
    assert data.class_names == ["malignant", "benign"]
    train = data.dataset("train")
    assert train.targets.tolist() == labels[data.rows("train"), None].tolist()
    raw = train.inputs * data.state_dict()["std"] + data.state_dict()["mean"]
    np.testing.assert_allclose(raw, features[data.rows("train")], rtol=1e-3, atol=1e-3)


def test_diabetes_keeps_its_units():
    data = ready(Diabetes())
    features, scores = load_diabetes(return_X_y=True, scaled=False)
    train = data.dataset("train")
    assert train.targets.tolist() == scores[data.rows("train"), None].tolist()
    raw = train.inputs * data.state_dict()["std"] + data.state_dict()["mean"]
    np.testing.assert_allclose(raw, features[data.rows("train")], rtol=1e-4, atol=1e-3)
