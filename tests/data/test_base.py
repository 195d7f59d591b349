import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from firstlight.data import DataModule, Digits
from firstlight.data.samples import TensorBatches
from firstlight.errors import UsageError
from tests.data.helpers import Arrays, images, in_batches, numbers, ready

SPLITS = ("train", "val", "test")


class BatchRecorder(LightningModule):
    """A LightningModule that keeps its batches."""

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
    """Return the path of a checkpoint, and the data with the digest "old" that it was trained on."""
    generator = np.random.default_rng(1)
    old = Arrays(generator.normal(3, 5, (40, 4)), np.arange(40) % 2, ["no", "yes"], digest="old")
    fitted = trainer(tmp_path, enable_checkpointing=False)
    fitted.fit(BatchRecorder(), datamodule=old)
    fitted.save_checkpoint(tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt", old


def new_data(rows=3, columns=4, targets=True, **fields):
    """Return data that the checkpoint was not trained on: three rows of one class."""
    inputs = np.random.default_rng(2).normal(3, 5, (rows, columns))
    return Arrays(inputs, np.ones(rows, int) if targets else None, ["no", "yes"], **{"digest": "new", **fields})


def test_data_module_without_load_cannot_be_constructed():
    with pytest.raises(TypeError, match="load"):
        DataModule()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Digits was given batch_size=0: it must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1: it must be at least 0"),
        ({"num_workers": 2, "on_device": True}, "on_device=true and num_workers=2: on_device needs num_workers=0"),
        ({"val_fraction": 0}, r"val_fraction=0: it must be in \(0, 1\)"),
        ({"test_fraction": 0.0}, "test_fraction=0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction=0.5: their sum must be below 1"),
    ],
)
def test_arguments_outside_their_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Digits(**options)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_tokens_are_not_scaled_and_become_int64_in_the_batch(kind):
    tokens = np.random.default_rng(0).integers(0, 100, (40, 7)).astype(kind)
    data = ready(Arrays(tokens, tokens))
    assert data.dataset("train").inputs.numpy().dtype == data.dataset("train").targets.numpy().dtype == kind
    inputs, targets = in_batches(data, data.predict_dataloader())[0]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == targets.tolist() == tokens[data.rows("test")].tolist()


def test_targets_without_classes_become_a_float64_column():
    values = 1.7e9 + np.linspace(0, 1, 40)
    data = ready(Arrays(np.random.default_rng(0).normal(size=(40, 2)), values))
    np.testing.assert_array_equal(data.dataset("val").targets.numpy(), values[data.indices["val"], None], strict=True)


def test_loaders_give_float32_targets_and_tell_once_if_digits_are_lost(caplog):
    inputs, small = np.random.default_rng(0).normal(size=(40, 2)), np.linspace(0, 1, 40)
    for values, told in ((small, 0), (1.7e9 + small, 1)):
        caplog.clear()
        data = ready(Arrays(inputs, values))
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            assert {targets.dtype for _, targets in loader} == {torch.float32}
        assert caplog.text.count("float32 rounds the targets") == told


def test_missing_mean_fills_with_the_mean_of_the_training_split():
    inputs = np.random.default_rng(0).normal(3, 5, (40, 2))
    inputs[::4, 1] = np.nan
    data = ready(Arrays(inputs, np.zeros(40), options={"missing": "mean"}))
    train = inputs[data.indices["train"]]
    np.testing.assert_allclose(data.state_dict()["mean"], np.nanmean(train, 0), rtol=1e-5)
    for split in SPLITS:
        missing = np.isnan(inputs[data.rows(split), 1])
        assert data.dataset(split).inputs[missing, 1].tolist() == [0] * missing.sum()


def test_rows_are_dropped_only_with_missing_drop():
    inputs = np.random.default_rng(0).normal(size=(40, 2))
    inputs[[4, 9]] = np.nan
    with pytest.raises(UsageError, match=r"Arrays: 2 rows .* row 4 column 0"):
        Arrays(inputs, np.zeros(40)).setup()
    data = ready(Arrays(inputs, np.arange(40.0), options={"missing": "drop"}))
    assert data.dropped == 2
    assert sum(len(data.dataset(split)) for split in SPLITS) == 38
    assert data.rows("test").tolist() == data.dataset("test").targets.flatten().tolist()


def test_rows_of_a_split_are_known_without_setup():
    inputs = np.random.default_rng(0).normal(size=(40, 2))
    data, other = Arrays(inputs, np.arange(40.0)), ready(Arrays(inputs, np.arange(40.0)))
    assert data.rows("val").tolist() == other.dataset("val").targets.flatten().tolist()


def test_loader_indexes_once_per_batch(monkeypatch):
    calls = []
    taken = TensorBatches.__getitems__
    monkeypatch.setattr(
        TensorBatches, "__getitems__", lambda self, index: calls.append(len(index)) or taken(self, index)
    )
    list(ready(numbers(rows=100, batch_size=10, val_fraction=0.25, test_fraction=0.5)).train_dataloader())
    assert calls == [10, 10, 5]


def test_only_training_batches_are_shuffled_in_each_epoch():
    torch.manual_seed(0)
    data = ready(numbers(rows=100))
    train, val = data.train_dataloader(), data.val_dataloader()
    assert not torch.equal(next(iter(train))[0], next(iter(train))[0])
    assert torch.equal(next(iter(val))[0], data.dataset("val").inputs)


def test_statistics_of_a_checkpoint_are_kept_before_and_after_setup():
    trained, before, after = ready(numbers()), numbers(), numbers()
    state = {**trained.state_dict(), "mean": trained.state_dict()["mean"] + 1}
    before.load_state_dict(state)
    before.setup()
    after.setup()
    after.load_state_dict(state)
    assert torch.equal(before.dataset("val").inputs, after.dataset("val").inputs)
    assert torch.equal(before.state_dict()["mean"], state["mean"])


def test_fitted_state_of_a_checkpoint_scales_inputs_without_data():
    trained, loaded = Digits(), Digits()
    trained.setup()
    loaded.load_state_dict(trained.state_dict())
    pixels = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded.prepare_batch(pixels), trained.prepare_batch(pixels))
    loaded.load_state_dict({**trained.state_dict(), "mean": trained.fitted["mean"] + 1})
    assert not torch.equal(loaded.prepare_batch(pixels), trained.prepare_batch(pixels))


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_all_rows_of_other_data_are_scored_with_the_checkpoint_statistics(verb, checkpoint, tmp_path):
    path, old = checkpoint
    task, data = BatchRecorder(), new_data()
    getattr(trainer(tmp_path), verb)(task, datamodule=data, ckpt_path=path, weights_only=True)
    ((inputs, targets),) = task.seen[verb]
    expected = (data.samples.inputs - old.state_dict()["mean"].numpy()) / old.state_dict()["std"].numpy()
    np.testing.assert_allclose(inputs, expected, rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [1, 1, 1]
    assert data.rows("test").tolist() == [0, 1, 2]


def test_same_data_keeps_its_splits_with_a_checkpoint(checkpoint, tmp_path):
    path, old = checkpoint
    task, data = BatchRecorder(), Arrays(old.samples.inputs, old.samples.targets, ["no", "yes"], digest="old")
    trainer(tmp_path).test(task, datamodule=data, ckpt_path=path, weights_only=True)
    assert data.rows("test").tolist() == old.rows("test").tolist()


def test_predict_without_targets_gives_targets_without_columns(checkpoint, tmp_path):
    task, data = BatchRecorder(), new_data(targets=False)
    trainer(tmp_path).predict(task, datamodule=data, ckpt_path=checkpoint[0], weights_only=True)
    ((_, targets),) = task.seen["predict"]
    assert targets.shape == (3, 0)


def test_test_without_targets_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="only predict works without targets: Arrays has no targets"):
        trainer(tmp_path).test(
            BatchRecorder(), datamodule=new_data(targets=False), ckpt_path=checkpoint[0], weights_only=True
        )
    data = new_data(targets=False, missing_reason="new.csv has no column price")
    with pytest.raises(UsageError, match=r"only predict works without targets: new\.csv has no column price"):
        trainer(tmp_path).test(BatchRecorder(), datamodule=data, ckpt_path=checkpoint[0], weights_only=True)


def test_training_without_targets_is_refused():
    with pytest.raises(UsageError, match="Arrays has no targets to train on"):
        Arrays(np.zeros((40, 2)), None).setup()
    with pytest.raises(UsageError, match=r"new\.csv has no column price"):
        new_data(targets=False, missing_reason="new.csv has no column price").setup()


def test_other_data_has_no_validation_split(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"new\.csv has no val split: it is not the data that the checkpoint"):
        trainer(tmp_path).validate(
            BatchRecorder(), datamodule=new_data(source="new.csv"), ckpt_path=checkpoint[0], weights_only=True
        )


def test_resuming_with_other_data_is_refused(checkpoint, tmp_path):
    inputs = np.random.default_rng(2).normal(3, 5, (40, 4))
    data = Arrays(inputs, np.arange(40) % 2, ["no", "yes"], digest="new", source="new.csv")
    with pytest.raises(UsageError, match=r"new\.csv is not the data that the checkpoint was trained on: resume with"):
        trainer(tmp_path, max_steps=9).fit(BatchRecorder(), datamodule=data, ckpt_path=checkpoint[0], weights_only=True)


def test_data_with_other_columns_than_the_checkpoint_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"the inputs have the shape \(\d+, 1\): they must be \(N, 4\)"):
        trainer(tmp_path).predict(
            BatchRecorder(), datamodule=new_data(columns=1), ckpt_path=checkpoint[0], weights_only=True
        )


def test_checkpoint_of_another_data_module_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="trained without Digits: it has no statistics"):
        trainer(tmp_path).test(BatchRecorder(), datamodule=Digits(), ckpt_path=checkpoint[0], weights_only=True)


@pytest.mark.parametrize(("precision", "kind"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_images_have_the_precision_of_the_run(precision, kind, tmp_path):
    task = BatchRecorder()
    trainer(tmp_path, precision=precision, enable_checkpointing=False).fit(task, datamodule=images())
    assert {inputs.dtype for inputs, _ in task.seen["train"] + task.seen["val"]} == {kind}


class RandomShift(nn.Module):
    """Adds another random number to each sample, and keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixels):
        self.seen.append(pixels)
        return pixels + torch.rand(len(pixels), 1, 1, 1)


def test_only_training_images_are_augmented_before_they_are_scaled(tmp_path):
    shift, task = RandomShift(), BatchRecorder()
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


def test_augment_without_images_is_refused():
    with pytest.raises(
        UsageError, match=r"augment needs images, uint8 \(N, C, H, W\), but the inputs are float64 \(40, 4\)"
    ):
        numbers(augment=[nn.Identity()]).setup()
