"""The best checkpoint and the last one."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from firstlight.errors import UsageError

__all__ = ["BestCheckpoint", "LastCheckpoint", "recorded"]


class BestCheckpoint(ModelCheckpoint):
    """Keep `best.ckpt`, one file, of the validation with the best value of a metric.

    Args:
        monitor: Name of the metric.
        mode: Whether its best value is the least or the most.
        dirpath: Folder of the file; `None` leaves it to the logger.
        save_weights_only: Leave out what only training needs.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"],
        dirpath: Path | None = None,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__(
            dirpath,
            "best",
            monitor=monitor,
            mode=mode,
            save_weights_only=save_weights_only,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was best; a run whose folder was moved keeps it, which Lightning 2.6.6 forgets."""
        best = Path(str(self.dirpath)) / "best.ckpt"
        if self.dirpath and best.is_file() and Path(state_dict["dirpath"]) != Path(self.dirpath):
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(best),
                "kth_best_model_path": str(best),
                "best_k_models": {str(best): score for score in state_dict["best_k_models"].values()},
            }
        super().load_state_dict(state_dict)


def recorded(path: str | Path) -> dict[str, float]:
    """Return when a checkpoint was written, and the validation metrics that a task wrote into it, by name.

    `epoch` counts from 1, `step` is the number of optimiser steps done.
    """
    # Mapped, so that the weights are not read.
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {"epoch": checkpoint["epoch"] + 1, "step": checkpoint["global_step"], **checkpoint.get("metrics", {})}


class LastCheckpoint(ModelCheckpoint):
    """Keep `last.ckpt`, one file, written after every `every_n_epochs` epochs and when the run is interrupted.

    Ctrl-C lets the optimiser step under way finish, writes `last.ckpt` and raises `KeyboardInterrupt`; a second one
    raises it at once. On several processes Ctrl-C is not caught, and the file is the last epoch's.

    Args:
        dirpath: Folder of the file; `None` leaves it to the logger.
        every_n_epochs: Epochs from one writing to the next, at least 1.

    Raises:
        UsageError: When `every_n_epochs` is below 1.
    """

    def __init__(self, dirpath: Path | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UsageError(f"LastCheckpoint was given every_n_epochs={every_n_epochs}: it is at least 1")
        super().__init__(
            dirpath,
            "last",
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self._interrupted = False
        self._step = 0
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch Ctrl-C while training."""
        super().on_train_start(trainer, pl_module)
        self._interrupted = False
        self._step = trainer.global_step
        # Someone else's handler, or another thread's training, is left alone.
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the file and stop, if asked to, after an optimiser step that is whole."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped = trainer.global_step > self._step
        self._step = trainer.global_step
        if self._interrupted and stepped:
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back; Lightning runs no teardown after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._release()
        self._interrupted = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
