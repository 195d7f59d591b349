import gc
import os
import re
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torchmetrics import MetricCollection

from firstlight.__main__ import main
from firstlight.fast_loop import fast_loop, find_change
from firstlight.fast_loop.epoch_loop import FastEpochLoop
from firstlight.loggers import MetricsCSV, TensorBoard
from tests.fast_loop.helpers import Busy, Scheduled, assert_same, fitted
from tests.helpers import CONFIG, newest, repeatable_lines


class Swaps(Scheduled):
    """Validates by another function than it was made with, as averages of weights do."""

    def on_validation_start(self):
        self.validation_step = lambda batch, batch_idx: self.seen.append(("another", batch_idx))

    def on_validation_end(self):
        del self.validation_step

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.on_before_zero_grad = lambda optimizer: self.seen.append("put in place")


class StepsItself(Busy):
    """Steps its optimiser in a way of its own."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.seen.append(("step", self._current_fx_name, batch_idx))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class GivesNoLossAtTimes(Busy):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def test_this_lightning_is_the_one_that_the_loop_was_written_for():
    assert find_change() is None


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (Busy, {}, None),
        (Busy, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, None),
        (GivesNoLossAtTimes, {}, None),
        (Scheduled, {}, None),
        (Scheduled, {"val_check_interval": 2}, None),
        (Scheduled, {"accumulate_grad_batches": 2, "val_check_interval": 3}, None),
        (Swaps, {"val_check_interval": 2}, None),
        (StepsItself, {}, "the module overrides optimizer_step"),
        (Busy, {"precision": "bf16-mixed"}, None),
        (Scheduled, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, None),
        (Busy, {"precision": "bf16-true"}, "precision bf16-true"),
    ],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_hooks_weights_counters_and_all_that_is_logged_equal_lightnings(tmp_path, kind, options, reason):
    plain = fitted(tmp_path, False, kind, **options)
    assert_same(fitted(tmp_path, True, kind, reason=reason, **options), plain)
    assert len(plain[1].seen) > 50 and plain[2].loggers[0].rows


def test_logs_of_validation_steps_reach_every_logger(tmp_path):
    _, _, trainer = fitted(tmp_path, True, Scheduled, val_check_interval=2)
    for logger in trainer.loggers:
        names = [name for _, row in logger.rows for name in row]
        # Of six validations the second batch logs.
        assert names.count("val_step") == names.count("val_epoch") == 6
        assert names.count("loss_step") == 12 and names.count("loss_epoch") == 2


def test_an_optimiser_that_does_not_train_is_told(tmp_path):
    class Idle(Busy):
        def configure_optimizers(self):
            return IdleSGD(self.parameters(), 0.1)

    class IdleSGD(torch.optim.SGD):
        def step(self, closure=None):
            return None

    for is_fast in (True, False):
        with pytest.raises(MisconfigurationException, match="closure"):
            fitted(tmp_path, is_fast, Idle)


def test_a_changed_lightning_keeps_its_loop_and_the_reason_says_so(tmp_path, monkeypatch):
    plain, trainer = _AutomaticOptimization.run, Trainer(logger=False, accelerator="cpu")

    @wraps(plain)
    def changed(self, *given):
        return plain(self, *given)

    monkeypatch.setattr(_AutomaticOptimization, "run", changed)
    loop = trainer.fit_loop.epoch_loop
    with fast_loop(trainer) as active:
        assert trainer.fit_loop.epoch_loop is loop
    assert re.fullmatch(r"Lightning [\d.]+ has other functions than the fast loop replaces", active.reason)


def test_a_profiler_keeps_lightnings_loop(tmp_path):
    profiler = SimpleProfiler()
    _, _, trainer = fitted(tmp_path, True, reason="a profiler is on", profiler=profiler)
    assert trainer.profiler is profiler and any(
        "on_train_batch_end" in action for action in profiler.recorded_durations
    )


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_replaced_is_put_back_also_after_an_exception(tmp_path, fails):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *given):
            assert type(trainer.fit_loop.epoch_loop) is FastEpochLoop
            if fails:
                raise ZeroDivisionError

    trainer = Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Fails()],
    )  # fmt: skip
    loop, profiler, environment = trainer.fit_loop.epoch_loop, trainer.profiler, dict(os.environ)
    before = {**vars(loop)}
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), fast_loop(trainer):
        trainer.fit(BoringModel())
    assert trainer.fit_loop.epoch_loop is loop and trainer.profiler is profiler and os.environ == environment
    assert vars(loop).keys() == before.keys() and loop.val_loop is before["val_loop"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("saves_fast", [True, False])
def test_a_checkpoint_in_mid_epoch_is_that_of_lightning_and_resumes_in_either_loop(tmp_path, saves_fast):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step == 4 and not path.exists():
                trainer.save_checkpoint(path)

    path = tmp_path / "middle.ckpt"
    fitted(tmp_path, saves_fast, Scheduled, Saves())
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    path.unlink()
    fitted(tmp_path, not saves_fast, Scheduled, Saves())
    assert torch.load(path, weights_only=True)["loops"]["fit_loop"] == loops
    plain = fitted(tmp_path, False, Scheduled, ckpt_path=path)
    assert_same(fitted(tmp_path, True, Scheduled, ckpt_path=path), plain)
    assert plain[2].fit_loop.epoch_loop.batch_progress.total.ready == 14


@pytest.mark.parametrize("most", [4])
def test_a_run_enters_few_contexts_a_step_and_gives_the_numbers_of_the_plain_path(tmp_path, monkeypatch, most):
    entered = []
    profile = PassThroughProfiler.profile
    monkeypatch.setattr(PassThroughProfiler, "profile", lambda self, name: entered.append(name) or profile(self, name))
    found, contexts = [], []
    for name, reason in [("fast", None), ("plain", "a test")]:
        monkeypatch.setattr("firstlight.fast_loop.find_change", lambda reason=reason: reason)
        folder = tmp_path / name
        entered.clear()
        command = ["fit", "--config", CONFIG, "--runs", str(folder / "runs"), "--trainer.max_epochs=3"]
        assert main([*command, "--trainer.num_sanity_val_steps=0"]) == 0
        contexts.append(len(entered) / 120)
        run = newest(folder)
        found.append(repeatable_lines(run))
        found.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    (numbers, weights, plain_numbers, plain_weights) = found
    assert numbers == plain_numbers and len(numbers) > 50
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())
    assert contexts[0] <= most < contexts[1] / 10


@pytest.mark.parametrize("most", [380])
def test_between_loggings_a_step_logs_nothing_reads_nothing_and_calls_little(tmp_path, monkeypatch, most):
    # As on a device that is not to be waited for.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    done, steps = Counter(), {}

    def counted(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: done.update([name]) or plain(*given, **more))

    for owner, name in [
        (torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "numpy"), (LightningModule, "log"),
        (MetricCollection, "update"), (MetricCollection, "forward"), (TensorBoard, "log_metrics"),
        (TensorBoard, "buffer_metrics"), (MetricsCSV, "log_metrics"), (torch, "save"), (os, "fsync"),
    ]:  # fmt: skip
        counted(owner, name)
    advance = FastEpochLoop.advance

    def watched(step, fetcher):
        done.clear()
        sys.setprofile(lambda frame, event, argument: done.update([event]))
        try:
            advance(step, fetcher)
        finally:
            sys.setprofile(None)
        steps[step.global_step] = Counter(done)

    monkeypatch.setattr(FastEpochLoop, "advance", watched)
    command = ["fit", "--config", CONFIG, "--runs", str(tmp_path / "runs"), "--trainer.max_epochs=3"]
    assert main([*command, "--trainer.log_every_n_steps=50", "--model.optimizer.fused=true"]) == 0
    assert len(steps) == 120
    for number, found in steps.items():
        # The first step of an epoch, and each step that is logged, does more.
        if number % 40 == 1 or number % 50 == 0:
            continue
        calls = found.pop("call")
        assert not found.keys() - {"return", "c_call", "c_return", "c_exception"}, (number, found)
        assert calls <= most, number
    assert steps[50]["log_metrics"] >= 2 and steps[50]["log"] >= 2


def test_what_a_profiler_of_torch_records_has_its_labels(tmp_path):
    class Profiles(Callback):
        def on_train_batch_start(self, trainer, *given):
            if trainer.global_step == 2:
                profiler.start()

        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step == 4:
                profiler.stop()

    found = []
    for is_fast in (True, False):
        profiler = torch.profiler.profile(acc_events=True)
        fitted(tmp_path, is_fast, Scheduled, Profiles())
        found.append({each.key: each.count for each in profiler.key_averages() if each.key.startswith("Optimizer.")})
    assert found[0] == found[1] == {"Optimizer.step#Adam.step": 2, "Optimizer.zero_grad#Adam.zero_grad": 2}


def test_what_a_step_has_used_is_let_go_when_it_is_done(tmp_path):
    class Watches(Callback):
        """Tells what is left of a step when the next one begins, though nobody looks for circles of references."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            left.append([reference() is not None for reference in used])
            used[:] = [weakref.ref(batch)]

        def on_before_backward(self, trainer, module, loss):
            used.append(weakref.ref(loss))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            used.append(weakref.ref(outputs["loss"]))

    used, left = [], []
    gc.disable()
    try:
        fitted(tmp_path, True, Scheduled, Watches())
    finally:
        gc.enable()
    assert [len(each) for each in left].count(3) >= 10 and not any(map(any, left))
