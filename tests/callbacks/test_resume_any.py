"""Runs of any module, data and callback that get SIGTERM and are resumed end with the same bits, or are refused."""

import os
import random
import signal
from collections import defaultdict, deque
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from firstlight.callbacks import GracefulShutdown, LastCheckpoint, RandomState
from firstlight.callbacks.attributes import digests, set_changed
from firstlight.callbacks.resumable_loader import ResumableLoader
from firstlight.callbacks.state import snapshot
from firstlight.checkpoints.io import AtomicCheckpointIO
from firstlight.errors import UsageError
from tests.helpers import quick_or_slow

SAMPLES, BATCH, EPOCHS = 26, 4, 3  # Seven batches an epoch, the last one short.


class Net(LightningModule):
    """A network with dropout, which draws from torch's global generator between batches."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            batch = torch.cat([each for each in batch.values() if each is not None])
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class AsksForSteps(Net):
    """A schedule that asks for the number of steps, so that Lightning makes the loaders before it restores loops."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(Dataset):
    """Rows with noise from a generator: of torch, of NumPy, of Python, or the data set's own."""

    def __init__(self, draw=lambda: 0.0, generator=None):
        self.rows = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
        self.draw, self.generator = draw, generator

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = self.draw() if self.generator is None else self.generator.random()
        return (self.rows[index] + 0.1 * noise).float()


class Stream(IterableDataset):
    """An iterable without a length, in random order with noise."""

    def __iter__(self):
        rows = Rows(lambda: torch.rand(1))
        return (rows[index] for index in torch.randperm(SAMPLES).tolist())


class CountedStream(IterableDataset):
    """An iterable whose order depends on how often it was iterated, which no checkpoint holds."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        order = random.Random(self.passes).sample(range(SAMPLES), SAMPLES)
        rows = Rows()
        return (rows[index] for index in order)


class Stateful(Sampler):
    """A sampler whose order depends on its epoch, and which tells it."""

    def __init__(self):
        self.order_of = 0

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        self.order_of += 1
        yield from random.Random(self.order_of).sample(range(SAMPLES), SAMPLES)

    def state_dict(self):
        return {"order_of": self.order_of}

    def load_state_dict(self, state):
        self.order_of = state["order_of"]


class Forgetful(Stateful):
    """The same sampler, which does not tell it."""

    state_dict = load_state_dict = None


class Lazy(Sampler):
    """A sampler that draws each index when it is asked for it."""

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)


class OwnLoader:
    """An iterable of batches that is no DataLoader."""

    def __len__(self):
        return 7

    def __iter__(self):
        for _ in range(7):
            yield torch.rand(BATCH, 3)


class RestoresItself:
    """A stream of batches that knows its position, and has no length."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        while True:
            self.taken += 1
            yield torch.full((BATCH, 3), 1.0 / self.taken)
            if self.taken % 7 == 0:
                return

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


def loader(dataset=None, **options):
    return DataLoader(Rows() if dataset is None else dataset, batch_size=options.pop("batch_size", BATCH), **options)


def generator():
    return torch.Generator().manual_seed(5)


EXACT = {
    "shuffle": lambda: loader(shuffle=True),
    "no shuffle": lambda: loader(),
    "own generator": lambda: loader(shuffle=True, generator=generator()),
    "drop_last": lambda: loader(shuffle=True, drop_last=True),
    "replacement": lambda: loader(sampler=RandomSampler(range(SAMPLES), replacement=True)),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.arange(SAMPLES) + 1.0, SAMPLES)),
    "subset with a generator": lambda: loader(sampler=SubsetRandomSampler(range(20), generator=generator())),
    "batch sampler": lambda: DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), 4, True)),
    "lazy sampler": lambda: loader(sampler=Lazy()),
    "sampler with state_dict": lambda: loader(sampler=Stateful()),
    "noise of torch": lambda: loader(Rows(lambda: torch.rand(3)), shuffle=True),
    "noise of NumPy": lambda: loader(Rows(lambda: np.random.rand(3)), shuffle=True),
    "noise of Python": lambda: loader(Rows(random.random), shuffle=True),
    "noise of its own": lambda: loader(Rows(generator=np.random.default_rng(3)), shuffle=True),
    "noise of its own, Python": lambda: loader(Rows(generator=random.Random(3)), shuffle=True),
    "stream": lambda: loader(Stream()),
    "own loader": OwnLoader,
    "loader with state_dict": RestoresItself,
    "two loaders": lambda: {"a": loader(shuffle=True), "b": loader(shuffle=True, batch_size=9)},
    "two loaders, shortest": lambda: CombinedLoader(
        {"a": loader(shuffle=True), "b": loader(shuffle=True, batch_size=5)}, "min_size"
    ),
    "two loaders, longest": lambda: CombinedLoader(
        {"a": loader(shuffle=True), "b": loader(shuffle=True, batch_size=9)}, "max_size"
    ),
    "a stream and a loader": lambda: {"a": loader(shuffle=True, batch_size=9), "b": loader(Stream())},
}
WORKERS = {
    "noise of torch": lambda: loader(Rows(lambda: torch.rand(3)), shuffle=True, num_workers=2),
    "noise of its own": lambda: loader(Rows(generator=np.random.default_rng(3)), shuffle=True, num_workers=2),
    "stream": lambda: loader(Stream(), num_workers=1),
}
LOST = {
    "stream that counts": (lambda: loader(CountedStream()), "dataset.passes of the training loader was"),
    "sampler without state_dict": (lambda: loader(sampler=Forgetful()), "sampler.order_of of the training loader was"),
    "persistent workers": (lambda: loader(shuffle=True, num_workers=1, persistent_workers=True), "persistent_workers"),
}


class Terminate(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder,
    make_loader=EXACT["shuffle"],
    module=Net,
    stop=None,
    callbacks=(),
    resume=False,
    exact=True,
    validation=loader,
    **options,
):
    """Fit, perhaps with a SIGTERM at the step `stop`, and return the weights."""
    seed_everything(7, verbose=False)
    net = module()
    own = [each() for each in callbacks]
    last = LastCheckpoint(folder, min_seconds=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*own, RandomState(allow_inexact=not exact), Terminate(stop), last, GracefulShutdown()],
        **{"max_epochs": EPOCHS, **options},
    )
    path = folder / "last.ckpt" if resume else None
    try:
        trainer.fit(net, make_loader(), validation(), ckpt_path=path, weights_only=True)
    except SystemExit as stopped:
        assert stopped.code == 143 and stop is not None
    else:
        assert stop is None
    return {name: each.clone() for name, each in net.state_dict().items()}


def assert_resumes_exactly(folder, *args, stops=(8, 13), **options):
    whole = fit(folder / "whole", *args, **options)
    for stop in stops:  # Within the second epoch, and at its end.
        fit(folder / str(stop), *args, stop=stop, **options)
        found = fit(folder / str(stop), *args, resume=True, **options)
        assert all(torch.equal(found[name], each) for name, each in whole.items()), stop


@pytest.fixture(autouse=True)
def _quiet():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


QUICK = {
    "shuffle",
    "own generator",
    "batch sampler",
    "sampler with state_dict",
    "noise of its own",
    "stream",
    "loader with state_dict",
    "two loaders, longest",
}


@pytest.mark.parametrize("kind", quick_or_slow(EXACT, QUICK))
def test_any_loader_resumes_with_the_same_bits(kind, tmp_path):
    assert_resumes_exactly(tmp_path, EXACT[kind])


@pytest.mark.parametrize("kind", WORKERS)
def test_any_loader_with_worker_processes_resumes_with_the_same_bits(kind, tmp_path):
    assert_resumes_exactly(tmp_path, WORKERS[kind], stops=(8,))


@pytest.mark.parametrize(
    "kind", quick_or_slow(["shuffle", "noise of its own", "stream", "loader with state_dict"], ["shuffle", "stream"])
)
def test_loader_that_is_made_before_loops_are_restored_resumes_with_the_same_bits(kind, tmp_path):
    assert_resumes_exactly(tmp_path, EXACT[kind], AsksForSteps, **({"max_steps": 21} if "sh" not in kind else {}))


@pytest.mark.parametrize("kind", LOST)
def test_loader_whose_state_cannot_be_restored_is_refused_unless_inexact_is_allowed(kind, tmp_path):
    make, reason = LOST[kind]
    for stop in (8, 13):
        fit(tmp_path / str(stop), make, stop=stop)
        with pytest.raises(UsageError, match=rf"^the run cannot resume exactly: .*{reason}.*--allow_inexact"):
            fit(tmp_path / str(stop), make, resume=True)
        fit(tmp_path / str(stop), make, resume=True, exact=False)


class Slots(Dataset):
    """Rows that depend on how often they were read, counted in a slot."""

    __slots__ = ("reads", "rows")

    def __init__(self):
        self.rows, self.reads = Rows(), 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.reads += 1
        return self.rows[index] / self.reads


class Reweighs(Callback):
    """Draws some samples more often from the next epoch on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.train_dataloader.sampler.weights[batch_idx] += 1


@pytest.mark.parametrize("size", [26, 5000])
def test_sampler_that_a_callback_changes_within_the_first_epoch_is_refused(size, tmp_path):
    def make():
        weights = torch.cat([torch.ones(SAMPLES), torch.zeros(size - SAMPLES)])
        return loader(Rows(), sampler=WeightedRandomSampler(weights, SAMPLES))

    fit(tmp_path, make, callbacks=[Reweighs], stop=3)
    with pytest.raises(UsageError, match=r"sampler.weights of the training loader was .* and is .*--allow_inexact"):
        fit(tmp_path, make, callbacks=[Reweighs], resume=True)
    fit(tmp_path, make, callbacks=[Reweighs], resume=True, exact=False)


def test_data_set_that_counts_in_a_slot_is_refused(tmp_path):
    fit(tmp_path, lambda: loader(Slots()), stop=8)
    with pytest.raises(UsageError, match=r"dataset.reads of the training loader was 26 and is 0"):
        fit(tmp_path, lambda: loader(Slots()), resume=True)


class Unfreeze(Callback):
    """Freezes the first layer, and trains it from the second epoch on."""

    def setup(self, trainer, pl_module, stage):
        pl_module.net[0].requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)


class Anneal(Callback):
    """Acts at the start of each epoch on what a checkpoint holds, and on what it does not hold."""

    def __init__(self):
        self.epochs = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs += 1
        pl_module.net[1].p = 0.5 / (1 + trainer.current_epoch)
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5
        with torch.no_grad():
            pl_module.net[0].weight.add_(0.1 * torch.randn(4, 3))

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]

    def on_train_end(self, trainer, pl_module):
        assert self.epochs == EPOCHS


class StartsEpochs(Net):
    def on_train_epoch_start(self):
        self.net[1].p = 0.5 / (1 + self.current_epoch)


CALLBACKS = {
    "accumulation by epoch": lambda: GradientAccumulationScheduler({0: 1, 1: 3}),
    "unfreezing": Unfreeze,
    "annealing": Anneal,
    "averaged weights": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_callback_that_acts_at_the_start_of_an_epoch_resumes_with_the_same_bits(kind, tmp_path):
    stops = (7, 8) if kind == "accumulation by epoch" else (8, 13, 16)
    epochs = 4 if kind == "averaged weights" else EPOCHS
    assert_resumes_exactly(tmp_path, callbacks=[CALLBACKS[kind]], stops=stops, max_epochs=epochs)


def test_module_that_acts_at_the_start_of_an_epoch_resumes_with_the_same_bits(tmp_path):
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], StartsEpochs)


@pytest.mark.parametrize("kind", ["shuffle", "stream"])
def test_run_with_max_steps_resumes_with_the_same_bits(kind, tmp_path):
    assert_resumes_exactly(tmp_path, EXACT[kind], max_steps=18)


def test_checkpoint_without_random_states_is_refused_unless_inexact_is_allowed(tmp_path):
    fit(tmp_path, stop=8)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["random_state"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="has no random states: it was written without the callback RandomState"):
        fit(tmp_path, resume=True)
    fit(tmp_path, resume=True, exact=False)


class Counts(Net):
    """A module whose training depends on attributes that are no buffers."""

    def __init__(self, strength=1.0):
        super().__init__()
        self.strength, self.seen, self.heat, self.ema = strength, 0, 1.0, torch.zeros(())
        self.noise = np.random.default_rng(2)

    def on_train_epoch_start(self):
        self.in_epoch = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        self.in_epoch += 1
        self.heat *= 0.9
        loss = super().training_step(batch, batch_idx)
        self.ema = 0.5 * self.ema + 0.5 * loss.detach()
        factor = 0.02 * (self.heat + self.in_epoch + 1 / self.seen + self.ema + self.noise.random())
        return self.strength * factor * loss


class CountsBatches(Callback):
    """A callback that changes the learning rate by what it has counted."""

    def __init__(self):
        self.batches, self.rates = 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        self.rates.append(0.1 / self.batches)
        trainer.optimizers[0].param_groups[0]["lr"] = sum(self.rates) / len(self.rates)


def test_attributes_of_modules_and_callbacks_resume_with_the_same_bits(tmp_path):
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], Counts, callbacks=[CountsBatches])


class Plateau(Net):
    """A module whose learning rate follows a metric, in each second epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.trainer.current_epoch))  # It never improves.

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss", "frequency": self.every},
        }


@pytest.mark.parametrize("every", [1, 2])
def test_schedule_that_follows_a_metric_resumes_with_the_same_bits(every, tmp_path):
    module = type("Plateau", (Plateau,), {"every": every, "__module__": __name__})
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], module)


class Heat:
    """An object of the user without hooks that firstlight could call to save it."""

    def __init__(self):
        self.degrees = 1.0

    def state_dict(self, unit):
        raise NotImplementedError

    load_state_dict = state_dict


class CountingSGD(torch.optim.SGD):
    """An optimiser with a rate that depends on an attribute, which its `state_dict` leaves out."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.updates = 0

    def step(self, closure=None):
        self.updates += 1
        self.param_groups[0]["lr"] = 0.1 / self.updates
        return super().step(closure)


class Remembers(Net):
    """A module whose training depends on what no checkpoint of Lightning holds."""

    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm1d(1))
        self.array, self.scalar, self.recent, self.steps = np.ones(2), np.float32(1), deque([1.0], maxlen=3), {0}
        self.table, self.heat, self.outside = defaultdict(float), Heat(), [nn.Parameter(torch.ones(2000))]
        self.average = {}
        self.register_buffer("calls", torch.ones(()), persistent=False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.array[batch_idx % 2] *= 0.99
        self.scalar *= np.float32(0.99)
        self.recent.append(loss.item())
        self.steps.add(self.global_step)
        self.table[batch_idx] += 0.1
        self.heat.degrees *= 0.99
        self.calls += 1
        self.net[1].p = 0.3 / len(self.steps)
        self.trainer.gradient_clip_val = 2.0 / len(self.steps)
        for name, each in [*self.named_parameters(), ("outside", self.outside[0])]:
            self.average[name] = self.average.get(name, torch.zeros(())).lerp(each.detach(), 0.1)
        if self.global_step == 6:
            self.net[3].eval()
        factor = self.array.sum() + self.scalar + sum(self.recent) + len(self.steps) + sum(self.table.values())
        pull = sum((each - self.average[name]).square().sum() for name, each in self.named_parameters())
        return 0.02 * (float(factor) + self.heat.degrees + self.calls) * loss * self.outside[0].mean() + pull

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.optimizers[0].param_groups[0]["weight_decay"] = self.scheduler.get_last_lr()[0]
        self.scheduler.step()

    def configure_optimizers(self):
        optimizer = CountingSGD([*self.parameters(), *self.outside])
        self.other = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.other, 5, 0.5)  # Nobody tells Lightning of it.
        return optimizer


class MovingAverage(Callback):
    """A callback that pulls the network to an average of it, which it makes in the first batch."""

    average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.average is None:
            self.average = deepcopy(pl_module.net)
        for average, each in zip(self.average.parameters(), pl_module.net.parameters(), strict=True):
            average.data.lerp_(each.data, 0.1)
            each.data.lerp_(average, 0.1)


class EarlyAverage(MovingAverage):
    """The same callback, which makes the average at the start."""

    def on_fit_start(self, trainer, pl_module):
        self.average = deepcopy(pl_module.net)


def test_state_outside_of_checkpoints_resumes_with_the_same_bits(tmp_path):
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], Remembers, callbacks=[EarlyAverage])


def test_object_that_does_not_exist_at_the_start_is_refused_unless_inexact_is_allowed(tmp_path):
    fit(tmp_path, callbacks=[MovingAverage], stop=8)
    with pytest.raises(
        UsageError, match=r"MovingAverage 0.average changed during training, and its object does not exist at the start"
    ):
        fit(tmp_path, callbacks=[MovingAverage], resume=True)
    fit(tmp_path, callbacks=[MovingAverage], resume=True, exact=False)


def test_attribute_that_is_configured_otherwise_keeps_its_new_value(tmp_path):
    fit(tmp_path, module=Counts, stop=8)
    made = []
    fit(tmp_path, module=lambda: made.append(Counts(strength=2.0)) or made[0], resume=True)
    assert made[0].strength == 2.0 and made[0].seen == 21


def test_crafted_checkpoint_sets_no_attribute_of_a_base_class():
    objects = {"trainer": Trainer(accelerator="cpu", logger=False), "module": Counts()}
    fresh = digests(objects)
    crafted = {"module": {"seen": 5, "_parameters": 1, "__dict__": 1, "training": "x"}, "trainer": {"callbacks": 1}}
    set_changed(objects, fresh, crafted, fresh)
    module = objects["module"]
    assert module.seen == 5 and module.training is True and list(module.parameters())
    assert objects["trainer"].callbacks != 1


def test_crafted_number_of_used_batches_ends_with_the_batches():
    fit_loop = SimpleNamespace(_data_fetcher=SimpleNamespace(length=3))
    loader = ResumableLoader([1, 2, 3], SimpleNamespace(fit_loop=fit_loop))
    loader.resumed = {**loader.state_dict(), "used": 10**15, "start": {"random": snapshot()}}
    assert list(loader) == [] and list(loader) == [1, 2, 3]
