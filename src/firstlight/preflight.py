"""The checks of a fit that need its task and its data."""

from collections.abc import Collection
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer

from firstlight.checks import checkpoint_bytes, refuse_fewer_samples, refuse_no_room
from firstlight.data import DataModule
from firstlight.data.loader import per_process
from firstlight.tasks import Task

__all__ = ["check_data", "check_room", "check_sizes"]


def check_data(task: Task, datamodule: LightningDataModule) -> None:
    """Refuse samples that the task cannot learn from; only a `DataModule` of ours can be looked into.

    Raises:
        UsageError: When labels, shapes or types do not fit.
    """
    if isinstance(datamodule, DataModule):
        datamodule.setup()
        for split in datamodule.indices:
            samples = datamodule.dataset(split)
            few = samples[range(min(3, len(samples)))]
            task.check(datamodule.on_after_batch_transfer(few, 0), samples.targets)


def check_sizes(datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Refuse splits with fewer samples than the processes of a trainer, and a global batch that they do not divide.

    Raises:
        UsageError: Naming the split or the batch.
    """
    if isinstance(datamodule, DataModule):
        processes = trainer.num_devices * trainer.num_nodes
        per_process(datamodule.batch_size, datamodule.batch_size_is, processes)
        sizes = {str(split): len(rows) for split, rows in datamodule.indices.items()}
        refuse_fewer_samples(sizes, processes)


def check_room(task: Task, folder: Path, without: Collection[str]) -> tuple[int, int]:
    """Return the bytes that the checkpoints of a run still need, and those that are free.

    Needed are those that are not there yet, and one that is being written beside its place.

    Args:
        task: What is trained.
        folder: The run, or where it is going to be.
        without: Default callbacks that are left out.

    Raises:
        UsageError: When the folder cannot be written, or its disk has no room.
    """
    kept = [name for name in ("best", "last") if name not in without]
    new = [name for name in kept if not (folder / "checkpoints" / f"{name}.ckpt").is_file()]
    needed = (len(new) + 1 if kept else 0) * checkpoint_bytes(task, task.build_optimizer)
    return needed, refuse_no_room(folder, needed)
