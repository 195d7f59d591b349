"""Loaders whose order depends only on a seed and the epoch, so that a run can resume after any batch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, DistributedSampler

from firstlight.data.samples import Batch, TensorBatches
from firstlight.errors import UsageError, about, check_range, check_saved

BatchSizeIs = Literal["per_process", "global"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ResumableDistributedSampler(DistributedSampler[Tensor]):
    """Yields the indices of each batch of this process; can resume after any batch.

    Over all processes each sample is taken exactly once per epoch, and all processes take the same number of batches.
    A global batch is cut from the order and dealt out to the processes. If the last one has fewer samples than
    processes, it is joined with the one before. (torch's `DistributedSampler` takes some samples twice instead.)
    `fewest` is the smallest number of samples that a process may get: batch normalisation cannot train on one.

    It is a subclass of `DistributedSampler` so that Lightning does not replace it and sets its epoch. `batch_size`
    counts per process. With `shuffle`, each epoch has a new order, which depends on `seed` and the epoch.
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
        fewest: int = 1,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_replicas = world_size
        self.device = device
        self.fewest = fewest
        self.epoch = 0
        self.start_batch = 0
        self.start_epoch: int | None = None
        self.current_epoch = 0
        self.batches_consumed = 0  # Counted by the loader: workers draw indices ahead of the batches that are used.

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._bounds())

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches of the epoch; the first time from `start_batch` if the epoch is `start_epoch`."""
        start, self.start_batch = self.start_batch, 0
        epoch = self.current_epoch = self.epoch
        self.batches_consumed = start = start if epoch == self.start_epoch else 0
        self.epoch += 1  # For callers that do not set the epoch.
        order = self.order(epoch).to(self.device)  # Drawn on the CPU, so that it is the same for every device.
        sizes = [len(range(low + self.rank, high, self.num_replicas)) for low, high in self._bounds()]
        yield from torch.split(order[self.rank :: self.num_replicas], sizes)[start:]

    def order(self, epoch: int) -> Tensor:
        """Return the indices `(N,)` of all samples in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(self.samples)
        epoch_seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(int(epoch_seed[0])))

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch of any process."""
        return min((high - low) // self.num_replicas for low, high in self._bounds())

    def _bounds(self) -> list[tuple[int, int]]:
        """Return the start and end of each global batch, as positions in the order of the epoch."""
        global_batch_size = self.batch_size * self.num_replicas
        starts = list(range(0, self.samples, global_batch_size))
        if len(starts) > 1 and self.samples - starts[-1] < self.fewest * self.num_replicas:
            starts.pop()
        bounds = list(zip(starts, [*starts[1:], self.samples], strict=True))
        # With fewer samples than processes, some processes have no batch.
        return [(low, high) for low, high in bounds if low + self.rank < high]


class Loader(DataLoader[Batch]):
    """A loader that can resume in the middle of an epoch, after the last batch that was used."""

    sampler: ResumableDistributedSampler

    def __init__(self, dataset: TensorBatches, sampler: ResumableDistributedSampler, num_workers: int) -> None:
        # Its own generator: otherwise the start of an epoch would advance the global one, which dropout uses.
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader annotates its own iterator class
        """Yield the remaining batches of the epoch."""
        if not self.num_workers:  # The same as in DataLoader, in a third of its time.
            dataset = cast(TensorBatches, self.dataset)
            for indices in self.sampler:
                self.sampler.batches_consumed += 1
                yield dataset.__getitems__(indices)
            return
        with obedient_workers(self):
            batches = super().__iter__()
        for batch in batches:
            self.sampler.batches_consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the current epoch, the number of batches used in it, and what the order depends on."""
        sampler = self.sampler
        return {
            "batches_consumed": sampler.batches_consumed,
            "epoch": sampler.current_epoch,
            "seed": sampler.seed,
            "samples": sampler.samples,
            "batch_size": sampler.batch_size,
            "processes": sampler.num_replicas,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the batches that were used, in the same order.

        Raises:
            UsageError: If the number of samples, the batch size or the number of processes differs: so would the order.
                Also if the state is damaged.
        """
        now = self.state_dict()
        check_saved("the training loader", state_dict, **dict.fromkeys(now, int))
        with about("the checkpoint is damaged"):
            check_range("the training loader", "[0, 1e18]", **{name: state_dict[name] for name in now})
        changed = [name for name in ("samples", "batch_size", "processes") if state_dict[name] != now[name]]
        if changed:
            found = ", ".join(f"{name} was {state_dict[name]} and is {now[name]}" for name in changed)
            raise UsageError(f"the run cannot resume exactly: {found}; --allow_inexact restarts the epoch instead")
        self.sampler.seed = state_dict["seed"]
        self.sampler.start_batch = state_dict["batches_consumed"]
        self.sampler.start_epoch = state_dict["epoch"]


def per_process(batch_size: int, batch_size_is: BatchSizeIs, processes: int) -> int:
    """Return the number of samples in a batch of one process.

    >>> per_process(32, "global", 2)
    16

    Raises:
        UsageError: If a global batch size is not a multiple of the number of processes.
    """
    if batch_size_is == "per_process":
        return batch_size
    if batch_size % processes:
        raise UsageError(f"batch_size={batch_size} is global: it must be a multiple of the {processes} processes")
    return batch_size // processes


def make_loader(
    dataset: TensorBatches,
    trainer: Trainer | None,
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    on_device: bool | None,
) -> DataLoader[Batch]:
    """Return a loader for the process of a trainer, seeded by `seed_everything` or, without it, by torch."""
    if trainer is not None and (trainer.predicting or trainer.overfit_batches):  # type: ignore[attr-defined]
        # Lightning replaces the sampler for these, and can only replace torch's own.
        return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_identity)
    rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
    if trainer is not None and processes > 1:
        seed = trainer.strategy.broadcast(seed)  # Without a common seed, each process would shuffle in its own order.
    if trainer is not None and keep_on_device(dataset, trainer.strategy.root_device, num_workers, on_device):
        dataset = dataset.to(trainer.strategy.root_device)
    fewest = 2 if shuffle and trainer is not None and normalises_batches(trainer.lightning_module) else 1
    sampler = ResumableDistributedSampler(
        len(dataset), batch_size, shuffle, seed, rank, processes, dataset.device, min(fewest, batch_size)
    )
    return Loader(dataset, sampler, num_workers)


def normalises_batches(module: nn.Module | None) -> bool:
    """Return whether a module has a batch normalisation, which cannot train on a batch of one sample."""
    return module is not None and any(isinstance(part, _BatchNorm) for part in module.modules())


def keep_on_device(dataset: TensorBatches, device: torch.device, num_workers: int, on_device: bool | None) -> bool:
    """Return whether to keep the samples in the memory of `device`; `on_device` is the user's choice, if any."""
    if on_device is None:
        # Activations need most of the free memory.
        can_move = device.type == "cuda" and dataset.in_memory and not num_workers
        return can_move and 8 * dataset.nbytes <= torch.cuda.mem_get_info(device)[0]
    return on_device


@contextmanager
def _block_stop_signals() -> Iterator[None]:
    """Block signals in this process and in those that it starts meanwhile; then deliver them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def obedient_workers(loader: Any) -> Iterator[None]:
    """Let workers that a `DataLoader` starts in this context obey this process only; see `start_worker`."""
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        yield
        return
    own = loader.worker_init_fn
    loader.worker_init_fn = partial(start_worker, own)
    try:
        with _block_stop_signals():  # A worker that a signal ends before it ignores signals would end the run.
            yield
    finally:
        loader.worker_init_fn = own


def start_worker(own: Callable[[int], object] | None, worker: int) -> None:
    """Let a worker process obey the main process only, and call `own`.

    Terminals and schedulers send their signals to all processes; the main process decides what they mean.
    The worker ends when the main process asks for it or is gone. torch 2.13 misses that with the start method
    `forkserver`, or if the main process is killed while the worker starts.
    """
    if hasattr(signal, "sigtimedwait"):  # Not on macOS, where signals end the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        threading.Thread(target=_obey, args=(multiprocessing.parent_process(),), daemon=True).start()
    if own is not None:
        own(worker)


def _obey(parent: Any) -> None:
    while parent.is_alive():
        received = signal.sigtimedwait(_STOP_SIGNALS, 1)
        if received and received.si_pid == parent.pid:
            os._exit(0)
    os._exit(1)


def _identity(batch: Any) -> Batch:
    """Return the batch: the dataset returns whole batches, so there is nothing to collate."""
    return cast(Batch, batch)
