"""When `train/*` is logged, also if the run is interrupted and resumed."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from firstlight.distributed import all_gather_objects
from firstlight.errors import check_saved, restoring
from firstlight.loggers import is_logged_step
from firstlight.metrics.split_metrics import SplitMetrics


class TrainLog:
    """Computes `train/*` from the training `metrics` after every `log_every_n_steps` optimiser steps.

    A checkpoint holds the batches of each process that are not logged yet, so that a resumed run logs the same values
    as an uninterrupted one.
    """

    def __init__(self, metrics: SplitMetrics) -> None:
        self.metrics = metrics
        self._logged_step = 0
        self._saved: Mapping[str, Any] = {}

    def start(self, trainer: Trainer, device: torch.device) -> None:
        """Forget all batches, or restore those of the checkpoint and log what was due when it was saved."""
        saved, self._saved = self._saved, {}
        self._logged_step = trainer.global_step
        self.metrics.reset()
        if not trainer.ckpt_path or not saved or len(saved["batches"]) != trainer.world_size:
            return
        trainer.callback_metrics.update(saved["callback_metrics"])
        if not all(saved["batches"]):  # All processes compute together, so all restore or none.
            return
        self._logged_step = saved["logged_step"]
        with restoring("the log"):
            self.metrics.load_state_dict(saved["batches"][trainer.global_rank], device)
        # A callback writes the checkpoint of a step before that step is logged, except at the end of an epoch.
        if values := self.compute_if_due(trainer):
            trainer.callback_metrics.update(values)
            numbers = {name: float(value) for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**numbers, "epoch": saved["epoch"]}, step=trainer.global_step - 1)

    def compute_if_due(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return `train/*` of the batches since the last call that returned some, if it is time to log."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if step == self._logged_step or not is_logged_step(step - 1, every):
            return {}
        self._logged_step = step
        return self.metrics.compute()

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Return what is not logged yet on each process; all processes call this together."""
        if not trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set outside the class
            return {}
        metrics = trainer.callback_metrics
        return {
            "logged_step": self._logged_step,
            "epoch": trainer.current_epoch,
            "callback_metrics": {name: value for name, value in metrics.items() if name.startswith("train/")},
            "batches": all_gather_objects(trainer, self.metrics.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until `start`, or refuse a damaged one."""
        if state:
            check_saved("the log", state, logged_step=int, epoch=int, callback_metrics=dict, batches=list)
            for name, value in state["callback_metrics"].items():
                check_saved("the log", {name: value}, **{str(name): Tensor})
        self._saved = state
