"""When best.ckpt and last.ckpt are written, and what a resumed run makes of them."""

from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from firstlight.callbacks import BestCheckpoint, LastCheckpoint, RandomState
from firstlight.callbacks import checkpoints as module_under_test
from firstlight.callbacks.checkpoints import validation_follows
from firstlight.checkpoints.io import AtomicCheckpointIO
from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.loggers import History
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification

WRITING = 0.1
"""Seconds that a write takes; an epoch takes one."""


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Improving(BoringModel):
    """Its metric is better after each epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(100.0 - self.current_epoch))


class SlowIO(AtomicCheckpointIO):
    """Moves the clock, and records the epochs that it wrote."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.written = clock, defaultdict(list)

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.clock.now += WRITING
        self.written[Path(path).name].append(checkpoint["epoch"])
        super().save_checkpoint(checkpoint, path, storage_options)


class OneSecondEpochs(Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_epoch_start(self, trainer, pl_module):
        self.clock.now += 1


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module_under_test, "time", made)
    return made


def fit(clock, *checkpoints, module=None, **options):
    io = SlowIO(clock)
    options = {"max_epochs": 12, "limit_train_batches": 2, "logger": False, **options}
    trainer = Trainer(
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[io],
        callbacks=[OneSecondEpochs(clock), *checkpoints],
        **options,
    )
    trainer.fit(module or Improving())
    return io.written


@pytest.mark.parametrize(
    ("min_seconds", "expected"),
    [(0, list(range(12))), (1, list(range(12))), (1.5, [0, 2, 4, 6, 8, 10, 11]), (1e9, [0, 11])],
)
def test_last_skips_epochs_that_end_within_min_seconds(min_seconds, expected, clock, tmp_path):
    written = fit(clock, LastCheckpoint(tmp_path, every_seconds=0, min_seconds=min_seconds))
    assert written["last.ckpt"] == expected
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 11


def test_min_seconds_does_not_delay_writes_within_an_epoch(clock, tmp_path):
    written = fit(clock, LastCheckpoint(tmp_path, every_n_steps=3, every_seconds=0, min_seconds=1e9), max_epochs=4)
    assert written["last.ckpt"] == [0, 1, 2, 3]  # Step 2 ends the first epoch, 3 is due, 6 ends one, 8 the run.


def test_min_seconds_does_not_delay_a_run_that_stops(clock, tmp_path):
    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 3

    assert fit(clock, Stops(), LastCheckpoint(tmp_path, min_seconds=1e9))["last.ckpt"] == [0, 3]
    assert fit(clock, LastCheckpoint(tmp_path / "steps", min_seconds=1e9), max_steps=7)["last.ckpt"] == [0, 3]


@pytest.mark.parametrize("first_rank_says", [True, False])
def test_the_first_process_decides_whether_min_seconds_have_passed(first_rank_says, clock, tmp_path):
    last = LastCheckpoint(tmp_path, min_seconds=5)
    last._written_step, last._written_at = 1, 0.0
    asked = []
    strategy = SimpleNamespace(broadcast=lambda value: asked.append(value) or first_rank_says)
    clock.now = 4.0
    assert last._is_too_soon(SimpleNamespace(strategy=strategy)) is first_rank_says
    clock.now = 5.0
    assert last._is_too_soon(SimpleNamespace(strategy=strategy)) is first_rank_says
    assert asked == [True, False]
    last.min_seconds = 0
    assert last._is_too_soon(SimpleNamespace(strategy=strategy)) is False
    assert len(asked) == 2


def test_last_is_written_after_every_fifth_epoch_and_at_the_end(clock, tmp_path):
    assert fit(clock, LastCheckpoint(tmp_path, every_n_epochs=5, every_seconds=0))["last.ckpt"] == [4, 9, 11]


def test_last_is_written_when_every_seconds_have_passed(clock, tmp_path):
    # A step takes no time and an epoch one second, so the first step of an epoch is late.
    written = fit(clock, LastCheckpoint(tmp_path, every_n_epochs=100, every_seconds=2.5))
    assert written["last.ckpt"] == [2, 5, 8, 11, 11]


def test_last_is_not_written_between_accumulated_batches(clock, tmp_path):
    class OneSecondBatches(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock.now += 1

    batches = []

    class Sees(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            batches.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            super()._save_checkpoint(trainer, filepath)

    # It is late in batches 2, 5 and 9.
    options = {"limit_train_batches": 12, "max_epochs": 1, "accumulate_grad_batches": 2}
    fit(clock, OneSecondBatches(), Sees(tmp_path, every_seconds=2.5), **options)
    assert batches == [2, 6, 10, 12]


def test_an_epoch_that_ends_without_a_step_is_written_as_ended(clock, tmp_path):
    class EndsEarly(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    progress = []

    class Sees(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            progress.append(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
            super()._save_checkpoint(trainer, filepath)

    fit(clock, Sees(tmp_path, every_n_steps=1, min_seconds=0), module=EndsEarly(), limit_train_batches=3, max_epochs=2)
    assert progress == [False, True, False, True]


def test_best_is_written_after_each_validation_that_is_better(clock, tmp_path):
    class Stays(Improving):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(100.0 - min(self.current_epoch, 3)))
            self.log("val/accuracy", self.current_epoch / 10)

    best, weights = BestCheckpoint("val/loss", "min", tmp_path), {}

    class Keeps(Callback):
        def on_validation_end(self, trainer, pl_module):
            weights[trainer.current_epoch] = pl_module.layer.weight.detach().clone()

    assert fit(clock, Keeps(), best, module=Stays())["best.ckpt"] == [0, 1, 2, 3]
    found = torch.load(best.best_model_path, weights_only=True)
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["layer.weight"], weights[3])
    (state,) = (each for name, each in found["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert state["best_model_score"] == best.best_model_score == 97
    assert found["metrics"] == {"val/loss": 97, "val/accuracy": pytest.approx(0.3)}


def test_the_best_that_last_names_is_on_the_disk(clock, tmp_path):
    best, seen = BestCheckpoint("val/loss", "min", tmp_path), []

    class Compares(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            last, kept = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
            (state,) = (each for name, each in last["callbacks"].items() if name.startswith("BestCheckpoint"))
            seen.append((float(state["best_model_score"]), 100.0 - kept["epoch"]))

    fit(clock, best, Compares(tmp_path, every_n_steps=3))
    assert len(seen) > 8 and all(named == kept for named, kept in seen)


@pytest.mark.parametrize("order", ["best first", "last first"])
def test_the_best_waits_for_last_with_the_weights_that_were_best(order, clock, tmp_path):
    weights = {}

    class Stays(Improving):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(100.0 - min(self.current_epoch, 5)))

    class Keeps(Callback):
        def on_validation_end(self, trainer, pl_module):
            weights[trainer.current_epoch] = pl_module.layer.weight.detach().clone()

    class Looks(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            if (tmp_path / "best.ckpt").is_file():
                found = torch.load(tmp_path / "best.ckpt", weights_only=True)
                assert torch.equal(found["state_dict"]["layer.weight"], weights[found["epoch"]])
                seen.append(found["epoch"])

    seen: list[int] = []
    best, last = BestCheckpoint("val/loss", "min", tmp_path), Looks(tmp_path, min_seconds=2.5)
    pair = [best, last] if order == "best first" else [last, best]
    written = fit(clock, Keeps(), *pair, module=Stays(), max_epochs=8)
    assert written["last.ckpt"] == [0, 3, 6, 7]
    if order == "best first":
        assert written["best.ckpt"] == [0, 3, 5] and seen == [0, 3, 5, 5]
    else:  # `last.ckpt` cannot hold the best of its own epoch, which a resumed run does not repeat.
        assert written["best.ckpt"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fails", [False, True])
def test_the_best_that_waits_is_written_when_the_run_fails(fails, clock, tmp_path):
    class Fails(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                if fails:
                    (tmp_path / "best.ckpt").unlink()
                    (tmp_path / "best.ckpt" / "in the way").mkdir(parents=True)
                raise ZeroDivisionError("of the user")

    best = BestCheckpoint("val/loss", "min", tmp_path)
    told = pytest.warns(match=r"cannot write .*best\.ckpt") if fails else nullcontext()
    with told, pytest.raises(ZeroDivisionError, match="of the user"):
        fit(clock, best, LastCheckpoint(tmp_path, min_seconds=10), Fails())
    assert fails or torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2


def test_the_best_of_several_processes_does_not_wait(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    best = BestCheckpoint("val/loss", "min", tmp_path)
    assert fit(clock, best, LastCheckpoint(tmp_path, min_seconds=10), max_epochs=3)["best.ckpt"] == [0, 1, 2]


def test_the_best_of_a_run_whose_weights_become_infinite_is_kept(clock, tmp_path):
    class Diverges(Improving):
        def on_train_epoch_start(self):
            if self.current_epoch == 4:
                self.layer.weight.data.fill_(float("inf"))

    message = r"/best\.ckpt is not written at step 10: layer\.weight is not finite; earlier checkpoints are kept$"
    with pytest.raises(UsageError, match=message):
        fit(clock, BestCheckpoint("val/loss", "min", tmp_path), module=Diverges())
    found = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert found["epoch"] == 3 and found["state_dict"]["layer.weight"].isfinite().all()


@pytest.mark.parametrize("other_rank_fails_at", [1, 2])
def test_a_process_raises_when_another_one_cannot_write(other_rank_fails_at, clock, tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    asked = []
    decide = lambda _, decision, all=True: decision or asked.append(1) or len(asked) == other_rank_fails_at  # noqa: E731
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", decide)
    message = ["a tensor of another process is not finite", r"^the first process could not write \S+/last\.ckpt$"]
    with pytest.raises(UsageError, match=message[other_rank_fails_at - 1]):
        fit(clock, LastCheckpoint(tmp_path), module=BoringModel())


def test_logs_are_saved_before_each_checkpoint(clock, tmp_path):
    events = []

    class Log(History):
        def save(self):
            events.append("logs")

    class Write(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            events.append(Path(path).name)

    checkpoints = [BestCheckpoint("val/loss", "min", tmp_path), LastCheckpoint(tmp_path)]
    Trainer(
        max_epochs=1, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, plugins=[Write()], callbacks=checkpoints, logger=Log(),
        log_every_n_steps=1,
    ).fit(Improving())  # fmt: skip
    names = [event for event in events if event != "logs"]
    assert names == ["best.ckpt", "last.ckpt"]
    assert all(events[events.index(name) - 1] == "logs" for name in names)


def test_a_resumed_run_keeps_a_best_that_is_newer_than_its_last(clock, tmp_path):
    fit(clock, BestCheckpoint("val/loss", "min", tmp_path / "a"), LastCheckpoint(tmp_path / "a"))
    state = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["callbacks"]
    resumed = BestCheckpoint("val/loss", "min", tmp_path / "a")
    older = {**state[resumed.state_key], "best_model_score": torch.tensor(95.0)}
    resumed.load_state_dict(older)
    assert resumed.best_model_score == 89 and list(resumed.best_k_models.values()) == [89]
    (tmp_path / "a" / "best.ckpt").write_bytes(b"damaged")
    resumed.load_state_dict(older)
    assert resumed.best_model_score == 95


VALIDATIONS = [
    {},
    {"check_val_every_n_epoch": 2},
    {"check_val_every_n_epoch": 2, "val_check_interval": 4},
    {"check_val_every_n_epoch": 3, "val_check_interval": 0.5},
    {"val_check_interval": 3},
    {"check_val_every_n_epoch": None, "val_check_interval": 4},
    {"limit_val_batches": 0, "val_check_interval": 2},
]


@pytest.mark.parametrize("options", VALIDATIONS, ids=str)
def test_validation_follows_a_batch_exactly_when_one_runs_or_the_epoch_ends(options, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.expected, self.happened = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.expected.append(validation_follows(trainer, batch_idx))
            self.happened.append(False)

        def on_validation_start(self, trainer, pl_module):
            self.happened[-1] = True

        def on_train_epoch_end(self, trainer, pl_module):
            self.happened[-1] = True

    watch = Watch()
    Trainer(
        max_epochs=4, limit_train_batches=6, num_sanity_val_steps=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        **{"limit_val_batches": 1, **options},
    ).fit(BoringModel())  # fmt: skip
    assert len(watch.happened) == 24 and watch.expected == watch.happened


class Copies(Callback):
    """Copies each new last.ckpt at the moments at which a run may be killed."""

    def __init__(self, folder):
        self.folder = folder

    def look(self, *_):
        path = self.folder / "last.ckpt"
        if path.is_file():
            step = torch.load(path, weights_only=True)["global_step"]
            (self.folder / f"step-{step}").write_bytes(path.read_bytes())

    on_train_batch_start = on_validation_start = on_train_end = look


def fit_digits(folder, ckpt=None):
    torch.manual_seed(0 if ckpt is None else 1)
    network = MLP(64, [8], 10, dropout=0.2)
    task = Classification(network, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.01), Constant(), classes=10)
    history = History()
    trainer = Trainer(
        max_epochs=4, limit_train_batches=6, limit_val_batches=1, check_val_every_n_epoch=2, val_check_interval=4,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=history, log_every_n_steps=1,
        plugins=[AtomicCheckpointIO()],
        callbacks=[RandomState(), Copies(folder), LastCheckpoint(folder, every_n_steps=2, every_seconds=0)],
    )  # fmt: skip
    trainer.fit(task, datamodule=Digits(batch_size=16), ckpt_path=ckpt, weights_only=True)
    return task.state_dict(), dict(zip(*history.logged.get("val/loss", ([], [])), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit_digits(folder)


def test_last_waits_only_for_validations_that_run(whole):
    folder, _, validated = whole
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))
    assert steps == [2, 4, 6, 8, 11, 12, 14, 16, 18, 20, 23, 24]
    assert list(validated) == [9, 21]


@pytest.mark.parametrize("step", [2, 4, 6, 8, 11, 12, 16, 20, 23])
def test_resumed_run_that_validates_every_second_epoch_ends_with_the_same_bits(step, whole, tmp_path):
    folder, weights, validated = whole
    resumed, values = fit_digits(tmp_path, folder / f"step-{step}")
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    assert values == {at: value for at, value in validated.items() if at >= step}
