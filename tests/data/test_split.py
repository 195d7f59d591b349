import numpy as np
import pytest
import torch

from firstlight.errors import UsageError
from tests.data.helpers import Arrays, ready

SPLIT = np.array(["train"] * 60 + ["test"] * 20)


def with_split(split, **options):
    inputs = np.arange(len(split) * 2.0).reshape(-1, 2)
    return Arrays(inputs, np.arange(len(split)) % 2, ["a", "b"], options, split=split)


def test_default_split_of_100_samples_is_70_15_15():
    data = ready(Arrays(np.random.default_rng(0).normal(size=(100, 2)), np.zeros(100)))
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 70, "val": 15, "test": 15}


def test_binary_targets_are_stratified():
    targets = (np.arange(200) % 20 == 0)[:, None].astype(float)
    data = ready(Arrays(np.zeros((200, 1)), targets, ["no", "yes"]))
    assert [data.dataset(split).targets.sum() for split in ("train", "val", "test")] == [7, 1, 2] or [
        int(data.dataset(split).targets.sum()) for split in ("train", "val", "test")
    ] == [7, 2, 1]


def test_own_test_split_is_kept_and_validation_is_taken_from_training():
    data = ready(with_split(SPLIT, val_fraction=0.25))
    assert data.rows("test").tolist() == list(range(60, 80))
    assert (len(data.rows("train")), len(data.rows("val"))) == (45, 15)
    assert sorted([*data.rows("train"), *data.rows("val")]) == list(range(60))
    assert torch.bincount(data.dataset("val").targets).max() <= 8


def test_own_splits_keep_their_order():
    own = np.array(["val", "train", "test", "train", "train"] * 5)
    data = ready(with_split(own))
    for split in ("train", "val", "test"):
        assert data.rows(split).tolist() == np.flatnonzero(own == split).tolist()


def test_own_split_follows_its_rows_when_others_are_dropped():
    inputs = np.zeros((80, 1))
    inputs[3] = np.nan
    data = ready(Arrays(inputs, np.arange(80) % 2, ["a", "b"], {"missing": "drop"}, split=SPLIT))
    assert data.rows("test").tolist() == list(range(60, 80))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["train"] * 40, "Arrays: the test split is empty: no row has split=test"),
        (["test"] * 40, "the train split is empty: no row has split=train"),
        (["train"] * 20 + ["tset"] * 20, "row 20 has split=tset: it must be one of train, val, test"),
        (
            ["train"] * 3 + ["test"] * 37,
            "class b has too few samples \\(row 1\\): it must have at least 2, one for",
        ),
        (["train"] * 39, "40 inputs, but 39 entries of split"),
    ],
)
def test_invalid_own_splits_are_refused(split, message):
    data = Arrays(np.zeros((40, 1)), np.arange(40) % 2, ["a", "b"], split=np.array(split))
    with pytest.raises(UsageError, match=message):
        data.setup()


def test_empty_split_is_refused_by_name():
    with pytest.raises(UsageError, match=r"Arrays: the test split is empty: test_fraction=0\.15 of 3 samples is 0"):
        Arrays(np.zeros((3, 1)), np.zeros(3)).setup()
    with pytest.raises(UsageError, match=r"the train split is empty: val_fraction=0\.51 of 2 samples is 1"):
        Arrays(np.zeros((2, 1)), np.zeros(2), options={"val_fraction": 0.51, "test_fraction": 0.48}).setup()


@pytest.mark.parametrize("rows", [[17], [3, 17]])
def test_class_with_fewer_samples_than_splits_is_refused_by_its_rows(rows):
    targets = np.arange(40) % 2
    targets[rows] = 2
    listed = ", ".join(f"row {row}" for row in rows)
    found = rf"^data.csv: class c has too few samples \({listed}\): it must have at least 3, one for each split"
    with pytest.raises(UsageError, match=found):
        Arrays(np.zeros((40, 1)), targets, ["a", "b", "c"], source="data.csv").setup()


def test_split_smaller_than_the_number_of_classes_is_refused():
    with pytest.raises(UsageError, match="Arrays: 40 samples cannot be split: The test_size = 6"):
        Arrays(np.zeros((40, 1)), np.arange(40) % 10, list("abcdefghij")).setup()


def labelled(labels, split=None, columns=1):
    names = [str(label) for label in range(max(columns if columns > 1 else int(np.max(labels)) + 1, 2))]
    return Arrays(np.zeros((len(labels), 1)), labels, names, source="data.csv", split=split)


MARKED = np.array(["train"] * 60 + ["val"] * 20 + ["test"] * 20)


@pytest.mark.parametrize("axes", [1, 2])
def test_class_that_is_not_in_a_marked_training_split_is_refused(axes):
    labels = np.where(MARKED == "train", 0, np.arange(100) % 2)
    labels = labels.reshape(-1, *[1] * (axes - 1))
    found = f"^data.csv: class 1 has no sample in the train split, and {labels.sum()} in all: the train split must have"
    with pytest.raises(UsageError, match=found):
        labelled(labels, MARKED).setup()


@pytest.mark.parametrize("absent", ["val", "test"])
@pytest.mark.parametrize("axes", [1, 2])
def test_class_that_is_not_in_a_marked_val_or_test_split_is_a_finding(absent, axes):
    labels = np.where(MARKED == absent, 0, np.arange(100) % 2).reshape(-1, *[1] * (axes - 1))
    told = [str(each) for each in labelled(labels, MARKED).findings() if each.name == "absent_class"]
    assert told == [f"class 1 has no sample in the {absent} split: metrics leave it out or are undefined there"]


@pytest.mark.parametrize("only", ["val", "test"])
def test_class_that_only_a_marked_split_has_is_refused(only):
    labels = np.where(MARKED == only, np.arange(100) % 3, np.arange(100) % 2)
    with pytest.raises(UsageError, match="class 2 has no sample in the train split"):
        labelled(labels, MARKED).setup()


def test_class_without_a_sample_is_refused():
    with pytest.raises(UsageError, match="class 1 has no sample in the train split, and 0 in all"):
        labelled(np.arange(60) % 2 * 2).setup()


def test_class_too_small_for_its_share_of_a_split_is_refused():
    found = r"class 2 has no sample in the test split, and 3 in all: add samples, or raise test_fraction=0\.15$"
    with pytest.raises(UsageError, match=found):
        labelled(np.array([0] * 500 + [1] * 497 + [2] * 3)).setup()


@pytest.mark.parametrize("seed", range(8))
def test_each_split_has_each_class_or_the_data_is_refused(seed):
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(2, 6))
    labels = generator.choice(classes, 120, p=generator.dirichlet([0.6] * classes))
    data = labelled(np.r_[labels, np.arange(classes)])
    data.split_seed = seed
    try:
        data.setup()
    except UsageError as error:
        assert "class " in str(error)
    else:
        for split in ("train", "val", "test"):
            assert set(data.dataset(split).targets.tolist()) == set(range(classes))


def test_label_of_several_must_be_in_training_and_is_a_finding_elsewhere():
    labels = np.ones((100, 3), int)
    labels[MARKED == "test", 2] = 0
    told = [each.text for each in labelled(labels, MARKED, columns=3).findings() if each.name == "absent_class"]
    assert told == ["class 2 has no sample in the test split"]
    labels[MARKED == "train", 1] = 0
    with pytest.raises(UsageError, match="class 1 has no sample in the train split"):
        labelled(labels, MARKED, columns=3).setup()
