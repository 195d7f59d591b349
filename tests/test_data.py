import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import firstlight.data
from firstlight.data import DataModule, Digits
from firstlight.data.base import Samples, TensorBatches
from firstlight.data.clean import clean
from firstlight.errors import UsageError

SPLITS = ("train", "val", "test")
MODULES = [
    value
    for value in (getattr(firstlight.data, name) for name in firstlight.data.__all__)
    if isinstance(value, type) and issubclass(value, DataModule) and value is not DataModule
]
every_module = pytest.mark.parametrize("kind", MODULES)


class Table(DataModule):
    """Any arrays as a data module."""

    def __init__(self, inputs, targets, class_names=(), **options):
        super().__init__(**options)
        self.samples = Samples(np.asarray(inputs), np.asarray(targets), list(class_names))

    def load(self):
        return self.samples


def ready(module):
    module.setup()
    return module


def table(rows=40, **options):
    generator = np.random.default_rng(0)
    return Table(generator.normal(3, 5, (rows, 4)), np.arange(rows) % 2, ["no", "yes"], **options)


def rows_of(module):
    return {split: module.indices[split].tolist() for split in SPLITS}


def test_discovery_finds_the_digits():
    assert Digits in MODULES


@every_module
def test_splits_are_disjoint_and_complete(kind):
    data = ready(kind())
    rows = np.concatenate([data.indices[split] for split in SPLITS])
    assert sorted(rows.tolist()) == list(range(len(data.load().targets)))


@every_module
def test_splits_have_the_shares_that_were_asked_for(kind):
    data = ready(kind(val_fraction=0.2, test_fraction=0.3))
    count = len(data.load().targets)
    assert [len(data.indices[split]) / count for split in SPLITS] == pytest.approx([0.5, 0.2, 0.3], abs=2 / count)


@every_module
def test_class_shares_of_each_split_are_within_two_points_of_the_whole(kind):
    data = ready(kind())
    if not data.class_names:
        pytest.skip("no classes")
    targets = data.load().targets
    whole = np.bincount(targets, minlength=len(data.class_names)) / len(targets)
    for split in SPLITS:
        part = np.bincount(data.dataset(split).targets, minlength=len(data.class_names)) / len(data.indices[split])
        np.testing.assert_allclose(part, whole, atol=0.02)


@every_module
def test_the_split_depends_on_split_seed_alone(kind):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(rows_of(ready(kind(split_seed=5))))
    assert found[0] == found[1]
    other = rows_of(ready(kind(split_seed=6)))
    assert all(set(other[split]) != set(found[0][split]) for split in SPLITS)


@every_module
def test_the_split_leaves_the_global_generators_alone(kind):
    torch.manual_seed(3)
    np.random.seed(3)
    ready(kind())
    drawn = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand())


@every_module
def test_training_inputs_have_mean_zero_and_deviation_one(kind):
    inputs = ready(kind()).dataset("train").inputs.double()
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    torch.testing.assert_close(inputs.mean(axes), torch.zeros_like(inputs.mean(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(axes, correction=0), torch.ones_like(inputs.mean(axes)), atol=1e-5, rtol=0)


@every_module
def test_all_splits_are_scaled_with_the_statistics_of_the_training_split(kind):
    data = ready(kind())
    raw = data.load().inputs.astype(np.float64)
    train = raw[data.indices["train"]]
    axes = tuple(axis for axis in range(raw.ndim) if axis != 1)
    mean, std = train.mean(axes, keepdims=True), train.std(axes, keepdims=True)
    for split in SPLITS:
        expected = (raw[data.indices[split]] - mean) / std
        np.testing.assert_allclose(data.dataset(split).inputs.numpy(), expected, atol=1e-4)


@every_module
def test_batches_hold_each_sample_of_a_split_once_with_its_target(kind):
    data = ready(kind(batch_size=100))
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    for split, loader in zip(SPLITS, loaders, strict=True):
        batches = list(loader)
        assert {len(inputs) for inputs, _ in batches[:-1]} <= {100}
        dataset = data.dataset(split)
        got = torch.cat([inputs for inputs, _ in batches]).flatten(1), torch.cat([target for _, target in batches])
        want = dataset.inputs.flatten(1), dataset.targets
        both = [sorted(map(tuple, torch.column_stack([a.double(), b.double()]).tolist())) for a, b in (got, want)]
        assert both[0] == both[1]


@every_module
def test_predictions_come_in_the_order_of_the_test_indices(kind):
    data = ready(kind())
    targets = torch.cat([targets for _, targets in data.predict_dataloader()])
    assert targets.tolist() == data.load().targets[data.indices["test"]].tolist()


@every_module
def test_state_dict_takes_the_statistics_to_another_instance(kind):
    first, second = ready(kind(split_seed=0)), ready(kind(split_seed=1))
    before = second.dataset("test").inputs
    second.load_state_dict(first.state_dict())
    state = first.state_dict()
    raw = torch.from_numpy(second.load().inputs).float()[second.indices["test"]]
    after = second.dataset("test").inputs
    torch.testing.assert_close(after, (raw - state["mean"]) / state["std"])
    assert not torch.equal(before, after)
    assert second.class_names == first.class_names


@every_module
def test_setup_loads_only_once(kind, monkeypatch):
    data = ready(kind())
    monkeypatch.setattr(data, "load", lambda: pytest.fail("loaded a second time"))
    data.setup("test")


@every_module
def test_a_batch_of_no_samples_is_refused(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} was given batch_size=0"):
        kind(batch_size=0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": -1},
        {"val_fraction": 0},
        {"test_fraction": 0.0},
        {"val_fraction": -0.1},
        {"val_fraction": 0.5, "test_fraction": 0.5},
    ],
)
def test_values_outside_their_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Digits(**options)


def test_digits_are_those_of_scikit_learn():
    data = ready(Digits())
    images, labels = load_digits(return_X_y=True)
    state = data.state_dict()
    for split in SPLITS:
        dataset = data.dataset(split)
        raw = (dataset.inputs * state["std"] + state["mean"]).reshape(-1, 64).numpy()
        np.testing.assert_allclose(raw, images[data.indices[split]], atol=1e-4)
        assert dataset.targets.tolist() == labels[data.indices[split]].tolist()
    assert data.class_names == list("0123456789")


@pytest.mark.parametrize("size", [8, 28])
def test_digits_have_the_size_that_was_asked_for(size):
    inputs, targets = next(iter(ready(Digits(size=size, batch_size=7)).train_dataloader()))
    assert (inputs.shape, inputs.dtype) == ((7, 1, size, size), torch.float32)
    assert (targets.shape, targets.dtype) == ((7,), torch.int64)


def test_digits_smaller_than_they_come_are_refused():
    with pytest.raises(UsageError, match="size=7"):
        Digits(size=7)


def test_each_column_of_a_table_has_mean_zero_and_deviation_one_over_the_training_rows():
    inputs = ready(table()).dataset("train").inputs
    torch.testing.assert_close(inputs.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.square().mean(0), torch.ones(4), atol=1e-5, rtol=0)


def test_a_constant_column_is_divided_by_one():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    inputs[:, 1] = 0.1
    data = Table(inputs, np.arange(40) % 2, ["a", "b"])
    data.setup()
    assert data.state_dict()["std"].flatten()[1] == 1
    for split in SPLITS:
        scaled = data.dataset(split).inputs
        assert torch.equal(scaled[:, 1], torch.zeros(len(scaled)))
        assert scaled[:, [0, 2]].std() > 0.1


def test_a_column_that_is_constant_only_in_training_keeps_its_distance_elsewhere():
    inputs = np.zeros((40, 2))
    inputs[:, 0] = np.arange(40)
    probe = ready(Table(inputs, np.zeros(40)))
    inputs[probe.indices["test"], 1] = 7
    scaled = ready(Table(inputs, np.zeros(40))).dataset("test").inputs
    assert scaled[:, 1].tolist() == [7] * len(scaled)


def test_targets_that_are_no_classes_stay_numbers():
    values = np.linspace(0, 1, 40)
    data = ready(Table(np.random.default_rng(0).normal(size=(40, 2)), values))
    assert data.dataset("val").targets.dtype == torch.float32
    np.testing.assert_allclose(data.dataset("val").targets, values[data.indices["val"]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_by_row_and_column(bad):
    inputs = np.zeros((5, 2, 3))
    inputs[3, 1, 2] = bad
    with pytest.raises(UsageError, match=rf"^1 row .*: row 3 column 5 \({bad}\); on_bad=drop"):
        clean(inputs, np.arange(5))


@pytest.mark.parametrize("bad", ["apple", "", None])
def test_what_is_no_number_is_refused_by_row_and_column(bad):
    inputs = np.array([["1", "2"], ["3", bad]], dtype=object)
    with pytest.raises(UsageError, match=rf"row 1 column 1 \({bad}\)"):
        clean(inputs, np.arange(2))


def test_a_bad_target_is_refused_by_row():
    with pytest.raises(UsageError, match=r"row 1 target \(nan\)"):
        clean(np.zeros((3, 2)), np.array([0.0, np.nan, 1.0]))


def test_many_bad_rows_are_counted_and_only_the_first_are_named():
    with pytest.raises(UsageError, match=r"^9 rows .*row 0 column 0 .*row 1 .*row 2 column 0 \(nan\), \.\.\.; on_bad"):
        clean(np.full((9, 1), np.nan), np.arange(9))


def test_text_that_reads_as_numbers_becomes_numbers():
    inputs, _, kept = clean(np.array([["1", "2.5"], ["-3", "4e2"]]), np.arange(2))
    assert inputs.tolist() == [[1, 2.5], [-3, 400]]
    assert (inputs.dtype, kept.tolist()) == (np.float32, [0, 1])


def test_dropping_leaves_out_bad_rows_with_their_targets_and_counts_them():
    inputs = np.arange(10.0).reshape(5, 2, 1)
    inputs[1, 0] = np.nan
    inputs[3, 1] = np.inf
    kept, targets, rows = clean(inputs, np.arange(5), "drop")
    assert kept.tolist() == [[[0], [1]], [[4], [5]], [[8], [9]]]
    assert targets.tolist() == [0, 2, 4]
    assert len(rows) == 3


def test_a_data_module_drops_only_when_it_is_told_to():
    inputs = np.random.default_rng(0).normal(size=(40, 2))
    inputs[[4, 9]] = np.nan
    with pytest.raises(UsageError, match="row 4 column 0"):
        Table(inputs, np.zeros(40)).setup()
    data = ready(Table(inputs, np.zeros(40), on_bad="drop"))
    assert data.dropped == 2
    assert sum(len(data.dataset(split)) for split in SPLITS) == 38


def test_data_without_one_good_row_is_refused_even_when_dropping():
    with pytest.raises(UsageError, match="no row is left"):
        clean(np.full((2, 2), np.nan), np.arange(2), "drop")


def test_inputs_and_targets_of_different_lengths_are_refused():
    with pytest.raises(UsageError, match="3 inputs but 2 targets"):
        clean(np.zeros((3, 1)), np.zeros(2))


@pytest.mark.parametrize(("kind", "expected"), [(np.uint8, np.int64), (bool, np.int64), (np.float64, np.float32)])
def test_whole_targets_become_int64_and_others_float32(kind, expected):
    assert clean(np.zeros((2, 1)), np.array([0, 1], dtype=kind))[1].dtype == expected


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_classes_is_refused_by_its_row(label):
    targets = np.arange(40) % 2
    targets[17] = label
    with pytest.raises(UsageError, match=f"row 17 has the label {label}: labels are 0 to 1"):
        Table(np.zeros((40, 1)), targets, ["no", "yes"]).setup()


def test_a_class_with_one_sample_is_refused():
    targets = np.arange(40) % 2
    targets[0] = 2
    with pytest.raises(UsageError, match="Table cannot split 40 samples"):
        Table(np.zeros((40, 1)), targets, ["a", "b", "c"]).setup()


def test_a_checkpoint_of_other_classes_is_refused():
    state = ready(table()).state_dict()
    state["class_names"] = ["no", "maybe"]
    with pytest.raises(UsageError, match=r"trained on the classes \['no', 'maybe'\].*\['no', 'yes'\]"):
        ready(table()).load_state_dict(state)


def test_a_batch_taken_at_once_equals_its_samples_stacked():
    samples = TensorBatches(torch.randn(10, 2, 3), torch.arange(10))
    indices = [7, 0, 7, 3]
    inputs, targets = samples.__getitems__(indices)
    assert torch.equal(inputs, torch.stack([samples[index][0] for index in indices]))
    assert torch.equal(targets, torch.stack([samples[index][1] for index in indices]))
    assert len(samples) == 10


def test_a_loader_indexes_once_for_each_batch(monkeypatch):
    calls = []
    at_once = TensorBatches.__getitems__
    monkeypatch.setattr(TensorBatches, "__getitem__", lambda self, index: pytest.fail("indexed sample by sample"))
    monkeypatch.setattr(
        TensorBatches, "__getitems__", lambda self, indices: calls.append(len(indices)) or at_once(self, indices)
    )
    list(ready(table(rows=100, batch_size=10, val_fraction=0.25, test_fraction=0.5)).train_dataloader())
    assert calls == [10, 10, 5]


def test_training_batches_are_shuffled_anew_and_others_keep_their_order():
    torch.manual_seed(0)
    data = ready(table(rows=100))
    train, val = data.train_dataloader(), data.val_dataloader()
    assert not torch.equal(next(iter(train))[0], next(iter(train))[0])
    assert torch.equal(next(iter(val))[0], data.dataset("val").inputs)


def test_a_number_too_large_for_float32_is_refused():
    with pytest.raises(UsageError, match="row 1 column 0"):
        clean(np.array([[1.0], [1e39]]), np.arange(2))


def test_no_sample_at_all_is_refused():
    with pytest.raises(UsageError, match="no sample at all"):
        clean(np.zeros((0, 3)), np.zeros(0))


def test_the_default_split_of_a_hundred_samples_is_70_15_15():
    class Hundred(DataModule):
        def load(self):
            return Samples(np.random.default_rng(0).normal(size=(100, 2)), np.zeros(100))

    data = Hundred()
    data.setup()
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 70, "val": 15, "test": 15}


def test_rows_are_those_of_the_data_as_it_was_loaded_when_some_are_dropped():
    class Holes(DataModule):
        def load(self):
            return Samples(np.where(np.arange(100) < 10, np.nan, np.arange(100))[:, None], np.arange(100.0))

    data = Holes(on_bad="drop")
    data.setup()
    assert data.rows("test").tolist() == data.dataset("test").targets.tolist()


def test_statistics_of_a_checkpoint_stay_whether_loaded_before_setup_or_after():
    trained, before, after = Digits(), Digits(split_seed=1), Digits(split_seed=1)
    trained.setup()
    state = {**trained.state_dict(), "mean": trained.state_dict()["mean"] + 1}
    before.load_state_dict(state)
    before.setup()
    after.setup()
    after.load_state_dict(state)
    assert torch.equal(before.dataset("val").inputs, after.dataset("val").inputs)
    assert torch.equal(before.state_dict()["mean"], state["mean"])


def test_integer_targets_keep_every_digit():
    assert clean(np.zeros((1, 1)), np.array([2**24 + 1]))[1].tolist() == [2**24 + 1]
