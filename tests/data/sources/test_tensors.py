import numpy as np
import pytest
import torch

from firstlight.data import Tensors
from firstlight.errors import UsageError
from tests.data.helpers import ready

NUMBERS = np.random.default_rng(0).normal(size=(40, 3))


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_arrays_and_tensors_give_the_same_data(convert):
    data = ready(Tensors(convert(NUMBERS), convert(np.arange(40) % 2)))
    assert data.class_names == ["0", "1"]
    assert data.dataset("test").targets.tolist() == (data.rows("test") % 2).tolist()
    assert data.state_dict()["digest"] == ready(Tensors(NUMBERS, np.arange(40) % 2)).state_dict()["digest"]


def test_own_split_is_kept():
    data = ready(Tensors(NUMBERS, NUMBERS[:, 0], split=["train"] * 20 + ["val"] * 10 + ["test"] * 10))
    assert data.rows("val").tolist() == list(range(20, 30))


def test_other_tensors_are_predicted_whole_and_the_same_keep_their_split():
    trained = ready(Tensors(NUMBERS, np.arange(40) % 2))
    for inputs, targets, count in (
        (NUMBERS[:5], None, 5),
        (NUMBERS[:5], np.zeros(5, int), 5),
        (NUMBERS, np.arange(40) % 2, 6),
    ):
        data = Tensors(inputs, targets)
        data.load_state_dict(trained.state_dict())
        assert len(data.predict_dataloader().dataset) == count


def test_inputs_that_are_not_numbers_are_refused():
    with pytest.raises(UsageError, match="Tensors was given inputs of type <U5: they must be numbers"):
        Tensors(np.array([["apple"]]), np.zeros(1))


def test_training_without_targets_is_refused():
    with pytest.raises(UsageError, match="Tensors was given no targets"):
        Tensors(NUMBERS).setup()
