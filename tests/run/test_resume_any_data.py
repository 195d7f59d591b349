"""The command line resumes a data module, callbacks and options of the user."""

import os
import re

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from firstlight.__main__ import main
from firstlight.callbacks import BestCheckpoint, EarlyStopping
from firstlight.data import Digits
from tests.helpers import CONFIG, Ranks, called, newest

MINE = """
import os, random, signal
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        inputs = torch.randn(1200, 64, generator=torch.Generator().manual_seed(1))
        self.rows = TensorDataset(inputs, torch.arange(1200) % 10)

    def train_dataloader(self):
        sampler = Counts() if self.counts else None
        return DataLoader(self.rows, 32, shuffle=not self.counts, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.rows, 64)


class Counts(torch.utils.data.Sampler):
    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 1200

    def __iter__(self):
        self.passes += 1
        return iter(random.Random(self.passes).sample(range(1200), 1200))


class Seen(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open("seen", "a") as file:
            print(trainer.current_epoch, *(float(row[0]) for row in batch[0]), file=file)


class Terminate(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
"""
OPTIONS = ["--config", CONFIG, "--data=mine.Data", "--trainer.max_epochs=3", "--trainer.callbacks+=mine.Seen"]
STOP = ["--trainer.callbacks+=mine.Terminate", "--trainer.callbacks.step=58"]


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_own_data_module_stopped_by_sigterm_uses_each_sample_once_per_epoch(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    Ranks(main, ["fit", *OPTIONS, "--experiment=whole"], cwd=tmp_path).succeed()
    (tmp_path / "seen").unlink()
    assert Ranks(main, ["fit", *OPTIONS, *STOP], cwd=tmp_path).wait() == [143]
    run = newest(tmp_path)
    Ranks(main, ["fit", "--run", str(run), "--trainer.callbacks=[mine.Seen]"], cwd=tmp_path).succeed()
    taken = {}
    for line in (tmp_path / "seen").read_text().splitlines():
        epoch, *samples = line.split()
        taken.setdefault(epoch, []).extend(samples)
    assert {epoch: len(set(samples)) for epoch, samples in taken.items()} == dict.fromkeys("012", 1200)
    expected, found = weights(newest(tmp_path, "whole")), weights(run)
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_sampler_that_cannot_be_restored_is_refused_and_leaves_the_run_unchanged(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    assert Ranks(main, ["fit", *OPTIONS, *STOP, "--data.counts=true"], cwd=tmp_path).wait() == [143]
    run = newest(tmp_path)
    config = (run / "config.yaml").read_text()
    command = ["fit", "--run", str(run), "--trainer.callbacks=null"]
    done = called(*command, cwd=tmp_path, code=2)
    lost = "the run cannot resume exactly: sampler.passes of the training loader was 1 and is 0; --allow_inexact"
    assert lost in done.stderr and done.stderr.count("\n") == 1
    assert (run / "config.yaml").read_text() == config and not list(run.glob("*-until-*"))
    called(*command, "--allow_inexact", cwd=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_callbacks_used_for_a_second_fit_start_anew(tmp_path):
    class Model(BoringModel):
        def __init__(self, losses):
            super().__init__()
            self.losses = iter(losses)

        def validation_step(self, batch, batch_idx):
            pass

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.log("val/loss", next(self.losses))

    stop = EarlyStopping("val/loss", patience=2)
    best = BestCheckpoint("val/loss", "min", dirpath=tmp_path)
    for losses, epochs in (([1.0, 2.0, 3.0], 3), ([9.0, 8.0, 7.0, 7.5, 7.5], 5)):
        trainer = Trainer(
            accelerator="cpu", max_epochs=9, limit_train_batches=2, logger=False, callbacks=[stop, best],
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Model(losses))
        assert trainer.current_epoch == epochs
        assert best.best_model_score == min(losses)


CONFIGURED = {
    "StochasticWeightAveraging": ["--trainer.callbacks.swa_lrs=0.01"],
    "Timer": ["--trainer.callbacks.duration=00:01:00:00"],
    "ModelCheckpoint": ["--trainer.callbacks.train_time_interval=0:10:00", "--trainer.callbacks.filename=mine"],
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_configured_callback_comes_back_from_the_saved_configuration(name, tmp_path):
    options = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{name}", *CONFIGURED[name]]
    called("fit", "--config", CONFIG, "--trainer.max_epochs=2", *options, cwd=tmp_path)
    saved = yaml.safe_load((newest(tmp_path) / "config.yaml").read_text())
    assert "serialize" not in str(saved)
    done = called("fit", "--run", str(newest(tmp_path)), "--trainer.max_epochs=3", cwd=tmp_path)
    assert not re.search(r"change trainer\.callbacks", done.stdout)


def order_without_a_seed(folder):
    """Write which samples this process takes in an epoch."""
    os.environ.pop("PL_GLOBAL_SEED", None)

    class Model(BoringModel):
        def __init__(self):
            super().__init__()
            self.rows = []

        def training_step(self, batch, batch_idx):
            self.rows += [hash(tuple(row.flatten().tolist())) for row in batch[0]]
            return self.layer(batch[0].flatten(1)[:, :32]).sum() * 0

        def validation_step(self, batch, batch_idx):
            pass

    model = Model()
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(model, datamodule=Digits())  # fmt: skip
    torch.save(model.rows, folder / f"{os.environ['LOCAL_RANK']}.pt")
    return 0


def test_processes_without_a_common_seed_take_each_sample_once(tmp_path):
    Ranks(order_without_a_seed, tmp_path, cwd=tmp_path, ranks=2).succeed()
    taken = [row for rank in (0, 1) for row in torch.load(tmp_path / f"{rank}.pt")]
    inputs, _ = Digits().tensors("train")
    assert sorted(taken) == sorted(hash(tuple(row.flatten().tolist())) for row in inputs)
