"""The best checkpoint and the last one."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from firstlight.callbacks.cadence import is_due, validation_follows
from firstlight.callbacks.finite import not_finite
from firstlight.errors import UsageError

__all__ = ["BestCheckpoint", "LastCheckpoint", "read_checkpoint_metrics"]


_log = logging.getLogger(__name__)

_SMALL = 2**26
"""Bytes that may wait in memory, 64 MiB."""


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


class BestCheckpoint(FiniteCheckpoint):
    """Keep `best.ckpt`, one file, of the validation with the best value of a metric; weights are finite, or it raises.

    Where epochs are so short that writing would take more than `at_most` of the time, a checkpoint of a single process,
    with up to 64 MiB of weights, buffers and optimiser state, waits in memory for the next epoch that has time, for
    `LastCheckpoint`, which never tells of a best that is not on the disk, or for the end, also by an exception. Larger
    ones, and those of several processes, are written at once.

    Args:
        monitor: Name of the metric.
        mode: Whether its best value is the least or the most.
        dirpath: Folder of the file; `None` leaves it to the logger.
        save_weights_only: Leave out what only training needs.
        at_most: Share of the time that writing may take, above 0; 1 writes each best at once.

    Raises:
        UsageError: When `at_most` is no such share.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"],
        dirpath: Path | None = None,
        save_weights_only: bool = False,
        at_most: float = 0.005,
    ) -> None:
        super().__init__(
            at_most, dirpath=dirpath, filename="best", monitor=monitor, mode=mode, save_weights_only=save_weights_only
        )
        self._waiting: tuple[str, dict[str, Any]] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing is written between validations."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best, or what waits, when there is time."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._waiting and (self._has_time(trainer) or ends(trainer)):
            self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what waits."""
        super().on_train_end(trainer, pl_module)
        self.write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what waits; where that fails too, what was first is what is told."""
        try:
            self.write(trainer)
        except Exception as error:
            _log.warning(f"best.ckpt is not that of the best validation: {error}")

    def write(self, trainer: Trainer) -> None:
        """Write what waits in memory, whose weights were finite."""
        if self._waiting:
            self._put(trainer, *self._waiting)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # What waits is given up only for one that was judged, or written.
        refuse_not_finite(trainer, filepath)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        # This is the file that people share, and a task adds training samples' outputs and targets.
        checkpoint.pop("unlogged", None)
        if not _is_small(trainer) or self._has_time(trainer):
            self._put(trainer, filepath, checkpoint)
        else:
            if trainer.strategy.root_device.type != "cpu":  # whose fault may be what ends the run
                checkpoint = move_data_to_device(checkpoint, "cpu")
            # Hyper-parameters stay as they are, and are most of the objects.
            kept = {name: each if "hyper_parameters" in name else deepcopy(each) for name, each in checkpoint.items()}
            self._waiting = filepath, kept
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _put(self, trainer: Trainer, path: str, checkpoint: dict[str, Any]) -> None:
        def write() -> None:
            trainer.strategy.save_checkpoint(checkpoint, path)
            trainer.strategy.barrier("Trainer.save_checkpoint")

        self._together(trainer, path, write)
        self._waiting = None
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(self)

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
        self.current_score = state_dict["current_score"]  # Lightning 2.6.6 saves it and does not restore it.
        # A best may have come after the checkpoint that the run goes on from.
        found: dict[str, Any] = {}
        with suppress(Exception):  # A damaged one is written anew.
            found = torch.load(best, map_location="cpu", mmap=True, weights_only=True)
        kept = found.get("callbacks", {}).get(self.state_key)
        if kept is not None:
            is_better = torch.lt if self.mode == "min" else torch.gt
            score = kept["best_model_score"]
            if self.best_model_score is None or is_better(score, self.best_model_score):
                self.best_model_score, self.kth_value, self.current_score = score, score, kept["current_score"]
                self.best_model_path = self.kth_best_model_path = str(best)
                self.best_k_models = {str(best): score}


def _is_small(trainer: Trainer) -> bool:
    """Tell whether a checkpoint may wait in memory."""
    if type(trainer.strategy) is not SingleDeviceStrategy:
        return False
    module = trainer.lightning_module
    states = [value for each in trainer.optimizers for state in each.state.values() for value in state.values()]
    held = [*module.parameters(), *module.buffers(), *(value for value in states if isinstance(value, torch.Tensor))]
    return sum(each.numel() * each.element_size() for each in held) <= _SMALL


def read_checkpoint_metrics(path: str | Path) -> dict[str, float]:
    """Return when a checkpoint was written, and the validation metrics that a task wrote into it, by name.

    `epoch` counts from 1, `step` is the number of optimiser steps done.
    """
    # Mapped, so that the weights are not read.
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {"epoch": checkpoint["epoch"] + 1, "step": checkpoint["global_step"], **checkpoint.get("metrics", {})}


class LastCheckpoint(FiniteCheckpoint):
    """Keep `last.ckpt`, one file, written after epochs, steps or seconds, and at the end of the run.

    It is written whether or not a metric improved, and never of weights that are not finite: then it raises. Where
    epochs are so short that writing would take more than `at_most` of the time, some of them are passed over; a run
    that is killed does them again.

    Args:
        dirpath: Folder of the file; `None` leaves it to the logger.
        every_n_epochs: Epochs from one writing to the next, at least 1.
        at_most: Share of the time that writing after epochs may take, above 0; 1 writes after each.
        every_n_steps: Optimiser steps from one writing within an epoch to the next; 0 is never. Where a validation
            follows the step, the file is written after the next one.
        every_seconds: Seconds after which it is written again, after an optimiser step; 0 is never. Several processes
            agree on the time only where something is logged (`log_every_n_steps`), because that waits for them.

    Raises:
        UsageError: When `every_n_epochs` is below 1, or another one is negative.
    """

    def __init__(
        self,
        dirpath: Path | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        every_seconds: float = 600,
        at_most: float = 0.005,
    ) -> None:
        if every_n_epochs < 1:
            raise UsageError(f"LastCheckpoint was given every_n_epochs={every_n_epochs}: it is at least 1")
        for name, value in (("every_n_steps", every_n_steps), ("every_seconds", every_seconds)):
            if not value >= 0:
                raise UsageError(f"LastCheckpoint was given {name}={value}: it is at least 0, which is never")
        super().__init__(
            at_most, dirpath=dirpath, filename="last", every_n_epochs=every_n_epochs, save_on_train_epoch_end=True
        )
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        self._written_step = -1
        self._step = 0
        self._owed = self._epoch_owed = False
        self._alone = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here on."""
        super().on_train_start(trainer, pl_module)
        self._step, self._written_step, self._owed, self._epoch_owed = trainer.global_step, -1, False, False
        self._alone = trainer.world_size == 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the file when it is due, after an optimiser step that is whole."""
        before, self._step = self._step, trainer.global_step
        if self._step > before:
            self._owed = self._is_due(trainer) or self._owed
            if self._owed and not validation_follows(trainer, batch_idx):
                self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file when it is due, after the validation."""
        is_last = ends(trainer)
        if is_last or (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._epoch_owed = True
        if self._epoch_owed and (self._has_time(trainer) or is_last):
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._epoch_owed = False
        if self._owed:
            self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: when the file was last written depends on the clock, and a run that goes on does not care."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing over."""

    def write(self, trainer: Trainer) -> None:
        """Write the file, on all processes together, unless this step's was written."""
        if trainer.global_step != self._written_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(str(self.dirpath)) / "last.ckpt"
            refuse_not_finite(trainer, path)
            # Lightning's own would take an epoch that ends at this step for written.
            self._together(trainer, path, lambda: trainer.save_checkpoint(path))

    def _together(self, trainer: Trainer, path: str | Path, write: Callable[[], None]) -> None:
        for each in trainer.checkpoint_callbacks:
            if isinstance(each, BestCheckpoint):
                each.write(trainer)
        super()._together(trainer, path, write)
        self._written_step, self._owed, self._epoch_owed = trainer.global_step, False, False

    def _is_due(self, trainer: Trainer) -> bool:
        late = 0 < self.every_seconds <= time.monotonic() - self._written
        if self._alone and not self.every_n_steps:
            return late
        done = self._step // max(len(trainer.optimizers), 1)
        if not self._alone and self.every_seconds:
            agree = is_due(done - 1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set outside the class
            late = agree and trainer.strategy.broadcast(late)
        return is_due(done - 1, self.every_n_steps) or late


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
