"""The best checkpoint, the last one, and the weights that callbacks leave at the end."""

import time
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from firstlight.callbacks.finite import not_finite
from firstlight.callbacks.measured import Measured, refuse_missing
from firstlight.checkpoints.io import read
from firstlight.errors import UsageError, check_range, check_saved
from firstlight.loggers import LogCadence, current_step, split_of

_PATHS = ("best_model_path", "kth_best_model_path")


class FiniteCheckpoint(ModelCheckpoint):
    """A checkpoint that never holds weights that are not finite. If one process cannot write, all of them raise."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write the file, on all processes together.

        Raises:
            UsageError: When a weight is not finite, or when the file cannot be written.
        """
        name = not_finite(trainer.lightning_module)
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            raise UsageError(
                f"{filepath} is not written at step {trainer.global_step:,}: {name or 'a tensor of another process'} "
                "is not finite; earlier checkpoints are kept"
            )
        error = None
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            self._trim(trainer, checkpoint)
            self._store(trainer, checkpoint, filepath)
        except UsageError as raised:
            error = raised
        # In Lightning 2.6.6 the other processes would wait here, and then report a lost connection.
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            raise error or UsageError(f"the first process could not write {filepath}")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _store(self, trainer: Trainer, checkpoint: dict[str, Any], filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # Before the checkpoint, because a resumed run does not log these steps again.
            if isinstance(logger, TensorBoardLogger):
                with suppress(OSError):  # A full disk: the logger warns at the next logging.
                    logger.experiment.flush()
        trainer.strategy.save_checkpoint(checkpoint, filepath)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(self)

    def _trim(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Remove what the file does not need."""


class BestCheckpoint(FiniteCheckpoint):
    """Write `best.ckpt`, one file, after each validation in which the monitored metric is better than before.

    While `last.ckpt` is less than its `min_seconds` old, the file waits in memory, until `last.ckpt` or the end of the
    run. A run that is killed before that resumes from `last.ckpt` and finds the same best again.

    Args:
        monitor: Name of the metric.
        mode: Whether lower (`min`) or higher (`max`) values are better.
        dirpath: Folder of the file; `None` leaves it to the logger.
        save_weights_only: Leave out what only training needs.
    """

    _waiting: tuple[dict[str, Any], str] | None = None

    def __init__(
        self, monitor: str, mode: Literal["min", "max"], dirpath: Path | None = None, save_weights_only: bool = False
    ) -> None:
        options: dict[str, Any] = {"save_weights_only": save_weights_only, "enable_version_counter": False}
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, **options)
        self._measured = Measured()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the best of an earlier fit with this object; a checkpoint restores its own fit afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._waiting, self._measured = None, Measured()
            self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
            self.best_model_score = self.current_score = None
            self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do nothing: the file is written after validations only."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the values of earlier epochs are old."""
        self._measured.start_epoch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, unless that is for the end of the epoch."""
        self._measured.end_validation(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file that waits."""
        super().on_train_end(trainer, pl_module)
        self.write_waiting(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the file that waits; a failure is only told, so that the exception stays what ended the run."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self.write_waiting(trainer)
        except UsageError as error:
            rank_zero_warn(str(error))

    def write_waiting(self, trainer: Trainer) -> None:
        """Write the file that waits, if one does."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            super()._store(trainer, *waiting)

    def _store(self, trainer: Trainer, checkpoint: dict[str, Any], filepath: str) -> None:
        after = trainer.checkpoint_callbacks[trainer.checkpoint_callbacks.index(self) + 1 :]
        waits = trainer.world_size == 1 and any(isinstance(each, LastCheckpoint) and each.is_recent() for each in after)
        self._waiting = (deepcopy(checkpoint), filepath) if waits else None
        if not waits:
            super()._store(trainer, checkpoint, filepath)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """Compare the metric, if it was measured since. Lightning 2.6.6 would compare its last value again."""
        if self.monitor not in monitor_candidates and trainer.fit_loop.epoch_loop.val_loop._has_run:
            refuse_missing(self, trainer.callback_metrics)
        if not self._measured.is_old(trainer, str(self.monitor)):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def check_monitor_top_k(self, trainer: Trainer, current: torch.Tensor | None = None) -> bool:
        """Return whether the metric is better than before. NaN never is; Lightning 2.6.6 would keep the first one."""
        return (current is None or not current.isnan()) and super().check_monitor_top_k(trainer, current)

    def _trim(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Remove `train_log`, outputs and targets of training samples: people share this file.

        A module that is not a task stores no metrics, so those of this validation are added. Older ones belong to other
        weights.
        """
        checkpoint.pop("train_log", None)
        if self.current_score is not None:
            named = trainer.callback_metrics.items()
            validated = {name: float(each) for name, each in named if split_of(name) == "val" and each.numel() == 1}
            metrics = checkpoint.get("metrics", {**validated, str(self.monitor): float(self.current_score)})
            now = {name: each for name, each in metrics.items() if not self._measured.is_old(trainer, name)}
            checkpoint["metrics"] = now

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen."""
        return {**super().state_dict(), "known": self._measured.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, or that of `best.ckpt` if it is better: the file may be newer than the checkpoint.

        Lightning 2.6.6 forgets the best checkpoint of a run whose folder was moved, and the current score.
        """
        best = Path(str(self.dirpath)) / "best.ckpt"
        with suppress(Exception):  # A damaged file counts as none, and the next best replaces it.
            written = read(best, mmap=True)["callbacks"][self.state_key]
            _check_best(written)
            known, score = state_dict["best_model_score"], written["best_model_score"]
            if known is None or (score < known if self.mode == "min" else score > known):
                state_dict = written
        _check_best(state_dict)
        if best.is_file():
            paths = dict.fromkeys(_PATHS, str(best))
            scores = {str(best): score for score in state_dict["best_k_models"].values()}
            state_dict = {**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": scores}
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]
        self._measured = Measured(state_dict.get("known", ()))


def _check_best(state: dict[str, Any]) -> None:
    """Refuse a state of another form than Lightning's `ModelCheckpoint` writes."""
    score, scores = Tensor | None, dict[str, Tensor]
    check_saved("BestCheckpoint", state, best_model_score=score, current_score=score, best_k_models=scores)
    check_saved("BestCheckpoint", state, kth_value=Tensor, **dict.fromkeys(_PATHS, str))
    check_saved("BestCheckpoint", {"known": [], **state}, known=list[str])


class LastCheckpoint(FiniteCheckpoint):
    """Write `last.ckpt`, one file, after epochs and at the end of the run; optionally within epochs as well.

    Args:
        dirpath: Folder of the file; `None` leaves it to the logger.
        every_n_epochs: Epochs between two writes, at least 1.
        every_n_steps: Optimiser steps (with manual optimisation: batches) between two writes within an epoch; 0 writes
            none. The file is written after the first step from then on that no validation follows.
        every_seconds: Seconds since the last write after which the next optimiser step writes; 0 writes none. Several
            processes compare clocks only at steps that are logged (`log_every_n_steps`), which wait for each other.
        min_seconds: Seconds since the last write within which the end of an epoch does not write; 0 writes each time.
    """

    def __init__(
        self,
        dirpath: Path | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        every_seconds: float = 600,
        min_seconds: float = 1,
    ) -> None:
        check_range("LastCheckpoint", "[1, inf)", every_n_epochs=every_n_epochs)
        check_range("LastCheckpoint", "[0, inf)", every_n_steps=every_n_steps)
        check_range("LastCheckpoint", "[0, inf]", every_seconds=every_seconds, min_seconds=min_seconds)
        options: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        super().__init__(dirpath=dirpath, filename="last", every_n_epochs=every_n_epochs, **options)
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        self.min_seconds = min_seconds
        self._cadence = LogCadence()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count seconds from here."""
        super().on_train_start(trainer, pl_module)
        self._is_distributed = trainer.world_size > 1
        self._written_step, self._written_at = -1, time.monotonic()
        self._has_stepped = self._is_pending = False
        self._cadence.seen.clear()

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Note that the optimiser steps in this batch."""
        self._has_stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the file when it is due and the optimiser has stepped."""
        if self.every_n_steps and (current_step(trainer) + 1) % self.every_n_steps == 0:
            self._is_pending = True
        if self._has_stepped:
            self._has_stepped = False
            self._is_pending = self._is_pending or self._is_late(trainer)
            if self._is_pending and not validation_follows(trainer, batch_idx):
                self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file when it is due, after the validation."""
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0 and not self._is_too_soon(trainer)
        if is_due or self._is_pending or _is_last_epoch(trainer):
            self._written_step = -1  # Resumed from a file of the same step, a run would end this epoch again.
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the file, on all processes together, unless it holds this step already."""
        if trainer.global_step != self._written_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for each in trainer.checkpoint_callbacks:
                if isinstance(each, BestCheckpoint):  # A resumed run does not repeat what came before this file.
                    each.write_waiting(trainer)
            self.best_model_path = str(Path(str(self.dirpath)) / "last.ckpt")
            self._save_checkpoint(trainer, self.best_model_path)
            self._written_step, self._written_at, self._is_pending = trainer.global_step, time.monotonic(), False

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the times of earlier writes do not matter to a resumed run."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing."""

    def _is_late(self, trainer: Trainer) -> bool:
        is_late = 0 < self.every_seconds <= time.monotonic() - self._written_at
        if self._is_distributed and self.every_seconds:
            is_late = self._cadence.is_due(trainer) and trainer.strategy.broadcast(is_late)
        return is_late

    def is_recent(self) -> bool:
        """Return whether this process wrote the file in this fit less than `min_seconds` ago."""
        return self._written_step >= 0 and time.monotonic() - self._written_at < self.min_seconds

    def _is_too_soon(self, trainer: Trainer) -> bool:
        """Return whether the last write is less than `min_seconds` ago, as the first process decides."""
        return bool(self.min_seconds) and trainer.strategy.broadcast(self.is_recent())


class FinalCheckpoint(Callback):
    """Write `final.ckpt` if `on_train_end` of a callback or the module changes the weights, for example to an average.

    No other checkpoint holds these weights. Add it before the callbacks that may change them.

    Args:
        dirpath: Folder of the file.
        callbacks: The callbacks that may change the weights.
    """

    def __init__(self, dirpath: Path, callbacks: Sequence[Callback]) -> None:
        self.path = dirpath / "final.ckpt"
        self.callbacks = callbacks
        self._before: dict[str, Any] | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete the `final.ckpt` that this run wrote before it was resumed."""
        if trainer.is_global_zero:
            self.path.unlink(missing_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights as they are now."""
        callbacks = [each for each in self.callbacks if is_overridden("on_train_end", each, Callback)]
        if (callbacks or is_overridden("on_train_end", pl_module)) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            weights = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["state_dict"]
            # This callback sets the average before its last epoch if it must compute running statistics.
            averages = any(isinstance(each, StochasticWeightAveraging) and each.momenta for each in callbacks)
            self._before = {} if averages else {name: _copied(value) for name, value in weights.items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file if the weights have changed since.

        Raises:
            UsageError: When a weight is not finite, or when the file cannot be written.
        """
        if self._before is None:
            return
        before, self._before = self._before, None
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        now = checkpoint["state_dict"]
        same = before.keys() == now.keys() and all(_equal(before[name], value) for name, value in now.items())
        if trainer.strategy.reduce_boolean_decision(same):
            return
        if name := not_finite(pl_module):
            raise UsageError(f"{self.path} is not written: {name} is not finite; other checkpoints are kept")
        for name in ("optimizer_states", "lr_schedulers", "train_log", "metrics"):  # No fit resumes from it.
            checkpoint.pop(name, None)
        trainer.strategy.save_checkpoint(checkpoint, str(self.path))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a validation, or the end of the epoch, comes between this batch and the next.

    Lightning 2.6.6 skips that validation when a run resumes from a checkpoint written before it.
    """
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if trainer.is_last_batch or not trainer.enable_validation or every is None:
        return trainer.is_last_batch
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % every == 0


def _is_last_epoch(trainer: Trainer) -> bool:
    """Return, at the end of an epoch, whether it is the last one."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    reached = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return trainer.should_stop or reached or 0 <= steps <= trainer.global_step
