"""The optimiser of a task, and the schedule that counts its steps."""

import logging
import math
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from firstlight.errors import UsageError
from firstlight.optim import parameter_groups
from firstlight.schedules import Schedule

__all__ = ["Scheduled"]

_log = logging.getLogger(__name__)


class Scheduled(LightningModule):
    """An optimiser without decay on biases and norms, and a schedule stepped with it.

    A run that goes on with another horizon moves its rate once to the new horizon's value and says so; its warm-up
    stays as long as it was first planned.

    Args:
        optimizer: Makes an optimiser of parameter groups.
        schedule: Factor of the learning rate at each optimiser step.
    """

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule) -> None:
        super().__init__()
        self.build_optimizer = optimizer
        self.schedule = schedule
        self._horizon: dict[str, float] = {}
        self._steps_done = 0

    @property
    def total_steps(self) -> float:
        """The optimiser steps that the whole run plans, infinite where nobody knows."""
        planned = self.trainer.estimated_stepping_batches
        return planned if planned >= 0 else math.inf  # Lightning says -1 for an iterable without a length.

    @property
    def planned_schedule(self) -> Schedule:
        """The schedule that the run follows: a resumed run keeps the warm-up that it was first planned with."""
        first = self._horizon["first"] if self.trainer.ckpt_path else self.total_steps
        return self.schedule if first == self.total_steps else self.schedule.continued(first)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, and step the schedule with it."""
        try:
            optimizer = self.build_optimizer(parameter_groups(self))
        except ValueError as error:  # torch's word for a value out of its range
            raise UsageError(f"optimizer: {error}") from error
        total = self.total_steps
        if self.trainer.ckpt_path and total < self._steps_done:
            raise UsageError(
                f"the run has done {self._steps_done:,} optimiser steps, and only {total:,} are planned now: plan more"
            )
        schedule = self.planned_schedule
        schedule(0, total)  # A schedule that cannot serve this run says so before it starts.
        # A plain function: LambdaLR would save the attributes of a callable object, and restore an old horizon.
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Move the learning rate at once where a resumed run has another horizon."""
        total = self.total_steps
        before = self._horizon["now"] if self.trainer.ckpt_path else total
        self._horizon = {"first": self._horizon["first"] if self.trainer.ckpt_path else total, "now": total}
        if before != total:
            self._move_to_horizon(before, total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the horizon."""
        checkpoint["horizon"] = self._horizon

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the horizon that the run was planned with."""
        self._horizon = checkpoint["horizon"]
        self._steps_done = checkpoint["global_step"]

    def _move_to_horizon(self, before: float, total: float) -> None:
        """Set the learning rate of this step to the new horizon's, which the scheduler does only from the next on."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        step = scheduler.last_epoch
        groups = scheduler.optimizer.param_groups
        old = groups[0]["lr"]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)
        if self.trainer.is_global_zero:
            _log.warning(
                f"the run was planned with {before:,} optimiser steps and now has {total:,}: "
                f"at step {step:,} the learning rate moves from {old:.3g} to {groups[0]['lr']:.3g}"
            )
