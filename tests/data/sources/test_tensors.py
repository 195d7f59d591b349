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


def test_two_classes_with_one_name_are_refused():
    with pytest.raises(UsageError, match=r"class_names=\['a', 'a'\]: no two names may be equal"):
        Tensors(NUMBERS, class_names=["a", "a"])


def test_training_without_targets_is_refused():
    with pytest.raises(UsageError, match="Tensors was given no targets"):
        Tensors(NUMBERS).setup()


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint64])
def test_classes_up_to_the_end_of_a_type_are_named_and_stratified(kind):
    highest = min(np.iinfo(kind).max, 255)
    labels = (np.arange(10 * (highest + 1)) % (highest + 1)).astype(kind)
    data = ready(Tensors(np.zeros((len(labels), 2)), labels))
    assert data.class_names == [str(label) for label in range(highest + 1)]
    counts = [torch.bincount(data.dataset(split).targets).tolist() for split in ("train", "val", "test")]
    assert [{*each} for each in counts] == [{7}, {1, 2}, {1, 2}]
    assert data.dataset("val").targets.tolist() == labels[data.rows("val")].tolist()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.arange(40) + 1_700_000_000, "40 integer targets up to 1700000039: .* a regression must be floats"),
        (np.full((40, 2), 2**64 - 1, np.uint64), "targets up to 18446744073709551615: integers must be below"),
        (np.ma.masked_less(np.arange(40.0), 3), "targets with masked values: they must be NaN"),
        (torch.eye(40).to_sparse(), "targets that are sparse or nested: they must be a dense"),
        (np.float64(3), "targets without an axis: the first axis must be the samples"),
    ],
)
def test_targets_that_would_change_on_the_way_are_refused(targets, message):
    with pytest.raises(UsageError, match=f"Tensors was given {message}"):
        Tensors(NUMBERS, targets).setup()


def test_bfloat16_is_read_as_it_is():
    values = torch.arange(120.0).reshape(40, 3).bfloat16()
    assert Tensors(values, values).load().inputs.tolist() == values.tolist()


def test_booleans_are_two_classes_and_stratified():
    labels = np.arange(40) % 10 == 0
    data = ready(Tensors(NUMBERS, labels, test_fraction=0.25, val_fraction=0.25))
    assert data.class_names == ["False", "True"]
    assert [data.dataset(split).targets.sum().item() for split in ("train", "val", "test")] == [2, 1, 1]
    again = Tensors(NUMBERS[:7], labels[:7])
    again.load_state_dict(data.state_dict())
    assert again.dataset("test").targets.tolist() == [[1.0], *[[0.0]] * 6]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(40) % 2 + 1, "class 0 has no sample in the train split, and 0 in all"),
        (-np.ones(40, int), "row 0 has the label -1"),
        (np.zeros(40, int), "all samples have the class 0: there must be at least two classes"),
    ],
)
def test_labels_that_are_not_0_to_the_number_of_classes_are_refused(labels, message):
    with pytest.raises(UsageError, match=f"^Tensors: {message}"):
        Tensors(NUMBERS, labels).setup()
