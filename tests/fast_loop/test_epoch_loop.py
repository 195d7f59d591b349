import csv
import gc
import os
import sys
import weakref
from collections import Counter
from functools import wraps

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from lightning.pytorch.trainer import call
from torchmetrics import MetricCollection

from firstlight.__main__ import main
from firstlight.lean import known, lean
from firstlight.lean.known import STEP, source_of
from firstlight.lean.plain import is_plain
from firstlight.lean.step import Step
from firstlight.loggers import MetricsCSV, TensorBoard
from tests.fast_loop.helpers import Busy, Scheduled, fitted
from tests.helpers import CONFIG, newest


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


def test_the_step_of_lightning_is_the_one_that_is_inlined():
    assert {key: source_of(getattr(*key)) for key in STEP} == STEP


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        (GivesNoLossAtTimes, {}, True),
        (Scheduled, {}, True),
        (Scheduled, {"accumulate_grad_batches": 2, "val_check_interval": 3}, True),
        (Swaps, {"val_check_interval": 2}, True),
        (StepsItself, {}, False),
        (Busy, {"precision": "bf16-mixed"}, True),
        (Scheduled, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, True),
        (Busy, {"precision": "bf16-true"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_is_lean_where_nobody_else_has_a_say_in_it(tmp_path, monkeypatch, kind, options, plain):
    was, before, _ = fitted(tmp_path, False, kind, **options)
    judged = []
    monkeypatch.setattr(
        "firstlight.lean.batches.is_plain", lambda *given: judged.append(is_plain(*given)) or judged[-1]
    )
    module, recording, _ = fitted(tmp_path, True, kind, **options)
    assert len(judged) >= 2 and set(judged) == {plain}  # in each epoch
    assert recording.seen == before.seen and module.seen == was.seen and len(before.seen) > 50
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), was.parameters(), strict=True))


def test_an_optimiser_that_does_not_train_is_told(tmp_path):
    class Idle(Busy):
        def configure_optimizers(self):
            return IdleSGD(self.parameters(), 0.1)

    class IdleSGD(torch.optim.SGD):
        def step(self, closure=None):
            return None

    for is_lean in (True, False):
        with pytest.raises(MisconfigurationException, match="closure"):
            fitted(tmp_path, is_lean, Idle)


def test_a_step_that_was_changed_is_left_as_it_is(tmp_path, monkeypatch):
    plain, trainer = _AutomaticOptimization.run, Trainer(logger=False, accelerator="cpu")
    with lean(trainer):
        assert "advance" in vars(trainer.fit_loop.epoch_loop)

    @wraps(plain)
    def changed(self, *given):
        return plain(self, *given)

    monkeypatch.setattr(_AutomaticOptimization, "run", changed)
    with lean(trainer):
        assert "advance" not in vars(trainer.fit_loop.epoch_loop)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}])
def test_the_same_hooks_are_called_in_the_same_order_and_the_weights_are_the_same(tmp_path, options):
    plain, before, was = fitted(tmp_path, False, **options)
    module, recording, trainer = fitted(tmp_path, True, **options)
    assert recording.seen == before.seen and len(before.seen) > 50
    assert module.seen == plain.seen
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), plain.parameters(), strict=True))
    assert trainer.callback_metrics.keys() == was.callback_metrics.keys() >= {"loss_epoch", "after"}
    assert all(torch.equal(value, was.callback_metrics[name]) for name, value in trainer.callback_metrics.items())


def test_another_lightning_and_a_profiler_have_it_their_way(tmp_path, monkeypatch):
    original = call._call_callback_hooks
    trainer = Trainer(logger=False, profiler=SimpleProfiler(), accelerator="cpu")
    with lean(trainer) as on:
        assert not on and call._call_callback_hooks is original
    trainer = Trainer(logger=False, accelerator="cpu")
    with lean(trainer) as on:
        assert on and call._call_callback_hooks is not original
        with lean(Trainer(logger=False, accelerator="cpu")) as again:
            assert not again
    assert call._call_callback_hooks is original
    monkeypatch.setitem(known.HOOKS, (call, "_call_callback_hooks"), "another")
    with lean(trainer) as on:
        assert not on and call._call_callback_hooks is original


@pytest.mark.parametrize("most", [4])
def test_a_run_enters_few_contexts_a_step_and_gives_the_numbers_of_the_plain_path(tmp_path, monkeypatch, most):
    entered = []
    profile = PassThroughProfiler.profile
    monkeypatch.setattr(PassThroughProfiler, "profile", lambda self, name: entered.append(name) or profile(self, name))
    found, contexts = [], []
    for name, digest in [("lean", known.HOOKS[call, "_call_strategy_hook"]), ("plain", "another")]:
        monkeypatch.setitem(known.HOOKS, (call, "_call_strategy_hook"), digest)
        folder = tmp_path / name
        entered.clear()
        command = ["fit", "--config", CONFIG, "--runs", str(folder / "runs"), "--trainer.max_epochs=3"]
        assert main([*command, "--trainer.num_sanity_val_steps=0"]) == 0
        contexts.append(len(entered) / 120)
        run = newest(folder)
        with (run / "metrics.csv").open() as file:
            found.append(list(csv.reader(file)))
        found.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    (numbers, weights, plain_numbers, plain_weights) = found
    assert numbers == plain_numbers and len(numbers) > 50
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())
    assert contexts[0] <= most < contexts[1] / 10


@pytest.mark.parametrize("most", [310])
def test_between_loggings_a_step_logs_nothing_reads_nothing_and_calls_little(tmp_path, monkeypatch, most):
    # As on a device that is not to be waited for.
    monkeypatch.setattr("firstlight.callbacks.nonfinite._waits", lambda tensor: True)
    done, steps = Counter(), {}

    def counted(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: done.update([name]) or plain(*given, **more))

    for owner, name in [
        (torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "numpy"), (LightningModule, "log"),
        (MetricCollection, "update"), (MetricCollection, "forward"), (TensorBoard, "log_metrics"),
        (TensorBoard, "keep"), (MetricsCSV, "log_metrics"), (torch, "save"), (os, "fsync"),
    ]:  # fmt: skip
        counted(owner, name)
    advance = Step.advance

    def watched(step, fetcher):
        done.clear()
        sys.setprofile(lambda frame, event, argument: done.update([event]))
        try:
            advance(step, fetcher)
        finally:
            sys.setprofile(None)
        steps[step._trainer.global_step] = Counter(done)

    monkeypatch.setattr(Step, "advance", watched)
    command = ["fit", "--config", CONFIG, "--runs", str(tmp_path / "runs"), "--trainer.max_epochs=3"]
    assert main([*command, "--trainer.log_every_n_steps=50", "--model.optimizer.fused=true"]) == 0
    assert len(steps) == 120
    for number, found in steps.items():
        # The first of an epoch asks what the others rely on, and each hundredth plans the learning rates of the next.
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

    label, found = torch.autograd.profiler.record_function, []
    for is_lean in (True, False):
        profiler = torch.profiler.profile(acc_events=True)
        fitted(tmp_path, is_lean, Scheduled, Profiles())
        found.append({each.key: each.count for each in profiler.key_averages() if each.key.startswith("Optimizer.")})
    assert found[0] == found[1] == {"Optimizer.step#Adam.step": 2, "Optimizer.zero_grad#Adam.zero_grad": 2}
    assert torch.autograd.profiler.record_function is label


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to look for")
def test_a_device_that_is_not_there_is_not_looked_for_at_each_step(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append(1)))
    with lean(Trainer(logger=False, accelerator="cpu")):
        before = len(asked)
        assert not torch.cuda.is_available() and len(asked) == before
    assert not torch.cuda.is_available() and len(asked) > before
