"""Values of a validation are used for that validation only, and a monitor is refused only if it is certain."""

import pytest
import torch

from tests.helpers import called, logged, newest, results

MODULE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Base(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        return (self.net(batch[0]) - 1).square().mean()
    def validation_step(self, batch, index, dataloader_idx=0):
        self.loss = self.training_step(batch, index)
        self.log("val/loss", self.loss)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Seldom(Base):
    "Measures in epochs 1, 4, 7, ..., where each value is worse than the first."
    def on_validation_epoch_end(self):
        if self.current_epoch % 3 == 0:
            self.log("val/fid", 100.0 + self.current_epoch)

class NotSane(Base):
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val/score", self.loss)

class AtEpochEnd(Base):
    def on_train_epoch_end(self):
        self.log("val/score", self.loss)

class NotANumber(Base):
    def on_validation_epoch_end(self):
        self.log("val/score", float("nan"))

class Named(Base):
    "Logs names that firstlight or Lightning logs, too."
    def training_step(self, batch, index):
        if self.training:
            self.log_dict({"lr": 123.0, "grad_norm/total": 77.0, "epoch": 5.0})
        return super().training_step(batch, index)

class Data(LightningDataModule):
    def __init__(self, loaders: int = 1):
        super().__init__()
        self.loaders = loaders
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(16.0).view(8, 2) / 16), batch_size=4)
    def val_dataloader(self):
        every = [self.train_dataloader() for _ in range(self.loaders)]
        return every if self.loaders > 1 else every[0]
"""
QUICK = ("--mode=min", "--report=false", "--disable=insight", "--trainer.log_every_n_steps=1")


@pytest.fixture
def here(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def fitted(module, monitor, here, *options, code=0):
    own = (f"--model=mine.{module}", "--data=mine.Data", f"--monitor={monitor}", *QUICK)
    done = called("fit", *own, *options, cwd=here, code=code)
    return newest(here, "unnamed"), done


@pytest.mark.parametrize(
    "module, monitor, options",
    [
        ("Base", "val/loss/dataloader_idx_1", ["--data.loaders=2"]),
        ("NotSane", "val/score", []),
        ("NotSane", "val/score", ["--trainer.val_check_interval=1"]),
        ("AtEpochEnd", "val/score", []),
        ("AtEpochEnd", "val/score", ["--disable=insight,early_stopping"]),
    ],
)
def test_a_monitor_that_a_validation_or_its_epoch_logs_is_taken(module, monitor, options, here):
    run, done = fitted(module, monitor, here, *options, "--trainer.max_epochs=2")
    assert results(run)["best"][monitor] == pytest.approx(min(value for _, value in logged(run, monitor)))
    line = f"best   {monitor} is not known before the first validation, which must log it: the sanity check logs"
    assert (line in done.stdout) == (module != "Base")


@pytest.mark.parametrize("disabled, name", [("insight", "EarlyStopping"), ("early_stopping", "BestCheckpoint")])
def test_a_monitor_that_the_first_validation_lacks_ends_the_run_in_one_line(disabled, name, here):
    run, done = fitted("NotSane", "val/scor", here, "--trainer.max_epochs=9", f"--disable={disabled}", code=2)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("epoch ")]
    logs = "val/loss, val/score; did you mean val/score?"
    assert line == f"firstlight: {name} monitors val/scor, but the run logs {logs}"
    assert {step for step, _ in logged(run, "val/loss")} == {1}


def test_a_metric_of_an_earlier_validation_is_no_metric_of_the_best_one(here):
    run, done = fitted("Seldom", "val/loss", here, "--trainer.max_epochs=3")
    best = results(run)["best"]
    assert best["epoch"] == 3 and "val/fid" not in best
    lines = {int(line.split("/")[0].split()[1]): line for line in done.stderr.splitlines() if line.startswith("epoch")}
    assert [epoch for epoch, line in lines.items() if "val/fid" in line] == [1]
    run, _ = fitted("Seldom", "val/loss", here, "--trainer.max_epochs=4")
    assert results(run)["best"]["val/fid"] == 103


@pytest.mark.parametrize("options", [[], ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1"]])
def test_patience_counts_the_validations_that_measure_the_monitor(options, here):
    run, done = fitted("Seldom", "val/fid", here, "--trainer.max_epochs=20", "--early_stopping.patience=2", *options)
    # The first value is the best, so the run stops at the second one after it, in epoch 7.
    assert results(run)["steps"] == 14 and "7 epochs" in done.stdout
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert results(run)["best"]["epoch"] == 1 and best["metrics"]["val/fid"] == 100


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_resumed_run_knows_which_metrics_are_old(epochs, here):
    options = ["--early_stopping.patience=2"]
    run, _ = fitted("Seldom", "val/fid", here, *options, f"--trainer.max_epochs={epochs}")
    done = called("fit", "--run", str(run), "--trainer.max_epochs=20", cwd=here)
    assert results(run)["steps"] == 14 and results(run)["best"]["epoch"] == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("epoch") and ", val/fid" in line]
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [each for each in (4, 7) if each > epochs]


@pytest.mark.parametrize(
    "module, options, reason",
    [
        ("NotSane", ["--trainer.fast_dev_run=2"], "fast_dev_run writes no checkpoint"),
        ("NotANumber", ["--disable=insight,nonfinite"], "val/score was a number in no validation"),
        ("NotSane", ["--trainer.max_steps=1"], "the run ended before its first validation"),
    ],
)
def test_a_run_without_a_best_checkpoint_says_why(module, options, reason, here):
    run, done = fitted(module, "val/score", here, "--trainer.max_epochs=2", *options)
    assert f"best   none: {reason}" in done.stdout.splitlines()
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_a_name_that_the_module_logs_too_has_the_value_of_the_module(here):
    run, done = fitted("Named", "val/loss", here, "--trainer.max_epochs=2")
    assert logged(run, "lr") == [(step, 123) for step in range(4)]
    assert logged(run, "grad_norm/total") == [(step, 77) for step in range(4)]
    assert len(logged(run, "grad_norm/Linear")) == 4  # Nobody else logs it.
    line = "log    Named logs epoch, and validations log the number of the epoch as epoch: rename yours"
    assert done.stdout.splitlines().count(line) == 1
