import numpy as np
import pytest
import torch

from firstlight.errors import UsageError
from tests.data.helpers import Arrays, ready

MARKS = np.array(["train"] * 60 + ["test"] * 20)


def marked(marks, **options):
    return Arrays(
        np.arange(len(marks) * 2.0).reshape(-1, 2), np.arange(len(marks)) % 2, ["a", "b"], options, split=marks
    )


def test_the_default_split_of_a_hundred_samples_is_70_15_15():
    data = ready(Arrays(np.random.default_rng(0).normal(size=(100, 2)), np.zeros(100)))
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 70, "val": 15, "test": 15}


def test_binary_columns_are_stratified_too():
    targets = (np.arange(200) % 20 == 0)[:, None].astype(float)
    data = ready(Arrays(np.zeros((200, 1)), targets, ["no", "yes"]))
    assert [data.dataset(split).targets.sum() for split in ("train", "val", "test")] == [7, 1, 2] or [
        int(data.dataset(split).targets.sum()) for split in ("train", "val", "test")
    ] == [7, 2, 1]


def test_a_marked_test_split_is_kept_and_validation_is_cut_from_training():
    data = ready(marked(MARKS, val_fraction=0.25))
    assert data.rows("test").tolist() == list(range(60, 80))
    assert (len(data.rows("train")), len(data.rows("val"))) == (45, 15)
    assert sorted([*data.rows("train"), *data.rows("val")]) == list(range(60))
    assert torch.bincount(data.dataset("val").targets).max() <= 8


def test_marks_of_all_three_splits_are_kept_in_their_order():
    marks = np.array(["val", "train", "test", "train"] * 5)
    data = ready(marked(marks))
    for split in ("train", "val", "test"):
        assert data.rows(split).tolist() == np.flatnonzero(marks == split).tolist()


def test_marks_stay_with_their_rows_when_others_are_dropped():
    inputs = np.zeros((80, 1))
    inputs[3] = np.nan
    data = ready(Arrays(inputs, np.arange(80) % 2, ["a", "b"], {"missing": "drop"}, split=MARKS))
    assert data.rows("test").tolist() == list(range(60, 80))


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["train"] * 40, "Arrays: the test split is empty: no row is marked test"),
        (["test"] * 40, "the train split is empty: no row is marked train"),
        (["train"] * 20 + ["tset"] * 20, "row 20 is marked as split tset: it is one of train, val, test"),
        (["train"] * 3 + ["test"] * 37, "too few samples of class b .row 1. to have one in each of 2 splits"),
        (["train"] * 39, "40 inputs but 39 marks"),
    ],
)
def test_marks_that_cannot_be_are_refused(marks, message):
    data = Arrays(np.zeros((40, 1)), np.arange(40) % 2, ["a", "b"], split=np.array(marks))
    with pytest.raises(UsageError, match=message):
        data.setup()


def test_a_split_of_no_samples_is_refused_by_name():
    with pytest.raises(UsageError, match=r"Arrays: the test split is empty: 0\.15 of 3 samples is 0"):
        Arrays(np.zeros((3, 1)), np.zeros(3)).setup()


@pytest.mark.parametrize("rows", [[17], [3, 17]])
def test_a_class_with_fewer_samples_than_splits_is_refused_by_its_rows(rows):
    targets = np.arange(40) % 2
    targets[rows] = 2
    listed = ", ".join(f"row {row}" for row in rows)
    with pytest.raises(UsageError, match=rf"^data.csv: too few samples of class c \({listed}\) .* each of 3 splits"):
        Arrays(np.zeros((40, 1)), targets, ["a", "b", "c"], source="data.csv").setup()


def test_a_split_smaller_than_the_number_of_classes_is_refused():
    with pytest.raises(UsageError, match="Arrays: 40 samples cannot be split: The test_size = 6"):
        Arrays(np.zeros((40, 1)), np.arange(40) % 10, list("abcdefghij")).setup()
