"""What changes during a fit takes effect when it does in Lightning's own loop."""

import threading
from itertools import islice, repeat

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from firstlight.fast_loop import fast_loop
from tests.fast_loop.helpers import Recording, Scheduled, assert_same, fitted


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


class GetsHooks(Callback):
    """Gets hooks of its own, by its attributes, in the middle of an epoch and of a batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.on_before_backward = lambda *given: pl_module.seen.append("before backward")
            self.on_after_backward = self.note
            self.on_validation_batch_end = lambda *given: pl_module.seen.append("validated")

    def note(self, trainer, pl_module):
        pl_module.seen.append("after backward")
        self.on_before_zero_grad = lambda *given: pl_module.seen.append("zero")


class GetsHooksOfItsClass(Callback):
    """Gets a hook by its class, and loses it, in the middle of an epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            type(self).on_after_backward = lambda self, trainer, pl_module: pl_module.seen.append("after backward")
        if trainer.global_step == 5:
            del type(self).on_after_backward


@pytest.mark.parametrize(
    ("kind", "callbacks", "reason"),
    [
        (Changes, list, "the module overrides optimizer_step"),
        (ValidatesWithoutNumber, list, None),
        (Scheduled, lambda: [AnotherSchedule()], None),
        (Scheduled, lambda: [SlowerSchedule()], None),
        (Scheduled, lambda: [StopsInTheMiddle()], None),
        (Scheduled, lambda: [LeavesGradientsOff()], None),
        (Scheduled, lambda: [ReplacesItself()], None),
        (Scheduled, lambda: [Adds("on_train_start")], None),
        (Scheduled, lambda: [Adds("on_train_batch_start")], None),
        (Scheduled, lambda: [GetsHooks()], None),
        (Scheduled, lambda: [GetsHooksOfItsClass()], None),
    ],
)
def test_a_change_takes_effect_when_it_does_in_lightning(tmp_path, kind, callbacks, reason):
    plain = fitted(tmp_path, False, kind, *callbacks(), val_check_interval=2)
    fast = fitted(tmp_path, True, kind, *callbacks(), val_check_interval=2, reason=reason)
    assert_same(fast, plain)
    assert len(plain[0].seen) > 10


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

    plain = fitted(tmp_path, False, Loads, val_check_interval=every)
    assert_same(fitted(tmp_path, True, Loads, val_check_interval=every), plain)
    assert len(plain[0].seen) > 10


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

    reason = "training_step takes the iterator of batches"
    module, _, _ = fitted(tmp_path, True, Takes, val_check_interval=2, reason=reason)
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
    with fast_loop(trainer) as active:
        trainer.fit(BoringModel())
        assert len(seen) == 3 and active.reason == "the trainer has its own loop"
    loop = Trainer(logger=False, accelerator="cpu").fit_loop.epoch_loop
    loop.advance = mine = lambda fetcher: None
    with fast_loop(loop.trainer) as active:
        assert loop.trainer.fit_loop.epoch_loop is loop and loop.advance is mine and active.reason


def test_a_trainer_that_is_sent_to_other_processes_can_be_sent():
    with fast_loop(Trainer(logger=False, accelerator="cpu", devices=2, strategy="ddp_spawn")) as active:
        assert active.reason == "the trainer is sent to spawned processes"


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
    with fast_loop(trainer) as active:
        trainer.fit(BoringModel())
        assert active.reason is None and trainer.global_step == 6
        trainer.fit_loop.epoch_loop.max_steps = 12
        trainer.fit(Manual())
        assert active.reason == "manual optimization"


def test_fits_in_threads_and_within_fits_are_those_of_lightning(tmp_path):
    class Fits(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            inner.append(fitted(tmp_path, trainer.fit_loop.epoch_loop.__class__ is not type(plain_loop), Scheduled))

    plain_loop, inner, outer = Trainer(logger=False, accelerator="cpu").fit_loop.epoch_loop, [], {}

    started = {True: threading.Event(), False: threading.Event()}

    class WaitsForTheOther(Callback):
        def __init__(self, is_fast):
            self.is_fast = is_fast

        def on_train_start(self, trainer, pl_module):
            started[self.is_fast].set()
            assert started[not self.is_fast].wait(60)

    def fit(is_fast):
        outer[is_fast] = fitted(tmp_path, is_fast, Scheduled, WaitsForTheOther(is_fast), val_check_interval=2)

    threads = [threading.Thread(target=fit, args=[is_fast]) for is_fast in (True, False)]
    # Lightning 2.6.6 patches `DataLoader` while it sets up the data, so two fits must not do that at the same time.
    threads[0].start()
    assert started[True].wait(60)
    threads[1].start()
    for each in threads:
        each.join()
    assert outer[True][1].seen == outer[False][1].seen
    fitted(tmp_path, True, Scheduled, Fits())
    fitted(tmp_path, False, Scheduled, Fits())
    assert_same(inner[0], inner[2])
