"""What changes while a fit lasts is as it is without `lean`."""

import threading
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer import call

from firstlight.lean import hooks, lean
from firstlight.lean.known import are_known
from tests.lean_helpers import Recording, Scheduled, fitted


class Changes(Scheduled):
    """Puts functions in place, and takes them away, while an epoch lasts."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.on_after_backward = lambda: self.seen.append("after")
        if batch_idx == 2:
            step = type(self).optimizer_step
            self.optimizer_step = lambda *given: self.seen.append("step") or step(self, *given)
        if batch_idx == 3:
            del self.on_after_backward
        if batch_idx == 4:
            del self.optimizer_step
            self.configure_gradient_clipping = lambda *given, **more: self.seen.append(("clips", *sorted(more)))

    def on_before_zero_grad(self, optimizer):
        if "on_after_backward" in vars(self) and self.trainer.fit_loop.batch_idx == 2:
            self.on_after_backward = lambda: self.seen.append("another")

    def on_train_epoch_end(self):
        del self.configure_gradient_clipping


class ValidatesWithoutNumber(Scheduled):
    def on_validation_start(self):
        self.validation_step = lambda batch: self.seen.append("validates")

    def on_validation_end(self):
        del self.validation_step


class AnotherSchedule(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == 2:
            constant = torch.optim.lr_scheduler.LambdaLR(trainer.optimizers[0], lambda step: 1.0)
            trainer.lr_scheduler_configs[0].scheduler = constant


class ReplacesItself(Callback):
    def on_train_batch_end(self, trainer, pl_module, *given):
        pl_module.seen.append("first")
        self.on_train_batch_end = self.rest

    def rest(self, trainer, pl_module, *given):
        pl_module.seen.append("rest")


class Adds(Callback):
    def __init__(self, hook):
        self.late = Recording()
        setattr(self, hook, self.add)

    def add(self, trainer, pl_module, *given):
        if self.late not in trainer.callbacks:
            pl_module.seen.append(self.late.seen)
            trainer.callbacks.append(self.late)


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [
        (Changes, list),
        (ValidatesWithoutNumber, list),
        (Scheduled, lambda: [AnotherSchedule()]),
        (Scheduled, lambda: [ReplacesItself()]),
        (Scheduled, lambda: [Adds("on_train_start")]),
        (Scheduled, lambda: [Adds("on_train_batch_start")]),
    ],
)
def test_what_changes_takes_effect_when_it_does_without_lean(tmp_path, kind, callbacks):
    was, before, _ = fitted(tmp_path, False, kind, *callbacks(), val_check_interval=2)
    module, recording, _ = fitted(tmp_path, True, kind, *callbacks(), val_check_interval=2)
    assert module.seen == was.seen and len(was.seen) > 10
    assert recording.seen == before.seen
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), was.parameters(), strict=True))


def test_no_validation_at_all_is_none(tmp_path):
    fitted(tmp_path, True, Scheduled, val_check_interval=0, limit_val_batches=0)


def test_a_second_module_is_counted_by_its_own_steps(tmp_path):
    class Manual(BoringModel):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx)["loss"])
            self.optimizers().step()

        def on_train_start(self):
            assert self.trainer.global_step == 0

    trainer = Trainer(
        max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    with lean(trainer) as on:
        trainer.fit(BoringModel())
        assert on and trainer.global_step == 6
        trainer.fit_loop.epoch_loop.max_steps = 12
        trainer.fit(Manual())


def test_fits_in_threads_leave_lightning_as_it_was(monkeypatch):
    monkeypatch.setattr(hooks, "are_known", lambda functions: time.sleep(0.01) or are_known(functions))
    original, together, seen = call._call_callback_hooks, threading.Barrier(4), []

    def fit():
        trainer = Trainer(logger=False, accelerator="cpu")
        for _ in range(20):
            together.wait()
            with lean(trainer) as on:
                seen.append(on)
                together.wait()

    threads = [threading.Thread(target=fit) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert call._call_callback_hooks is original
    assert True in seen
