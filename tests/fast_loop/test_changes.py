"""What changes while a fit lasts is as it is without `lean`."""

import threading
import time
from itertools import islice, repeat

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from firstlight.lean import hooks, lean
from firstlight.lean.known import are_known
from tests.fast_loop.helpers import Recording, Scheduled, fitted


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


class SlowerSchedule(Callback):
    """Steps the schedule at each second step, then at the end of the epoch, from mid-epoch on."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        (config,) = trainer.lr_scheduler_configs
        config.frequency = 1 + (trainer.global_step >= 2)
        config.interval = "epoch" if trainer.global_step >= 5 else "step"


class StopsInTheMiddle(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 3


class LeavesGradientsOff(Callback):
    def on_train_batch_start(self, trainer, *given):
        torch.set_grad_enabled(False)

    def on_train_batch_end(self, trainer, *given):
        torch.set_grad_enabled(True)


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
        (Scheduled, lambda: [SlowerSchedule()]),
        (Scheduled, lambda: [StopsInTheMiddle()]),
        (Scheduled, lambda: [LeavesGradientsOff()]),
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


def test_batches_that_are_accumulated_have_gradients_in_any_case(tmp_path):
    fitted(tmp_path, True, Scheduled, LeavesGradientsOff(), accumulate_grad_batches=2)


class Shorter(DataLoader):
    """Has fewer batches than it says."""

    def __iter__(self):
        return islice(super().__iter__(), 3)


class Doubles(CombinedLoader):
    """Changes each batch on its way."""

    def __next__(self):
        batch, *rest = super().__next__()
        return (2 * batch, *rest)


class Endless(IterableDataset):
    def __iter__(self):
        return repeat(torch.ones(32))


def loader(data=None, kind=DataLoader):
    return kind(RandomDataset(32, 12) if data is None else data)


@pytest.mark.parametrize(
    "loaders",
    [
        loader,
        lambda: loader(kind=Shorter),
        lambda: loader(Endless()),
        lambda: loader(TensorDataset(torch.ones(5, 32))),
        lambda: [loader()],
        lambda: {"one": loader(), "other": loader()},
        lambda: CombinedLoader(loader(), "max_size_cycle"),
        lambda: CombinedLoader([loader(), loader(kind=Shorter)], "min_size"),
        lambda: Doubles(loader(), "max_size_cycle"),
    ],
)
@pytest.mark.parametrize("every", [1.0, 2])
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has:UserWarning")
def test_batches_are_those_of_lightning_wherever_they_come_from(tmp_path, loaders, every):
    class Loads(Scheduled):
        def train_dataloader(self):
            return loaders()

        def training_step(self, batch, batch_idx):
            while not isinstance(batch, torch.Tensor):
                batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
            self.seen.append(batch.sum().item())
            return super().training_step(batch, batch_idx)

    was, before, _ = fitted(tmp_path, False, Loads, val_check_interval=every)
    module, recording, _ = fitted(tmp_path, True, Loads, val_check_interval=every)
    assert module.seen == was.seen and len(was.seen) > 10
    assert recording.seen == before.seen


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_batches_itself_takes_them_after_a_validation_too(tmp_path):
    class Takes(BoringModel):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            self.seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def on_validation_start(self):
            self.outputs = []

    module, _, _ = fitted(tmp_path, True, Takes, val_check_interval=2)
    assert module.seen == [0, 1, 2, 3, 4, 5, 6, 7] * 2


def test_a_loop_of_ones_own_stays(tmp_path):
    class Loop(_TrainingEpochLoop):
        def advance(self, fetcher):
            seen.append(1)
            super().advance(fetcher)

    seen = []
    trainer = Trainer(
        max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit_loop.epoch_loop = Loop(trainer, max_steps=3)
    with lean(trainer) as on:
        assert on
        trainer.fit(BoringModel())
        assert len(seen) == 3
    loop = Trainer(logger=False, accelerator="cpu").fit_loop.epoch_loop
    loop.advance = mine = lambda fetcher: None
    with lean(loop.trainer):
        assert loop.advance is mine


def test_a_trainer_that_is_sent_to_other_processes_can_be_sent():
    with lean(Trainer(logger=False, accelerator="cpu", devices=2, strategy="ddp_spawn")) as on:
        assert not on


@pytest.mark.skipif(torch.cuda.is_available(), reason="labels are left alone there")
def test_labels_of_optimisers_alone_are_left_out_while_nobody_records():
    with lean(Trainer(logger=False, accelerator="cpu")):
        for name, labelled in [("Optimizer.step#Adam.step", False), ("mine", True)]:
            with torch.autograd.profiler.record_function(name) as label:
                assert (label.record is not None) == labelled
        with torch.profiler.profile(), torch.autograd.profiler.record_function("Optimizer.step#Adam.step") as label:
            assert label.record is not None


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
