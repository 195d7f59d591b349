"""The optimiser of a task, and the schedule that counts its steps."""

import logging
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
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
        self._done: dict[str, float] | None = None
        self._loaded: dict[str, Any] | None = None
        self._configured: list[dict[str, Any]] = []

    @property
    def total_steps(self) -> float:
        """The optimiser steps that the whole run plans, infinite where nobody knows."""
        planned = self.trainer.estimated_stepping_batches
        if planned < 0:
            return math.inf  # Lightning says -1 for an iterable without a length.
        epochs = self.trainer.max_epochs or -1
        done = self._done if self.trainer.ckpt_path else None
        if (
            done is None
            or epochs < 0
            or planned == self.trainer.max_steps
            or planned / epochs == done["steps_an_epoch"]
        ):
            return planned
        # Epochs have become longer or shorter: those that are done keep their steps.
        return int(done["steps"] + (epochs - done["epochs"]) * planned / epochs)

    @property
    def planned_schedule(self) -> Schedule:
        """The schedule that the run follows: a resumed run keeps the warm-up that it was first planned with."""
        first = self._horizon["first"] if self.trainer.ckpt_path else self.total_steps
        return self.schedule if first == self.total_steps else self.schedule.continued(first)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, and step the schedule with it."""
        groups = parameter_groups(self)
        try:
            optimizer = self.build_optimizer(groups)
            if not any(group.get("weight_decay") for group in optimizer.param_groups):
                # Nothing tells them apart, and a step of one group takes less time. Their order stays.
                optimizer = self.build_optimizer([parameter for group in groups for parameter in group["params"]])
        except ValueError as error:  # torch's word for a value out of its range
            raise UsageError(f"optimizer: {error}") from error
        loaded, self._loaded = self._loaded, None
        if loaded and "optimizer_states" in loaded and self.trainer.ckpt_path:  # else Lightning says what is missing
            _regroup(loaded, optimizer)
        total = self.total_steps
        if self.trainer.ckpt_path and self._done is not None and total < self._done["steps"]:
            done = f"{self._done['steps']:,} optimiser steps"
            raise UsageError(f"the run has done {done}, and only {total:,} are planned now: plan more epochs or steps")
        schedule = self.planned_schedule
        schedule(0, total)  # A schedule that cannot serve this run says so before it starts.
        scheduler = _Planned(optimizer, _ahead(schedule, total))
        self._configured = [{**group, "params": None} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Let what is configured now win over what a checkpoint brought, and move the learning rate at once."""
        total = self.total_steps
        before = self._horizon["now"] if self.trainer.ckpt_path else total
        self._horizon = {"first": self._horizon["first"] if self.trainer.ckpt_path else total, "now": total}
        if self.trainer.ckpt_path and (self._reconfigure() or before != total):
            self._move_to_horizon(before, total)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the horizon, and what is done."""
        checkpoint["horizon"] = self._horizon
        trainer = self.trainer
        checkpoint["done"] = {
            "steps": trainer.global_step,
            "epochs": trainer.fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
            "steps_an_epoch": trainer.estimated_stepping_batches / (trainer.max_epochs or math.inf),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the horizon that the run was planned with."""
        self._horizon = checkpoint["horizon"]
        self._done = checkpoint["done"]
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._loaded = checkpoint

    def _reconfigure(self) -> bool:
        """Give the optimiser its options of now, such as weight decay; tell whether the learning rate is another."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        for group, now in zip(scheduler.optimizer.param_groups, self._configured, strict=True):
            group.update({name: value for name, value in now.items() if name not in ("params", "lr", "initial_lr")})
        rates = [group["initial_lr"] for group in self._configured]
        changed = rates != scheduler.base_lrs
        scheduler.base_lrs = rates
        return changed

    def _move_to_horizon(self, before: float, total: float) -> None:
        """Set the learning rate of this step to what is planned now, which the scheduler does only from the next on."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        step = scheduler.last_epoch
        groups = scheduler.optimizer.param_groups
        old = groups[0]["lr"]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor(step)
        if self.trainer.is_global_zero and f"{old:.3g}" != f"{groups[0]['lr']:.3g}":
            plan = (
                f"the run was planned with {before:,} optimiser steps and now has {total:,}: "
                if before != total
                else ""
            )
            _log.warning(f"{plan}at step {step:,} the learning rate moves from {old:.3g} to {groups[0]['lr']:.3g}")


def _ahead(schedule: Schedule, total: float) -> Callable[[int], float]:
    """Return the factor of each step; a hundred at once are made in less time than each in the midst of its step.

    It is a plain function: LambdaLR would save the attributes of a callable object, and restore an old horizon.
    """
    known: dict[int, float] = {}

    def factor(step: int) -> float:
        if step not in known:
            known.clear()
            known.update(
                (each, schedule(each, total)) for each in range(step, int(max(step, min(step + 99, total))) + 1)
            )
        return known[step]

    return factor


class _Planned(LambdaLR):
    """LambdaLR without what torch 2.13 asks at each step: whether one calls it as one should."""

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of the next step."""
        if epoch is not None or isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            super().step(epoch)
            return
        self._step_count += 1
        self.last_epoch += 1
        self._last_lr: list[Any] = []
        for group, base, of in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * of(self.last_epoch)
            self._last_lr.append(group["lr"])


def _regroup(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Cut the parameters of a checkpoint into the groups of an optimiser, of which there are two only with decay."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    for state, schedule in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        saved = state["param_groups"]
        if len(saved) != len(sizes):
            indices = iter([index for group in saved for index in group["params"]])
            state["param_groups"] = [{**saved[0], "params": list(islice(indices, size))} for size in sizes]
            for name in ("base_lrs", "_last_lr", "lr_lambdas"):
                schedule[name] = schedule[name][:1] * len(sizes)
