"""Checkpoints of short epochs are written when there is time, and nothing is lost by it."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from firstlight.callbacks import BestCheckpoint, LastCheckpoint
from firstlight.callbacks import checkpoints as finite_checkpoint
from firstlight.checkpoints.io import AtomicCheckpointIO
from firstlight.errors import UsageError

WRITING = 0.1
"""Seconds that a writing takes; an epoch takes one."""


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Improving(BoringModel):
    """Is better after each epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(100.0 - self.current_epoch))


class SlowIO(AtomicCheckpointIO):
    """Takes its time, and remembers the epochs that it wrote."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.written = clock, defaultdict(list)

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.clock.now += WRITING
        self.written[Path(path).name].append(checkpoint["epoch"])
        super().save_checkpoint(checkpoint, path, storage_options)


class Epochs(Callback):
    """Lets an epoch last a second, and fails in one."""

    def __init__(self, clock, fails=None):
        self.clock, self.fails = clock, fails

    def on_train_epoch_start(self, trainer, pl_module):
        self.clock.now += 1
        if trainer.current_epoch == self.fails:
            raise ZeroDivisionError


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(finite_checkpoint, "time", made)
    monkeypatch.setattr("firstlight.callbacks.checkpoints.time", made)
    return made


def fit(clock, *checkpoints, module=None, fails=None):
    io = SlowIO(clock)
    trainer = Trainer(
        max_epochs=12,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[io],
        callbacks=[Epochs(clock, fails), *checkpoints],
    )
    trainer.fit(module or Improving())
    return io.written


@pytest.mark.parametrize(
    ("at_most", "expected"),
    [(0.02, [0, 5, 10, 11]), (0.05, [0, 2, 4, 6, 8, 10, 11]), (1, list(range(12)))],
)
def test_last_is_written_when_there_is_time_and_at_the_end(at_most, expected, clock, tmp_path):
    written = fit(clock, LastCheckpoint(tmp_path, every_seconds=0, at_most=at_most))
    assert written["last.ckpt"] == expected
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 11


def test_the_best_waits_until_there_is_time_and_is_there_at_the_end(clock, tmp_path):
    best = BestCheckpoint("val/loss", "min", tmp_path, at_most=0.02)
    assert fit(clock, best)["best.ckpt"] == [0, 5, 10, 11]
    found = torch.load(best.best_model_path, weights_only=True)
    (state,) = (each for name, each in found["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert found["epoch"] == 11 and state["best_model_score"] == best.best_model_score == 89


def test_what_waits_is_what_the_weights_were_then(clock, tmp_path):
    best, weights = BestCheckpoint("val/loss", "min", tmp_path), {}

    class Keeps(Callback):
        def on_validation_end(self, trainer, pl_module):
            weights[trainer.current_epoch] = pl_module.layer.weight.detach().clone()

    class Stays(Improving):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(100.0 - min(self.current_epoch, 3)))

    module = Stays()
    fit(clock, Keeps(), best, module=module)
    found = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["layer.weight"], weights[3])
    assert not torch.equal(weights[3], module.layer.weight)


def test_last_never_tells_of_a_best_that_is_not_on_the_disk(clock, tmp_path):
    best, seen = BestCheckpoint("val/loss", "min", tmp_path), []

    class Compares(LastCheckpoint):
        def _together(self, trainer, path, write):
            super()._together(trainer, path, write)
            last, kept = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
            (state,) = (each for name, each in last["callbacks"].items() if name.startswith("BestCheckpoint"))
            seen.append((float(state["best_model_score"]), 100.0 - kept["epoch"]))

    fit(clock, best, Compares(tmp_path, every_n_steps=3))
    assert len(seen) > 8 and all(told == kept for told, kept in seen)


def test_the_best_of_a_run_that_fails_is_on_the_disk(clock, tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(clock, BestCheckpoint("val/loss", "min", tmp_path), fails=4)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 3


def test_a_large_best_does_not_wait_in_memory(clock, tmp_path, monkeypatch):
    monkeypatch.setattr("firstlight.callbacks.checkpoints._SMALL", 100)
    written = fit(clock, BestCheckpoint("val/loss", "min", tmp_path))
    assert written["best.ckpt"] == list(range(12))


@pytest.mark.parametrize(
    "make", [lambda **more: LastCheckpoint(**more), lambda **more: BestCheckpoint("a", "min", **more)]
)
@pytest.mark.parametrize("at_most", [0, -1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(make, at_most):
    with pytest.raises(UsageError, match=r"Checkpoint was given at_most=\S+: it is above 0 and at most 1"):
        make(at_most=at_most)


def test_the_best_of_a_run_whose_weights_became_infinite_is_on_the_disk(clock, tmp_path):
    class Diverges(Improving):
        def on_train_epoch_start(self):
            if self.current_epoch == 4:
                self.layer.weight.data.fill_(float("inf"))

    with pytest.raises(UsageError, match="not finite"):
        fit(clock, BestCheckpoint("val/loss", "min", tmp_path), module=Diverges())
    found = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert found["epoch"] == 3 and found["state_dict"]["layer.weight"].isfinite().all()


def test_a_last_that_was_passed_over_is_made_up_for(clock, tmp_path):
    written = fit(clock, LastCheckpoint(tmp_path, every_n_epochs=5, every_seconds=0, at_most=0.013))
    assert written["last.ckpt"] == [4, 11]  # 9 and 10 had no time yet, and 11 is the end


def test_a_run_that_goes_on_keeps_a_best_that_came_after_its_last(clock, tmp_path):
    fit(clock, BestCheckpoint("val/loss", "min", tmp_path / "a", at_most=1), LastCheckpoint(tmp_path / "a"))
    state = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["callbacks"]
    goes_on = BestCheckpoint("val/loss", "min", tmp_path / "a")
    older = {**state[goes_on.state_key], "best_model_score": torch.tensor(95.0)}
    goes_on.load_state_dict(older)
    assert goes_on.best_model_score == 89 and list(goes_on.best_k_models.values()) == [89]
    (tmp_path / "a" / "best.ckpt").write_bytes(b"damaged")
    goes_on.load_state_dict(older)
    assert goes_on.best_model_score == 95
