"""What of training is logged, and that a run that goes on logs what it would have logged had it not been stopped."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from firstlight.distributed import all_gather_objects
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.schedules import Schedule
from firstlight.tasks.scheduled import Scheduled

__all__ = ["Logged"]


class Logged(Scheduled):
    """Log `train/*` of what was observed since the last time, after every `log_every_n_steps` optimiser steps.

    Checkpoints from which a fit can go on hold, under `unlogged`, what each process has observed and not logged: the
    outputs and targets of training batches.

    Args:
        optimizer: See `Task`.
        schedule: See `Task`.
    """

    train_metrics: SplitMetrics

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule) -> None:
        super().__init__(optimizer, schedule)
        self._logged_step = 0
        self._unlogged: dict[str, Any] | None = None

    def on_train_start(self) -> None:
        """Observe anew, or go on from a checkpoint, and log what was due when it was written."""
        super().on_train_start()
        trainer = self.trainer
        unlogged, self._unlogged = self._unlogged, None
        self._logged_step = trainer.global_step
        self.train_metrics.reset()
        if not trainer.ckpt_path or unlogged is None or len(unlogged["split_metrics"]) != trainer.world_size:
            return
        trainer.callback_metrics.update(unlogged["callback_metrics"])
        if not all(unlogged["split_metrics"]):  # Where one process begins anew, all do: they read together.
            return
        self._logged_step = unlogged["logged_step"]
        self.train_metrics.restore(unlogged["split_metrics"][trainer.global_rank])
        if values := self._read_if_due():  # A step is saved before it is logged, but for the last one of an epoch.
            trainer.callback_metrics.update(values)
            numbers = {name: float(value) for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**numbers, "epoch": unlogged["epoch"]}, step=trainer.global_step - 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log `train/*` where that is due."""
        if values := self._read_if_due():
            self.log_dict(values)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was not logged yet."""
        super().on_save_checkpoint(checkpoint)
        trainer = self.trainer
        if "optimizer_states" in checkpoint and trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set outside
            train = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
            checkpoint["unlogged"] = {
                "logged_step": self._logged_step,
                "epoch": trainer.current_epoch,
                "callback_metrics": train,
                "split_metrics": all_gather_objects(trainer, self.train_metrics.unread()),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was not logged yet; the best checkpoint has nothing of it."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._unlogged = checkpoint.get("unlogged")

    def _read_if_due(self) -> dict[str, Tensor]:
        """Return `train/*`, and begin anew, where a logging is due; otherwise nothing."""
        trainer = self.trainer
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if not every or step <= self._logged_step or step % every:
            return {}
        self._logged_step = step
        return self.train_metrics.compute()
