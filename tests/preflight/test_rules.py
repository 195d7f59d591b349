import ctypes
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from firstlight import callbacks
from firstlight.__main__ import main
from firstlight.data import Tensors
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.preflight.rules import (
    checkpoint_bytes,
    refuse_collisions,
    refuse_no_room,
    refuse_no_validation,
    refuse_options,
    refuse_single_samples,
    refuse_sizes,
)
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, ROOT, Ranks, called, quick_or_slow

OPTIONS = {
    "max_epochs": 3,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 50,
    "devices": "auto",
    "accelerator": "cpu",
    "strategy": "auto",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs=0 trains nothing"),
        ({"max_steps": 0}, "trainer.max_steps=0 trains nothing"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0 trains nothing"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0 trains nothing"),
        ({"accumulate_grad_batches": -1}, "trainer was given accumulate_grad_batches=-1: it must be at least 1"),
        ({"log_every_n_steps": -5}, "trainer was given log_every_n_steps=-5: it must be at least 0"),
        ({"devices": 5}, "trainer.devices=5 starts 5 processes on the CPU; at most 4 fit here"),
    ],
)
def test_options_that_cannot_be_right_are_refused(change, message, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    refuse_options({**OPTIONS, "devices": 4})
    refuse_options({**OPTIONS, "devices": 5, "accelerator": "gpu"})
    refuse_options({**OPTIONS, "log_every_n_steps": None})
    with pytest.raises(UsageError) as refused:
        refuse_options({**OPTIONS, **change})
    assert str(refused.value) == message


def test_two_processes_are_allowed_on_one_processor(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    refuse_options({**OPTIONS, "devices": 2})


def test_split_with_fewer_samples_than_processes_is_refused():
    data = Tensors(np.zeros((30, 1)), np.zeros((30, 1)), split=[*["train"] * 20, "val", "val", *["test"] * 8])
    data.setup()
    refuse_sizes(data, SimpleNamespace(num_devices=2, num_nodes=1))
    data.indices["val"] = data.indices["val"][:1]
    with pytest.raises(UsageError) as refused:
        refuse_sizes(data, SimpleNamespace(num_devices=1, num_nodes=2))
    assert str(refused.value) == "the val split has 1 sample, too few for 2 processes: start fewer processes"


def test_callback_that_duplicates_a_default_one_is_refused():
    class Task:
        monitor, mode = "val/loss", "min"

    default = callbacks.defaults(Task())
    refuse_collisions([ModelCheckpoint(every_n_epochs=2, save_top_k=-1), Callback()], default)
    with pytest.raises(
        UsageError, match=r"ModelCheckpoint, which duplicates the default callback best: .*--disable best"
    ):
        refuse_collisions([ModelCheckpoint(filename="best")], default)


def test_checkpoint_bytes_are_those_that_torch_writes(tmp_path):
    module = nn.Linear(300, 300)
    for kind, options in [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]:
        optimizer = kind(module.parameters(), lr=0.1, **options)
        module(torch.ones(1, 300)).sum().backward()
        estimated = checkpoint_bytes(module, partial(kind, lr=0.1, **options))
        optimizer.step()
        torch.save([module.state_dict(), optimizer.state_dict()], tmp_path / "file")
        assert estimated == pytest.approx((tmp_path / "file").stat().st_size, rel=0.05)


BYTES = (300 * 300 + 300) * 4
"""Size of a checkpoint of `linear` and its optimiser without state."""


@pytest.fixture
def linear():
    return Classification(
        classes=300,
        network=nn.Linear(300, 300),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=Constant(),
    )


@pytest.mark.parametrize(
    ("disable", "existing", "files"),
    [
        ([], [], 3),
        (["progress"], [], 3),
        (["best"], [], 2),
        (["best", "last"], [], 0),
        ([], ["last"], 2),
        ([], ["best", "last"], 1),
        (["best"], ["best"], 2),
    ],
)
def test_needed_room_is_one_file_per_missing_checkpoint_and_a_temporary_one(disable, existing, files, linear, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in existing:
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
    needed, free = refuse_no_room(linear, disable, tmp_path)
    assert needed == files * BYTES
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_disk_without_room_is_refused_with_the_bytes_needed_and_free(linear, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * BYTES))
    assert refuse_no_room(linear, [], tmp_path / "new") == (3 * BYTES, 3 * BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * BYTES - 1))
    with pytest.raises(UsageError) as refused:
        refuse_no_room(linear, [], tmp_path / "new")
    assert str(refused.value) == (
        f"{tmp_path / 'new'} has no room for the checkpoints: they need about 1,083,600 bytes, 1,083,599 are free; "
        "choose another folder with --runs"
    )
    assert not (tmp_path / "new").exists()


def test_folder_below_a_file_is_refused(linear, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=rf"cannot create the folder {tmp_path}/file/run: Not a directory"):
        refuse_no_room(linear, [], tmp_path / "file" / "run")


def test_read_only_folder_is_refused(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    libc = ctypes.CDLL(None)
    command = [sys.executable, "-m", "firstlight", "fit", "--config", CONFIG, "--runs", "closed"]
    # root can write everywhere unless it drops CAP_DAC_OVERRIDE: prctl(PR_CAPBSET_DROP, 1). For others it does nothing.
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: libc.prctl(24, 1, 0, 0, 0),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "firstlight: cannot create the folder closed/digits_mlp: Permission denied\n"


BATCHNORM = str(ROOT / "configs" / "digits_mlp_batchnorm.yaml")
SHORT = ["--trainer.max_epochs=1", "--data.batch_size=8"]  # 1,257 = 8 * 157 + 1.


def test_last_batch_of_one_sample_is_merged_for_batch_normalisation(tmp_path):
    checked = called("check", "--config", BATCHNORM, *SHORT, cwd=tmp_path)
    assert "157 training" in checked.stdout
    called("fit", "--config", BATCHNORM, *SHORT, cwd=tmp_path)


# 1,257 = 2 * 628 + 1; with 2 * 627, 3 are left.
@pytest.mark.parametrize("size", quick_or_slow([628, 627], [628]))
def test_last_batch_of_one_sample_for_each_process_is_merged(size, tmp_path):
    options = ["--config", BATCHNORM, "--config", DDP, "--trainer.max_epochs=1", f"--data.batch_size={size}"]
    Ranks(main, ["fit", *options], cwd=tmp_path, ranks=2).succeed()


def test_batches_of_one_sample_are_refused_before_the_run(tmp_path):
    for verb in ("check", "fit"):
        found = called(verb, "--config", BATCHNORM, "--data.batch_size=1", cwd=tmp_path, code=2)
        assert "a training batch has one sample, and MLP cannot train on it" in found.stdout + found.stderr
    assert not (tmp_path / "runs").exists()


def test_check_counts_the_samples_that_each_process_will_get(tmp_path):
    options = ["--config", DDP, "--data.batch_size=2", "--data.batch_size_is=global"]
    found = called("check", "--config", BATCHNORM, *options, cwd=tmp_path, code=2)
    assert "a training batch has one sample, and MLP cannot train on it" in found.stdout


class Pictures(LightningModule):
    """A module of a user whose network normalises pictures: one of them has many pixels."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    def training_step(self, batch):
        return self.network(batch["image"] if isinstance(batch, dict) else batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "sample",
    [
        lambda image: {"image": image, "label": 1},
        lambda image: (image, 1, 2),
        lambda image: ([image], 1),
    ],
    ids=["a dict", "three parts", "inputs in a list"],
)
def test_last_batch_of_one_sample_of_another_form_is_left_to_the_module(sample, tmp_path):
    samples = [sample(torch.randn(1, 5, 5)) for _ in range(9)]
    module = Pictures()
    if isinstance(samples[0], tuple) and isinstance(samples[0][0], list):
        module.training_step = lambda batch: module.network(batch[0][0]).square().mean()
    refuse = LambdaCallback(on_train_start=lambda trainer, _: refuse_single_samples(trainer))
    run = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[refuse], enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(module, DataLoader(samples, batch_size=8))
    assert run.global_step == 2


def test_metric_whose_name_only_begins_with_val_needs_no_validation():
    run = Trainer(max_epochs=1, accelerator="cpu", logger=False, limit_val_batches=0, enable_checkpointing=False)
    refuse_no_validation(run, [EarlyStopping("value_loss")])
    with pytest.raises(UsageError, match="which these callbacks need: EarlyStopping; remove them from trainer"):
        refuse_no_validation(run, [EarlyStopping("train/loss"), EarlyStopping("val_loss")])


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, True),
        ({"drop_last": True}, False),
        ({"rest": 2}, False),
        ({"rest": 2, "processes": 2}, False),
        ({"rest": -6, "processes": 2}, True),  # Each of them gets 9 samples.
    ],
)
def test_last_batch_of_one_sample_of_any_loader_is_refused(options, is_refused, tmp_path):
    options = dict(options)
    rest, processes, inputs = options.pop("rest", 1), options.pop("processes", 1), torch.randn(26, 4)
    rows = TensorDataset(inputs[: 24 + rest], torch.arange(24 + rest) % 2)
    task = Classification(
        MLP(4, [5], 2, norm="batch"), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), Constant(), classes=2
    )
    refuse = LambdaCallback(on_train_start=lambda trainer, _: refuse_single_samples(trainer, processes))
    run = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[refuse], enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    batches = DataLoader(rows, batch_size=8, **options)
    before = [buffer.clone() for buffer in task.buffers()]
    if not is_refused:
        run.fit(task, batches, batches)
        return
    with pytest.raises(UsageError, match="a training batch has one sample, and MLP cannot train on it"):
        run.fit(task, batches, batches)
    assert all(map(torch.equal, before, task.buffers()))
