"""A checkpoint that holds finite weights only, and is written when there is time."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from firstlight.callbacks.finite import not_finite
from firstlight.errors import UsageError

__all__ = ["FiniteCheckpoint", "ends", "refuse_not_finite"]


class FiniteCheckpoint(ModelCheckpoint):
    """A checkpoint that is never written of weights that are not finite, and fails on all processes or on none.

    Args:
        at_most: Share of the time that writing may take, above 0; 1 writes each time.
        **options: What Lightning's class takes.

    Raises:
        UsageError: When `at_most` is no such share.
    """

    def __init__(self, at_most: float, **options: Any) -> None:
        if not 0 < at_most <= 1:
            raise UsageError(f"{type(self).__name__} was given at_most={at_most}: it is above 0 and at most 1")
        super().__init__(enable_version_counter=False, **options)
        self.at_most = at_most
        self._took = 0.0
        self._written = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the time from here on; what comes first is written."""
        super().on_train_start(trainer, pl_module)
        self._written, self._took = time.monotonic(), 0.0

    def _has_time(self, trainer: Trainer) -> bool:
        """Tell, on all processes alike, whether so much time has passed that writing takes little of it."""
        passed = time.monotonic() - self._written
        affordable = self._took * (1 - self.at_most) <= passed * self.at_most
        if trainer.world_size > 1 and self.at_most < 1:
            affordable = trainer.strategy.broadcast(affordable)
        return affordable

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        refuse_not_finite(trainer, filepath)
        write = super()._save_checkpoint
        self._together(trainer, filepath, lambda: write(trainer, filepath))

    def _together(self, trainer: Trainer, path: str | Path, write: Callable[[], None]) -> None:
        """Write; where the first process cannot, the others would wait for it, and then blame the connection."""
        begun = time.monotonic()
        for logger in trainer.loggers:
            # What was logged before the checkpoint is not logged again by a run that goes on from it.
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                with suppress(OSError):  # A full disk; the logger says so at the next logging.
                    logger.experiment.flush()
        fault = None
        try:
            write()
        except UsageError as error:
            fault = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # which the others have come to
        if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
            raise fault or UsageError(f"the first process could not write {path}")
        self._written = time.monotonic()
        self._took = self._written - begun


def ends(trainer: Trainer) -> bool:
    """Tell, at the end of an epoch, whether it is the last one."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    last = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return trainer.should_stop or last or 0 <= steps <= trainer.global_step


def refuse_not_finite(trainer: Trainer, path: str | Path) -> None:
    """Refuse to write a checkpoint of weights that are not finite, on all processes alike.

    Raises:
        UsageError: Naming the first such tensor.
    """
    name = not_finite(trainer.lightning_module)
    if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
        raise UsageError(
            f"{path} is not written at step {trainer.global_step:,}: {name or 'a tensor of another process'} is not "
            "finite; earlier checkpoints are kept"
        )
