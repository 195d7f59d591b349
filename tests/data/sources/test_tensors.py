import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

from firstlight.data import BreastCancer, Diabetes, Tensors
from firstlight.errors import UsageError
from tests.data.helpers import ready

NUMBERS = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.parametrize("as_what", [np.asarray, torch.as_tensor])
def test_arrays_and_tensors_are_the_same(as_what):
    data = ready(Tensors(as_what(NUMBERS), as_what(np.arange(40) % 2)))
    assert data.class_names == ["0", "1"]
    assert data.dataset("test").targets.tolist() == (data.rows("test") % 2).tolist()
    assert data.state_dict()["digest"] == ready(Tensors(NUMBERS, np.arange(40) % 2)).state_dict()["digest"]


def test_a_split_that_was_given_is_kept():
    data = ready(Tensors(NUMBERS, NUMBERS[:, 0], split=["train"] * 20 + ["val"] * 10 + ["test"] * 10))
    assert data.rows("val").tolist() == list(range(20, 30))


def test_other_tensors_are_all_predicted_and_the_same_ones_keep_their_test_split():
    trained = ready(Tensors(NUMBERS, np.arange(40) % 2))
    for inputs, targets, count in (
        (NUMBERS[:5], None, 5),
        (NUMBERS[:5], np.zeros(5, int), 5),
        (NUMBERS, np.arange(40) % 2, 6),
    ):
        data = Tensors(inputs, targets)
        data.load_state_dict(trained.state_dict())
        assert len(data.predict_dataloader().dataset) == count


def test_what_is_no_number_is_refused():
    with pytest.raises(UsageError, match="Tensors was given inputs of type <U5: they are numbers"):
        Tensors(np.array([["apple"]]), np.zeros(1))


def test_nothing_is_learned_without_targets():
    with pytest.raises(UsageError, match="Tensors was given no targets"):
        Tensors(NUMBERS).setup()


def test_the_diagnoses_of_breast_cancer_are_those_of_scikit_learn():
    data = ready(BreastCancer())
    features, labels = load_breast_cancer(return_X_y=True)
    assert data.class_names == ["malignant", "benign"]
    train = data.dataset("train")
    assert train.targets.tolist() == labels[data.rows("train"), None].tolist()
    raw = train.inputs * data.state_dict()["std"] + data.state_dict()["mean"]
    np.testing.assert_allclose(raw, features[data.rows("train")], rtol=1e-3, atol=1e-3)


def test_diabetes_has_its_own_units():
    data = ready(Diabetes())
    features, scores = load_diabetes(return_X_y=True, scaled=False)
    train = data.dataset("train")
    assert train.targets.tolist() == scores[data.rows("train"), None].tolist()
    raw = train.inputs * data.state_dict()["std"] + data.state_dict()["mean"]
    np.testing.assert_allclose(raw, features[data.rows("train")], rtol=1e-4, atol=1e-3)
