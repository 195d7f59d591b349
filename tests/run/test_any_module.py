"""The command line takes any LightningModule and LightningDataModule."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from firstlight.__main__ import main
from firstlight.callbacks.defaults import MONITORING
from tests.helpers import CONFIG, DDP, Ranks, called, logged, newest, results

QUICK = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--report=false"]
GAN = ["--model", "mine.GAN", "--data", "mine.Data", *QUICK]
MONITOR = ["--monitor=val_distance", "--mode=min"]


@pytest.fixture
def here(tmp_path):
    shutil.copy(Path(__file__).with_name("foreign_modules.py"), tmp_path / "mine.py")
    return tmp_path


def test_gan_with_a_monitor_trains_tests_and_predicts(here):
    done = called("run", *GAN, *MONITOR, cwd=here)
    run = newest(here, "unnamed")
    distances = [value for _, value in logged(run, "val_distance")]
    assert results(run)["best"]["val_distance"] == pytest.approx(min(distances))
    assert results(run)["metrics"] == {"test_distance": pytest.approx(min(distances))}
    assert f"plan   {4 * 16 + 16 + 16 * 2 + 2 + 2 * 16 + 16 + 16 + 1} parameters, 16 steps" in done.stdout
    for name in ("g_loss", "d_loss", "grad_norm/0/total", "grad_norm/1/total", "lr"):
        assert [step for step, _ in logged(run, name)] == list(range(16))
    called("predict", "--run", str(run), cwd=here)
    (file,) = run.glob("evaluations/predict-*/predictions.csv")
    with file.open() as opened:
        rows = list(csv.reader(opened))
    assert rows[0] == ["index", "score", "x/0", "x/1"]
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    prefix = "discriminator."
    discriminator.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    for index, (own, score, *x) in enumerate(rows[1:]):
        assert int(own) == index
        assert discriminator(torch.tensor(list(map(float, x)))).item() == pytest.approx(float(score), rel=1e-4)
    assert len(rows) == 65


def test_each_line_counts_the_batches_of_manual_optimization(here):
    fitted = called("fit", *GAN, *MONITOR, cwd=here).stdout
    run = newest(here, "unnamed")
    assert "fit    2 epochs, 16 steps\n" in fitted and results(run)["steps"] == 16
    best = results(run)["best"]
    assert best["step"] == 8 * best["epoch"]
    assert f"best   epoch {best['epoch']}, step {best['step']}, val_distance" in fitted
    resumed = called("fit", "--run", str(run), "--trainer.max_epochs=3", cwd=here).stdout
    assert "at step 16\n" in resumed and "24 steps\n" in resumed and "fit    3 epochs, 24 steps\n" in resumed
    again = called("fit", "--run", str(run), "--trainer.max_epochs=3", cwd=here).stdout
    assert "nothing to do: all 24 steps are done" in again


def test_gan_without_a_monitor_trains_and_is_told_what_is_off(here):
    done = called("fit", *GAN, cwd=here)
    assert f"{', '.join(MONITORING)} are off: GAN declares no monitor, give --monitor NAME and --mode" in done.stdout
    run = newest(here, "unnamed")
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    called("test", "--run", str(run), cwd=here)
    checked = called("check", *GAN, "--verbose", cwd=here)
    assert "gradients  skipped  GAN optimises by hand" in checked.stdout
    assert "ms each" in checked.stdout


def test_module_that_draws_numbers_has_the_same_metrics_in_run_and_in_test(here):
    with (here / "mine.py").open("a") as file:
        file.write(
            "\n\nclass Noisy(Plain):\n"
            "    def validation_step(self, batch, batch_idx):\n        self.log('noise', torch.rand(()))\n\n"
            "    test_step = validation_step\n"
        )
    noisy = ["--report=false", "--model", "mine.Noisy", "--data", "mine.Data", "--monitor=noise", "--mode=min"]
    called("run", *noisy, "--trainer.max_epochs=1", cwd=here)
    run = newest(here, "unnamed")
    called("test", "--run", str(run), cwd=here)
    (again,) = run.glob("evaluations/test-*")
    assert results(run)["metrics"] == results(again)["metrics"] and "noise" in results(again)["metrics"]


def test_module_that_declares_a_monitor_needs_no_option(here):
    with (here / "mine.py").open("a") as file:
        file.write("\n\nclass Own(GAN):\n    monitor, mode = 'val_distance', 'min'\n")
    called("fit", "--model", "mine.Own", *GAN[2:], cwd=here)
    assert "val_distance" in results(newest(here, "unnamed"))["best"]


def test_metric_of_training_can_be_monitored_without_validation_data(here):
    called("fit", *GAN[:2], "--data", "mine.TrainOnly", *GAN[4:], "--monitor=g_loss", "--mode=min", cwd=here)
    assert "g_loss" in results(newest(here, "unnamed"))["best"]


@pytest.mark.parametrize(
    "verb, options, message",
    [
        ("run", GAN, "run tests the best checkpoint, but GAN declares no monitor: give --monitor NAME and --mode"),
        ("fit", [*GAN, MONITOR[0]], "monitor val_distance of GAN needs a direction: --mode min"),
        ("fit", [*GAN, MONITOR[1]], "--mode min needs --monitor NAME"),
        ("fit", [*GAN, "--monitor=val_distanc", "--mode=min"], "did you mean val_distance?"),
        (
            "fit",
            [*GAN[:2], "--data", "mine.TrainOnly", *GAN[4:], "--monitor=los", "--mode=min"],
            "EarlyStopping monitors los, but the run logs g_loss, d_loss",
        ),
        ("run", [*GAN[:2], "--data", "mine.TrainOnly", *MONITOR], "run needs test_dataloader, which TrainOnly does"),
        ("run", ["--model", "mine.Plain", *GAN[2:], *MONITOR], "run needs test_step, which Plain does not have: use"),
        (
            "fit",
            [
                "--config",
                CONFIG,
                *MONITOR,
            ],
            "--monitor and --mode are for modules that declare none: Classification takes --model.monitor",
        ),
    ],
)
def test_what_a_module_lacks_is_refused_in_one_line(verb, options, message, here):
    done = called(verb, *options, cwd=here, code=2)
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("epoch ")]) == 1


@pytest.mark.parametrize(
    "returned, fault",
    [
        ("[1, 2]", "a list of a int, a int"),
        ("None", "None"),
        ("{'a': 1}", "a dict of a a int"),
        ("{'a': batch[0], 'b': batch[0][:1]}", "all tensors must have the same number of samples"),
    ],
)
def test_predictions_that_are_no_columns_are_refused(returned, fault, here):
    with (here / "mine.py").open("a") as file:
        file.write(f"\n\nclass Bad(GAN):\n    def predict_step(self, batch, batch_idx):\n        return {returned}\n")
    called("fit", "--model", "mine.Bad", *GAN[2:], "--trainer.max_epochs=1", cwd=here)
    done = called("predict", "--run", str(newest(here, "unnamed")), cwd=here, code=2)
    assert fault in done.stderr


def test_samples_that_several_processes_validate_twice_are_told(here):
    with (here / "mine.py").open("a") as file:
        file.write(
            "\n\nclass Odd(Data):\n    def val_dataloader(self):\n"
            "        return DataLoader(TensorDataset(torch.arange(7.0)[:, None]), batch_size=2)\n"
            "\n\nclass Mean(Plain):\n    def validation_step(self, batch, batch_idx):\n"
            "        self.log('val/mean', batch[0].mean(), batch_size=len(batch[0]), sync_dist=True)\n"
        )
    options = ["--model=mine.Mean", "--data=mine.Odd", "--monitor=val/mean", "--mode=min", "--trainer.max_epochs=1"]
    done = Ranks(main, ["fit", *options, "--config", DDP], cwd=here, ranks=2).succeed()
    (value,) = (value for _, value in logged(newest(here, "ddp"), "val/mean"))
    assert value == sum(range(7)) / 8  # The sample that counts twice is 0.
    assert "the val loader gives 1 of its samples to two processes, so they count twice in val/*" in done.stdout


UNREADABLE = """

import collections
import threading
import numpy


class Hyper(Plain):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters({"lr": lr, "act": nn.functional.relu, "counts": collections.Counter("abc")})


class Late(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {"history": [0.1, numpy.minimum(0.5, 2.0)]} if self.trainer.current_epoch else {}


class Lock(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {"lock": threading.Lock()}


class Within(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {}
        checkpoint["mine"]["mine"] = checkpoint["mine"]


class Field(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["metrics"] = {"confusion": [[1, 2]]}
"""


def test_hyperparameters_that_no_checkpoint_can_hold_are_refused_before_the_first_step(here):
    with (here / "mine.py").open("a") as file:
        file.write(UNREADABLE)
    why = "a checkpoint cannot hold a hyper-parameter of Hyper: act, a function: store plain values and tensors, or"
    module = ["--model", "mine.Hyper", "--data", "mine.Data", *QUICK]
    assert why in called("fit", *module, cwd=here, code=2).stderr
    assert why in called("check", *module, cwd=here, code=2).stdout
    assert not (here / "runs").exists()
    called("fit", *module, "--disable=best,last", cwd=here)  # It writes none.


@pytest.mark.parametrize(
    ("module", "wrong", "kept"),
    [
        ("Late", "the checkpoint holds mine.history.1, a numpy.float64: store its .item()", ["last.ckpt"]),
        ("Lock", "the checkpoint holds mine.lock, a _thread.lock: store plain values and tensors", []),
        ("Within", "the checkpoint holds a container that holds itself, or containers of more than 100 levels", []),
        ("Field", "metrics holds what is not a number", []),
    ],
)
def test_checkpoint_that_nobody_could_read_is_refused_when_it_is_written(module, wrong, kept, here):
    with (here / "mine.py").open("a") as file:
        file.write(UNREADABLE)
    options = ["--model", f"mine.{module}", "--data", "mine.Data", "--last.min_seconds=0", *QUICK]
    done = called("fit", *options, cwd=here, code=2)
    folder = newest(here, "unnamed") / "checkpoints"
    assert done.stderr.splitlines()[-1] == f"firstlight: cannot write {folder / 'last.ckpt'}: {wrong}"
    assert [file.name for file in folder.glob("*")] == kept
    if kept:
        assert torch.load(folder / "last.ckpt", weights_only=True)["mine"] == {}
