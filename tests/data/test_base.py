import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from firstlight.data import DataModule, Digits
from firstlight.data.loader import is_on_device, loader
from firstlight.data.samples import TensorBatches
from firstlight.errors import UsageError
from tests.data.helpers import Arrays, images, in_batches, numbers, ready

SPLITS = ("train", "val", "test")


class Watched(LightningModule):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = {split: [] for split in (*SPLITS, "predict")}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that was trained on numbers with the digest "old"."""
    generator = np.random.default_rng(1)
    old = Arrays(generator.normal(3, 5, (40, 4)), np.arange(40) % 2, ["no", "yes"], digest="old")
    fitted = trainer(tmp_path, enable_checkpointing=False)
    fitted.fit(Watched(), datamodule=old)
    fitted.save_checkpoint(tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt", old


def new_data(rows=3, columns=4, targets=True, **fields):
    """Data that a checkpoint has not seen: three rows, all of one class."""
    inputs = np.random.default_rng(2).normal(3, 5, (rows, columns))
    return Arrays(inputs, np.ones(rows, int) if targets else None, ["no", "yes"], **{"digest": "new", **fields})


def test_a_data_module_without_load_cannot_be_made():
    with pytest.raises(TypeError, match="load"):
        DataModule()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Digits was given batch_size=0: a batch has at least 1 sample"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": 2, "on_device": True}, "on_device=true and num_workers=2"),
        ({"val_fraction": 0}, "val_fraction=0"),
        ({"test_fraction": 0.0}, "test_fraction=0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something to train on"),
    ],
)
def test_values_outside_their_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Digits(**options)


def test_a_constant_column_is_divided_by_one():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    inputs[:, 1] = 0.1
    data = ready(Arrays(inputs, np.arange(40) % 2, ["a", "b"]))
    assert data.state_dict()["std"][1] == 1
    for split in SPLITS:
        scaled = data.dataset(split).inputs
        torch.testing.assert_close(scaled[:, 1], torch.zeros(len(scaled)), atol=1e-12, rtol=0)
        assert scaled[:, [0, 2]].std() > 0.1


def test_a_constant_channel_is_divided_by_one():
    data = images()
    data.samples.inputs[:, 1] = 7
    ready(data)
    assert data.state_dict()["std"].flatten()[1] == 1
    assert (data.prepare_batch(data.dataset("val").inputs)[:, 1].abs() < 1e-6).all()


def test_a_column_that_is_constant_only_in_training_keeps_its_distance_elsewhere():
    inputs = np.zeros((40, 2))
    inputs[:, 0] = np.arange(40)
    probe = ready(Arrays(inputs, np.zeros(40)))
    inputs[probe.indices["test"], 1] = 7
    scaled = ready(Arrays(inputs, np.zeros(40))).dataset("test").inputs
    assert scaled[:, 1].tolist() == [7] * len(scaled)


def test_pixels_are_scaled_like_a_float_copy_of_them_with_a_number_for_each_channel():
    data = ready(images())
    raw = data.samples.inputs / 255
    train = raw[data.indices["train"]]
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    for split in SPLITS:
        stored = data.dataset(split).inputs
        assert stored.dtype == torch.uint8
        expected = (raw[data.indices[split]] - mean) / std
        np.testing.assert_allclose(data.prepare_batch(stored), expected, atol=1e-5)


def test_each_channel_of_float_images_is_scaled_by_itself():
    raw = np.random.default_rng(0).normal([[[0]], [[9]]], [[[1]], [[5]]], (40, 2, 6, 6))
    train = ready(Arrays(raw, np.zeros(40))).dataset("train").inputs
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_tokens_are_never_scaled_and_become_int64_in_the_batch(kind):
    tokens = np.random.default_rng(0).integers(0, 100, (40, 7)).astype(kind)
    data = ready(Arrays(tokens, tokens))
    assert data.dataset("train").inputs.numpy().dtype == data.dataset("train").targets.numpy().dtype == kind
    inputs, targets = in_batches(data, data.predict_dataloader())[0]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == targets.tolist() == tokens[data.rows("test")].tolist()


def test_numbers_without_classes_become_a_column_of_float32():
    values = np.linspace(0, 1, 40)
    data = ready(Arrays(np.random.default_rng(0).normal(size=(40, 2)), values))
    assert data.dataset("val").targets.dtype == torch.float32
    np.testing.assert_allclose(data.dataset("val").targets, values[data.indices["val"], None], rtol=1e-6)


def test_missing_values_become_the_mean_of_the_training_split_when_asked_to():
    inputs = np.random.default_rng(0).normal(3, 5, (40, 2))
    inputs[::4, 1] = np.nan
    data = ready(Arrays(inputs, np.zeros(40), options={"missing": "mean"}))
    train = inputs[data.indices["train"]]
    np.testing.assert_allclose(data.state_dict()["mean"], np.nanmean(train, 0), rtol=1e-5)
    for split in SPLITS:
        missing = np.isnan(inputs[data.rows(split), 1])
        assert data.dataset(split).inputs[missing, 1].tolist() == [0] * missing.sum()


def test_a_column_without_any_value_has_no_mean():
    inputs = np.column_stack([np.arange(40.0), np.full(40, np.nan)])
    with pytest.raises(UsageError, match="Arrays: column 1 has no value"):
        Arrays(inputs, np.zeros(40), options={"missing": "mean"}).setup()


def test_a_data_module_drops_only_when_it_is_told_to():
    inputs = np.random.default_rng(0).normal(size=(40, 2))
    inputs[[4, 9]] = np.nan
    with pytest.raises(UsageError, match=r"Arrays: 2 rows .* row 4 column 0"):
        Arrays(inputs, np.zeros(40)).setup()
    data = ready(Arrays(inputs, np.arange(40.0), options={"missing": "drop"}))
    assert data.dropped == 2
    assert sum(len(data.dataset(split)) for split in SPLITS) == 38
    assert data.rows("test").tolist() == data.dataset("test").targets.flatten().tolist()


def test_a_batch_taken_at_once_equals_its_samples_stacked():
    samples = TensorBatches(torch.randn(10, 2, 3), torch.arange(10))
    indices = [7, 0, 7, 3]
    inputs, targets = samples.__getitems__(indices)
    assert torch.equal(inputs, torch.stack([samples[index][0] for index in indices]))
    assert torch.equal(targets, torch.stack([samples[index][1] for index in indices]))
    assert len(samples) == 10


def test_a_loader_indexes_once_for_each_batch(monkeypatch):
    calls = []
    taken = TensorBatches.__getitems__
    monkeypatch.setattr(
        TensorBatches, "__getitems__", lambda self, index: calls.append(len(index)) or taken(self, index)
    )
    list(ready(numbers(rows=100, batch_size=10, val_fraction=0.25, test_fraction=0.5)).train_dataloader())
    assert calls == [10, 10, 5]


@pytest.mark.parametrize(
    ("options", "there"), [({}, False), ({"on_device": True}, True), ({"on_device": False}, False)]
)
def test_samples_go_to_the_device_when_they_are_told_to(monkeypatch, options, there):
    # "meta" stands for a device of its own; tests/test_gpu.py has a real one.
    device = torch.device("meta")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", device)
    data = Digits(batch_size=100, **options)
    data.setup()
    made = loader(data.dataset("train"), trainer, 100, True, 0, data.on_device)
    inputs, targets = next(iter(made))
    assert (inputs.device == device) == (targets.device == device) == (made.order.device == device) == there
    assert len(made) == 13 and inputs.dtype == torch.uint8


def test_samples_go_to_a_gpu_where_an_eighth_of_what_is_free_holds_them(monkeypatch):
    samples, gpu = TensorBatches(torch.zeros(10, 2), torch.zeros(10)), torch.device("cuda", 0)
    for free, there in ((8 * 120, True), (8 * 120 - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert is_on_device(samples, gpu, 0, None) == there
        assert not is_on_device(samples, gpu, 2, None)


def test_training_batches_are_shuffled_anew_and_others_keep_their_order():
    torch.manual_seed(0)
    data = ready(numbers(rows=100))
    train, val = data.train_dataloader(), data.val_dataloader()
    assert not torch.equal(next(iter(train))[0], next(iter(train))[0])
    assert torch.equal(next(iter(val))[0], data.dataset("val").inputs)


def test_statistics_of_a_checkpoint_stay_whether_loaded_before_setup_or_after():
    trained, before, after = ready(numbers()), numbers(), numbers()
    state = {**trained.state_dict(), "mean": trained.state_dict()["mean"] + 1}
    before.load_state_dict(state)
    before.setup()
    after.setup()
    after.load_state_dict(state)
    assert torch.equal(before.dataset("val").inputs, after.dataset("val").inputs)
    assert torch.equal(before.state_dict()["mean"], state["mean"])


def test_what_a_checkpoint_learned_scales_inputs_at_hand_without_any_data():
    trained, loaded = Digits(), Digits()
    trained.setup()
    loaded.load_state_dict(trained.state_dict())
    pixels = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded.prepare_batch(pixels), trained.prepare_batch(pixels))
    loaded.load_state_dict({**trained.state_dict(), "mean": trained.fitted["mean"] + 1})
    assert not torch.equal(loaded.prepare_batch(pixels), trained.prepare_batch(pixels))


def test_a_checkpoint_of_other_classes_is_refused():
    state = ready(numbers()).state_dict()
    state["class_names"] = ["no", "maybe"]
    with pytest.raises(UsageError, match=r"trained on the class_names \['no', 'maybe'\].*\['no', 'yes'\]"):
        ready(numbers()).load_state_dict(state)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_all_of_new_data_is_scored_with_the_statistics_of_the_checkpoint(verb, checkpoint, tmp_path):
    path, old = checkpoint
    task, data = Watched(), new_data()
    getattr(trainer(tmp_path), verb)(task, datamodule=data, ckpt_path=path, weights_only=True)
    ((inputs, targets),) = task.seen[verb]
    expected = (data.samples.inputs - old.state_dict()["mean"].numpy()) / old.state_dict()["std"].numpy()
    np.testing.assert_allclose(inputs, expected, rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [1, 1, 1]
    assert data.rows("test").tolist() == [0, 1, 2]


def test_the_same_data_keeps_its_splits_when_a_checkpoint_is_tested(checkpoint, tmp_path):
    path, old = checkpoint
    task, data = Watched(), Arrays(old.samples.inputs, old.samples.targets, ["no", "yes"], digest="old")
    trainer(tmp_path).test(task, datamodule=data, ckpt_path=path, weights_only=True)
    assert data.rows("test").tolist() == old.rows("test").tolist()


@pytest.mark.parametrize("options", [{"split_seed": 5}, {"test_fraction": 0.3}])
def test_another_split_of_the_same_data_is_not_scored(options):
    module = numbers(**options)
    module.load_state_dict(dict(ready(numbers()).fitted))
    with pytest.raises(UsageError, match="learned from another split of Arrays"):
        module.dataset("test")


def test_rows_that_are_dropped_no_more_are_another_split():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    inputs[::7, 1] = np.nan
    trained, module = (Arrays(inputs, np.arange(40) % 2, "ab", {"missing": missing}) for missing in ("drop", "mean"))
    module.load_state_dict(dict(ready(trained).fitted))
    with pytest.raises(UsageError, match="learned from another split"):
        module.dataset("test")


def test_large_numbers_keep_their_differences():
    module = ready(Arrays(1.7e9 + np.arange(200.0)[:, None], np.arange(200) % 2, "ab"))
    assert len(module.dataset("train").inputs.unique()) == len(module.indices["train"])


def test_new_data_without_targets_is_predicted_with_targets_of_no_column(checkpoint, tmp_path):
    task, data = Watched(), new_data(targets=False)
    trainer(tmp_path).predict(task, datamodule=data, ckpt_path=checkpoint[0], weights_only=True)
    ((_, targets),) = task.seen["predict"]
    assert targets.shape == (3, 0)


def test_new_data_without_targets_is_not_tested(checkpoint, tmp_path):
    data = new_data(targets=False, missing_reason="new.csv has no column price")
    with pytest.raises(UsageError, match=r"new\.csv has no column price: it can be predicted for, not tested"):
        trainer(tmp_path).test(Watched(), datamodule=data, ckpt_path=checkpoint[0], weights_only=True)


def test_nothing_is_learned_without_targets():
    with pytest.raises(UsageError, match="Arrays has no targets"):
        Arrays(np.zeros((40, 2)), None).setup()
    with pytest.raises(UsageError, match=r"new\.csv has no column price"):
        new_data(targets=False, missing_reason="new.csv has no column price").setup()


def test_new_data_is_no_validation_split(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"new\.csv is not what the checkpoint was trained on: all of it is the test"):
        trainer(tmp_path).validate(
            Watched(), datamodule=new_data(source="new.csv"), ckpt_path=checkpoint[0], weights_only=True
        )


def test_a_fit_does_not_go_on_with_other_data(checkpoint, tmp_path):
    inputs = np.random.default_rng(2).normal(3, 5, (40, 4))
    data = Arrays(inputs, np.arange(40) % 2, ["no", "yes"], digest="new", source="new.csv")
    with pytest.raises(UsageError, match=r"new\.csv is not what the checkpoint was trained on: go on with the same"):
        trainer(tmp_path, max_steps=9).fit(Watched(), datamodule=data, ckpt_path=checkpoint[0], weights_only=True)


def test_new_data_of_other_columns_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="trained on 4 columns or channels, but Arrays has 1"):
        trainer(tmp_path).predict(Watched(), datamodule=new_data(columns=1), ckpt_path=checkpoint[0], weights_only=True)


def test_a_checkpoint_without_the_state_of_this_module_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="trained without Digits"):
        trainer(tmp_path).test(Watched(), datamodule=Digits(), ckpt_path=checkpoint[0], weights_only=True)


@pytest.mark.parametrize(("precision", "kind"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_images_come_in_the_precision_of_the_run(precision, kind, tmp_path):
    task = Watched()
    trainer(tmp_path, precision=precision, enable_checkpointing=False).fit(task, datamodule=images())
    assert {inputs.dtype for inputs, _ in task.seen["train"] + task.seen["val"]} == {kind}


class Shift(nn.Module):
    """Adds a random number of its own to each sample, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels)
        return pixels + torch.rand(len(pixels), 1, 1, 1)


def test_training_images_alone_are_augmented_between_0_and_1_and_then_scaled(tmp_path):
    shift, task = Shift(), Watched()
    data = images(augment=[shift])
    trainer(tmp_path, enable_checkpointing=False).fit(task, datamodule=data)
    trainer(tmp_path).test(task, datamodule=data)
    given, got = torch.cat(shift.seen), torch.cat([inputs for inputs, _ in task.seen["train"]])
    assert len(given) == len(data.indices["train"])
    assert (given.min(), given.max()) == (0, 1)
    state = data.state_dict()
    added = got * state["std"] + state["mean"] - given
    torch.testing.assert_close(added, added[:, :1, :1, :1].expand_as(added))
    assert len(added[:, 0, 0, 0].unique()) == len(given)
    for split in ("val", "test"):
        plain = data.prepare_batch(data.dataset(split).inputs)
        assert torch.equal(torch.cat([inputs for inputs, _ in task.seen[split]][-1:]), plain)


def test_what_is_no_image_is_not_augmented():
    with pytest.raises(UsageError, match="augment is for images"):
        numbers(augment=[nn.Identity()]).setup()
