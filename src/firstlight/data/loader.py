"""Batches whose order follows from a seed and the number of the epoch alone, so that a run can go on anywhere.

Shapes: `N` samples, `P` processes.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from firstlight.data.samples import Batch, TensorBatches
from firstlight.errors import UsageError

__all__ = ["BatchSizeIs", "Loader", "ResumableDistributedSampler", "is_on_device", "loader", "per_process"]

BatchSizeIs = Literal["per_process", "global"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class ResumableDistributedSampler(DistributedSampler[Tensor]):
    """The indices of each batch of this process.

    All processes together take each sample exactly once an epoch, and equally many batches: a batch of all of them is
    cut from the order and dealt out; where too few samples are left for one each, the last two are one. torch's
    `DistributedSampler` takes some samples twice instead. Being one keeps Lightning from putting its own in place, and
    lets it set the epoch.

    Args:
        samples: `N`.
        batch_size: Samples in a batch, per process.
        shuffle: Whether each epoch has an order of its own.
        seed: Of the orders.
        rank: Number of this process, from 0.
        world_size: `P`.
        device: Where the indices lie.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_replicas = world_size
        self.device = device
        self.epoch = 0
        self.start = 0
        self.start_epoch: int | None = None
        self.running = 0
        self.batches_consumed = 0  # Counted by the loader: with workers, the order is ahead of what was taken.

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._bounds())

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches of the epoch, from `start` on this once."""
        start, self.start = self.start, 0
        epoch = self.running = self.epoch
        self.batches_consumed = start = start if epoch == self.start_epoch else 0
        self.epoch += 1  # Where nobody sets it.
        order = torch.arange(self.samples)
        if self.shuffle:
            mixed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            order = torch.randperm(self.samples, generator=generator)
        order = order.to(self.device)  # All of an epoch at once; it is drawn where it is the same on every device.
        sizes = [len(range(low + self.rank, high, self.num_replicas)) for low, high in self._bounds()]
        yield from torch.split(order[self.rank :: self.num_replicas], sizes)[start:]

    def _bounds(self) -> list[tuple[int, int]]:
        """Return where each batch of all processes starts and ends in the order."""
        whole = self.batch_size * self.num_replicas
        starts = list(range(0, self.samples, whole))
        if len(starts) > 1 and self.samples - starts[-1] < self.num_replicas:
            starts.pop()
        bounds = list(zip(starts, [*starts[1:], self.samples], strict=True))
        # Where there are fewer samples than processes, some have nothing.
        return [(low, high) for low, high in bounds if low + self.rank < high]


class Loader(DataLoader[Batch]):
    """A loader that goes on in the middle of an epoch, after the batch that was taken last.

    Args:
        dataset: What batches are taken from.
        order: Which.
        num_workers: Processes that load.
    """

    def __init__(self, dataset: TensorBatches, sampler: ResumableDistributedSampler, num_workers: int) -> None:
        # A generator of its own, so that to begin an epoch draws no number that dropout would have got.
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=partial(_stay, os.getpid()),
        )
        self.order = sampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises a class of its own
        """Yield the batches that are left of the epoch."""
        if not self.num_workers:  # What DataLoader does then, at a third of its time.
            dataset = cast(TensorBatches, self.dataset)
            for indices in self.order:
                self.order.batches_consumed += 1
                yield dataset.__getitems__(indices)
            return
        with _signals_kept_back():  # Workers begin deaf: one that a signal of all processes ends would end the run.
            batches = super().__iter__()
        for batch in batches:
            self.order.batches_consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return which epoch is under way, how many of its batches were taken, and what their order depends on."""
        order = self.order
        return {
            "batches_consumed": order.batches_consumed,
            "epoch": order.running,
            "seed": order.seed,
            "samples": order.samples,
            "batch_size": order.batch_size,
            "processes": order.num_replicas,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were taken, in the same order.

        Raises:
            UsageError: When samples, batch size or the number of processes are others: no order would be the same.
        """
        now = self.state_dict()
        changed = [name for name in ("samples", "batch_size", "processes") if state_dict[name] != now[name]]
        if changed:
            found = ", ".join(f"{name} was {state_dict[name]} and is {now[name]}" for name in changed)
            raise UsageError(
                f"the run cannot go on exactly: {found}; --allow_inexact starts the epoch anew with what is now"
            )
        self.order.seed = state_dict["seed"]
        self.order.start = state_dict["batches_consumed"]
        self.order.start_epoch = state_dict["epoch"]


def per_process(batch_size: int, batch_size_is: BatchSizeIs, processes: int) -> int:
    """Return the samples in a batch of each of so many processes.

    >>> per_process(32, "global", 2)
    16

    Raises:
        UsageError: When a global batch cannot be divided by them.
    """
    if batch_size_is == "per_process":
        return batch_size
    if batch_size % processes:
        raise UsageError(
            f"batch_size={batch_size} is global and cannot be divided by {processes} processes: take a multiple of them"
        )
    return batch_size // processes


def loader(
    dataset: TensorBatches,
    trainer: Trainer | None,
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    on_device: bool | None,
) -> DataLoader[Batch]:
    """Return a loader for the process of a trainer; its seed is that of `seed_everything`, or torch's own."""
    if trainer is not None and (trainer.predicting or trainer.overfit_batches):  # type: ignore[attr-defined]
        # To predict, and to take the same batches in each epoch, Lightning needs samplers of torch's own.
        return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_as_it_is)
    rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
    if trainer is not None and is_on_device(dataset, trainer.strategy.root_device, num_workers, on_device):
        dataset = dataset.to(trainer.strategy.root_device)
    order = ResumableDistributedSampler(len(dataset), batch_size, shuffle, seed, rank, processes, dataset.device)
    return Loader(dataset, order, num_workers)


def is_on_device(dataset: TensorBatches, device: torch.device, num_workers: int, on_device: bool | None) -> bool:
    """Tell whether samples are to lie where they are trained with, where a batch then need not be brought."""
    if on_device is None:
        # Activations need most of what is free.
        return device.type == "cuda" and not num_workers and 8 * dataset.nbytes <= torch.cuda.mem_get_info(device)[0]
    return on_device


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Let signals wait, and not reach a process that is started meanwhile, where the system can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stay(parent: int, worker: int) -> None:
    """Leave signals to the process that trains, which ends its workers: a terminal and a scheduler signal them all."""
    if os.getppid() != parent:
        os._exit(1)  # It was killed meanwhile, and torch 2.13 would wait for it for ever.
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Batch:
    """Collate nothing: the data set returns whole batches."""
    return cast(Batch, batch)
