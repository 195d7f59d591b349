"""Tests of the contract that every data module fulfils. Modules with required arguments are built by `BUILDERS`."""

import io
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch

import firstlight.data
from firstlight.data import (
    MNIST,
    Arrays,
    Corpus,
    DataModule,
    Digits,
    FashionMNIST,
    ImageFolder,
    LabelledText,
    Table,
    Tensors,
    UnicodeNames,
)
from tests.data.helpers import (
    in_batches,
    ready,
    write_arrays,
    write_idx,
    write_images,
    write_labelled,
    write_table,
    write_text,
)

SPLITS = ("train", "val", "test")
BUILDERS = {
    Arrays: lambda folder, **options: Arrays(write_arrays(folder), **options),
    Corpus: lambda folder, **options: Corpus(write_text(folder), **options),
    ImageFolder: lambda folder, **options: ImageFolder(write_images(folder / "images"), **options),
    LabelledText: lambda folder, **options: LabelledText(write_labelled(folder), **options),
    MNIST: lambda folder, **options: MNIST(write_idx(folder), **options),
    FashionMNIST: lambda folder, **options: FashionMNIST(write_idx(folder), **options),
    Table: lambda folder, **options: Table(write_table(folder), "kind", "binary", categorical=["town"], **options),
    Tensors: lambda _, **options: Tensors(
        np.random.default_rng(0).normal(3, 5, (200, 3)), np.arange(200) % 4 // 2, ["a", "b"], **options
    ),
}
MODULES = [
    value
    for value in (getattr(firstlight.data, name) for name in firstlight.data.__all__)
    if isinstance(value, type) and issubclass(value, DataModule) and value is not DataModule
]
every_module = pytest.mark.parametrize("kind", MODULES)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    names = cache(UnicodeNames().load)  # Reading all names of Unicode takes half a second.

    def built(kind, **options):
        data = BUILDERS[kind](folder, **options) if kind in BUILDERS else kind(**options)
        if kind is UnicodeNames:
            data.load = lambda: deepcopy(names())
        return data

    return built


def rows_of(data):
    return {split: data.indices[split].tolist() for split in SPLITS}


def as_numbers(data, split):
    """Return the inputs of a split as a network takes them."""
    return data.prepare_batch(data.dataset(split).inputs)


def joined(batches, whole):
    """Return the inputs of all batches, padded to the length of the whole split."""
    return torch.cat(
        [torch.nn.functional.pad(inputs, (0, whole.shape[-1] - inputs.shape[-1])) for inputs, _ in batches]
    )


def strata(data):
    """Return a function from a split to its class labels, or None if the split is not stratified."""
    targets = torch.cat([data.dataset(split).targets for split in SPLITS])
    single = targets.ndim == 1 or targets.shape[1] == 1
    return (lambda split: data.dataset(split).targets.flatten().long()) if data.class_names and single else None


def test_discovery_finds_digits():
    assert Digits in MODULES


@every_module
def test_splits_are_disjoint_and_complete(kind, build):
    data = ready(build(kind))
    rows = np.concatenate([data.rows(split) for split in SPLITS])
    assert sorted(rows.tolist()) == list(range(len(data.load().targets)))


@every_module
def test_splits_have_the_requested_fractions(kind, build):
    data = ready(build(kind, val_fraction=0.2, test_fraction=0.3))
    own_split = data.load().split
    if own_split is None:
        count = len(data.load().targets)
        assert [len(data.indices[split]) / count for split in SPLITS] == pytest.approx([0.5, 0.2, 0.3], abs=2 / count)
    elif not (own_split == "val").any():
        trained = (own_split == "train").sum()
        assert len(data.indices["val"]) / trained == pytest.approx(0.2, abs=2 / trained)


@every_module
def test_own_split_of_the_data_is_kept(kind, build):
    data = ready(build(kind))
    own_split = data.load().split
    if own_split is None:
        pytest.skip("the data has no split")
    assert set(data.rows("test")) == set(np.flatnonzero(own_split == "test"))
    assert set(data.rows("train")) <= set(np.flatnonzero(own_split == "train"))


@every_module
def test_splits_are_stratified_by_class(kind, build):
    data = ready(build(kind))
    labels = strata(data)
    if labels is None or data.load().split is not None:
        pytest.skip("not stratified as a whole")
    parts = [np.bincount(labels(split), minlength=len(data.class_names)) for split in SPLITS]
    whole = sum(parts) / sum(map(sum, parts))
    for part in parts:
        np.testing.assert_allclose(part / part.sum(), whole, atol=1.5 / part.sum())


@every_module
def test_split_depends_only_on_split_seed(kind, build):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        found.append(rows_of(ready(build(kind, split_seed=5))))
    assert found[0] == found[1]
    data = ready(build(kind, split_seed=6))
    other, own_split = rows_of(data), data.load().split
    free = SPLITS if own_split is None else () if (own_split == "val").any() else ("train", "val")
    assert all(set(other[split]) != set(found[0][split]) for split in free)


@every_module
def test_split_does_not_advance_the_global_generators(kind, build):
    torch.manual_seed(3)
    np.random.seed(3)
    ready(build(kind))
    drawn = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand())


@every_module
def test_training_inputs_have_mean_zero_and_deviation_one(kind, build):
    data = ready(build(kind))
    inputs = as_numbers(data, "train")
    if not inputs.is_floating_point():
        pytest.skip("tokens are never scaled")
    inputs = inputs[:, : data.sizes().get("numeric_features")].double()  # Categories of a table stay 0 and 1.
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    mean, std = inputs.mean(axes), inputs.std(axes, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(std[std > 0], torch.ones_like(std[std > 0]), atol=1e-4, rtol=0)


@every_module
def test_all_splits_are_scaled_with_the_training_statistics(kind, build):
    data = ready(build(kind))
    if kind is Table:
        pytest.skip("its own test compares it with scikit-learn")
    inputs = {split: as_numbers(data, split) for split in SPLITS}
    if not inputs["train"].is_floating_point():
        pytest.skip("tokens are never scaled")
    mean, std = data.state_dict()["mean"], data.state_dict()["std"]
    unscaled = {split: inputs[split] * std + mean for split in SPLITS}
    axes = [axis for axis in range(inputs["train"].ndim) if axis != 1]
    torch.testing.assert_close(unscaled["train"].double().mean(axes), mean.double().flatten(), atol=1e-3, rtol=1e-4)
    raw = data.load().inputs
    if raw.dtype == np.uint8:
        for split in SPLITS:
            torch.testing.assert_close(
                unscaled[split] * 255, torch.from_numpy(raw[data.rows(split)]).float(), atol=1e-2, rtol=0
            )


@every_module
def test_loaders_yield_each_sample_once_with_its_target(kind, build):
    data = ready(build(kind, batch_size=100))
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    for split, loader in zip(SPLITS, loaders, strict=True):
        batches = list(loader)
        assert {len(inputs) for inputs, _ in batches[:-1]} <= {100}
        dataset = data.dataset(split)
        got = joined(batches, dataset.inputs), torch.cat([target for _, target in batches])
        want = dataset.inputs, dataset.targets
        both = [
            sorted(torch.column_stack([a.flatten(1), b.flatten(1) if b.ndim > 1 else b]).tolist())
            for a, b in (got, want)
        ]
        assert both[0] == both[1]


@every_module
def test_batch_size_can_be_global(kind, build):
    assert build(kind, batch_size=24, batch_size_is="global").batch_size_is == "global"


@every_module
def test_batches_have_the_types_of_the_contract(kind, build):
    data = ready(build(kind))
    inputs, targets = in_batches(data, data.train_dataloader())[0]
    assert inputs.dtype in (torch.float32, torch.int64)
    assert targets.dtype in (torch.float32, torch.int64)
    if data.class_names and targets.dtype == torch.float32:
        assert set(targets.unique().tolist()) <= {0, 1}
        assert max(2, targets.shape[1]) == len(data.class_names)
    elif data.class_names:
        assert targets.ndim == 1
        assert 0 <= targets.min() and targets.max() < len(data.class_names)
    elif targets.dtype == torch.float32:
        assert targets.ndim == 2


@every_module
def test_images_and_tokens_keep_their_small_types_in_memory(kind, build):
    data = ready(build(kind))
    inputs, raw = data.dataset("train").inputs, data.load().inputs
    if raw.dtype.kind in "iu":
        assert inputs.numpy().dtype == raw.dtype
    assert inputs.ndim != 4 or inputs.dtype == torch.uint8


@every_module
def test_predict_batches_follow_the_order_of_the_test_rows(kind, build):
    data = ready(build(kind))
    inputs = joined(data.predict_dataloader(), data.dataset("test").inputs)
    assert torch.equal(inputs, data.dataset("test").inputs)
    raw = data.load().inputs
    if raw.dtype.kind in "iu":
        assert inputs.tolist() == raw[data.rows("test")].tolist()


@every_module
def test_state_dict_survives_a_file_and_restores_another_instance(kind, build):
    first, second = ready(build(kind)), ready(build(kind))
    if first.fitted["mean"] is not None:
        first.fitted["mean"] = first.fitted["mean"] + 1
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    own = second.dataset("test").inputs
    second.load_state_dict(torch.load(file, weights_only=True))
    inputs = second.dataset("test").inputs
    assert repr(second.state_dict()) == repr(first.state_dict())
    third = build(kind)
    third.load_state_dict(first.state_dict())
    third.setup()
    assert torch.equal(third.dataset("test").inputs, inputs)
    if inputs.is_floating_point():
        assert not torch.equal(own, inputs)


@every_module
def test_state_dict_is_empty_before_setup(kind, build):
    assert build(kind).state_dict() == {}


@every_module
def test_setup_loads_only_once(kind, build, monkeypatch):
    data = ready(build(kind))
    monkeypatch.setattr(data, "load", lambda: pytest.fail("loaded a second time"))
    data.setup("fit")
    data.setup("test")
    data.test_dataloader()


@every_module
def test_hyperparameters_are_plain(kind, build):
    file = io.BytesIO()
    torch.save(dict(build(kind).hparams), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["batch_size"] == 32
