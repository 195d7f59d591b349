"""The checks of a fit, by the moment at which each becomes possible."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer

from firstlight.data import DataModule
from firstlight.data.loader import per_process
from firstlight.preflight import rules
from firstlight.preflight.probe import probe
from firstlight.tasks import Task

__all__ = ["FitChecks"]


@dataclass(frozen=True)
class FitChecks:
    """Refuse a fit that cannot be right. The methods stand in the order in which a fit calls them.

    Each of them raises `UsageError`.

    Args:
        task: The task to train.
        datamodule: Its data.
        options: Arguments of `Trainer`.
        disable: Names of default callbacks that are left out.
    """

    task: Task
    datamodule: LightningDataModule
    options: Mapping[str, Any]
    disable: Collection[str] = ()

    def check_options(self) -> None:
        """Refuse trainer options that train nothing."""
        rules.refuse_options(self.options)

    def check_data(self) -> None:
        """Refuse samples that the task cannot learn from; a DataModule that is not firstlight's is not inspected."""
        if isinstance(self.datamodule, DataModule):
            self.datamodule.setup()
            for split in self.datamodule.indices:
                samples = self.datamodule.dataset(split)
                few = samples[range(min(3, len(samples)))]
                probe(self.task, self.datamodule.on_after_batch_transfer(few, 0), samples.targets)

    def check_room(self, folder: Path) -> tuple[int, int]:
        """Refuse a folder that cannot be written, or whose disk has no room for the checkpoints.

        Args:
            folder: The run directory, or the folder in which it will be made.

        Returns:
            The bytes that are needed and the bytes that are free. The checkpoints that do not exist yet count, and one
            more, because a checkpoint is written beside the file that it replaces.
        """
        kept = [name for name in ("best", "last") if name not in self.disable]
        new = [name for name in kept if not (folder / "checkpoints" / f"{name}.ckpt").is_file()]
        files = len(new) + 1 if kept else 0
        needed = files * rules.checkpoint_bytes(self.task, self.task.optimization.build_optimizer)
        return needed, rules.refuse_no_room(folder, needed)

    def check_sizes(self, trainer: Trainer) -> None:
        """Refuse a split with fewer samples than processes, and a global batch that the processes cannot share."""
        if isinstance(self.datamodule, DataModule):
            processes = trainer.num_devices * trainer.num_nodes
            per_process(self.datamodule.batch_size, self.datamodule.batch_size_is, processes)
            sizes = {str(split): len(rows) for split, rows in self.datamodule.indices.items()}
            rules.refuse_fewer_samples(sizes, processes)

    def check_monitors(self, trainer: Trainer, callbacks: Sequence[Callback]) -> None:
        """At the end of the sanity check, refuse a callback that monitors a metric that validation does not log."""
        rules.refuse_unknown_monitors(trainer, callbacks)

    def check_validation(self, trainer: Trainer, callbacks: Sequence[Callback]) -> None:
        """At the start of training, refuse a fit that never validates although a callback waits for it."""
        rules.refuse_no_validation(trainer, callbacks)

    def check_batches(self, trainer: Trainer) -> None:
        """After a fit that trained nothing, refuse training data without a batch."""
        rules.refuse_no_batches(trainer)
