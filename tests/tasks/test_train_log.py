"""A resumed run logs the same training values as an uninterrupted one."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from firstlight.callbacks import BestCheckpoint
from firstlight.data import Digits
from firstlight.loggers import History
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.tasks.helpers import trainer

NAMES = "train/loss", "train/accuracy", "epoch"


def make():
    torch.manual_seed(0)
    return Classification(
        MLP(64, [8], 10), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), Constant(), classes=10
    )


class Saves(Callback):
    """Save the state after a step, as callbacks do: before it is logged."""

    def __init__(self, path, step, **options):
        self.path, self.step, self.options, self.seen = path, step, options, {}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path, **self.options)

    def on_train_epoch_end(self, trainer, *_):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "train/" in name}
        self.seen[trainer.current_epoch] = metrics


class Fails(Callback):
    def on_fit_start(self, *_):
        raise RuntimeError("before training")


def fit(tmp_path, *callbacks, task=None, ckpt=None, **options):
    """Return what a fit of two epochs of 40 steps logged of training."""
    history = History()
    data = Digits(batch_size=32, split_seed=0)
    options = {"log_every_n_steps": 15, "max_epochs": 2, "logger": history, "callbacks": list(callbacks), **options}
    trainer(tmp_path, **options).fit(task or make(), datamodule=data, ckpt_path=ckpt)
    logged = {}
    for name in NAMES:
        if name in history.logged:
            logged |= {(name, step): value for step, value in zip(*history[name], strict=True)}
    return logged


@pytest.mark.parametrize(("step", "every"), [(7, 15), (30, 15), (36, 15), (40, 15), (40, 20), (52, 15)])
@pytest.mark.parametrize("batches", [1, 2])
def test_resumed_run_logs_the_same_values(step, every, batches, tmp_path):
    options = {"accumulate_grad_batches": batches, "max_epochs": 2 * batches, "log_every_n_steps": every}
    saves, resumes = Saves(tmp_path / "a.ckpt", step), Saves(tmp_path / "b.ckpt", -1)
    whole = fit(tmp_path, saves, **options)
    rest = fit(tmp_path, resumes, ckpt=saves.path, **options)
    assert rest == {(name, at): value for (name, at), value in whole.items() if at >= step - (step % every == 0)}
    assert rest
    assert resumes.seen == {epoch: saves.seen[epoch] for epoch in resumes.seen}


def test_log_starts_anew_with_other_processes_or_without_its_state(tmp_path):
    saves = Saves(tmp_path / "a.ckpt", 7)
    whole = fit(tmp_path, saves)
    checkpoint = torch.load(saves.path, weights_only=True)
    checkpoint["train_log"]["batches"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    checkpoint["train_log"]["batches"] = [{}]  # The state of a process that has summed some batches.
    torch.save(checkpoint, tmp_path / "empty.ckpt")
    del checkpoint["train_log"]
    torch.save(checkpoint, tmp_path / "none.ckpt")
    two, empty, none = (fit(tmp_path, ckpt=tmp_path / f"{name}.ckpt") for name in ("two", "empty", "none"))
    assert two == empty == none
    assert two["train/loss", 14] != whole["train/loss", 14] and two["train/loss", 29] == whole["train/loss", 29]
    task = make()
    with pytest.raises(RuntimeError, match="before training"):
        fit(tmp_path, Fails(), task=task, ckpt=saves.path)
    task.load_state_dict(make().state_dict())
    assert fit(tmp_path, task=task) == whole


@pytest.mark.parametrize(
    ("options", "save"), [({"log_every_n_steps": 0}, {}), ({}, {"weights_only": True})], ids=["unlogged", "weights"]
)
def test_checkpoint_without_a_use_for_the_log_does_not_hold_it(options, save, tmp_path):
    saves = Saves(tmp_path / "a.ckpt", 7, **save)
    fit(tmp_path, saves, **options)
    assert not torch.load(saves.path, weights_only=True).get("train_log")


def test_the_best_checkpoint_holds_no_training_samples(tmp_path, monkeypatch):
    best = BestCheckpoint("val/loss", "min", dirpath=tmp_path)
    told = []
    monkeypatch.setattr(History, "after_save_checkpoint", lambda logger, saved: told.append(saved.best_model_path))
    fit(tmp_path, best, enable_checkpointing=True)
    assert set(told) == {str(tmp_path / "best.ckpt")}
    found = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert found["global_step"] > 0 and "train_log" not in found
