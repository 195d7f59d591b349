"""The optimiser and the learning-rate schedule of a task, and the number of steps that a run plans."""

import logging
import math
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from firstlight.errors import UsageError
from firstlight.schedules import Schedule

__all__ = ["Optimization"]

_log = logging.getLogger(__name__)


class Optimization:
    """Builds the optimiser and its scheduler, and plans the optimiser steps of a run.

    A resumed run may plan more or fewer steps than before. Its learning rate then moves once to the new plan, which is
    logged. The warm-up keeps the length that it had in the first plan.

    Args:
        build_optimizer: Builds an optimiser from parameter groups.
        schedule: Factor of the learning rate at each optimiser step.
    """

    def __init__(self, build_optimizer: OptimizerCallable, schedule: Schedule) -> None:
        self.build_optimizer = build_optimizer
        self.schedule = schedule
        self._first_total: float = 0
        self._total: float = 0
        self._saved: dict[str, Any] = {}
        self._groups: list[dict[str, Any]] = []

    def total_steps(self, trainer: Trainer) -> float:
        """Return the optimiser steps of the whole run, infinite if unknown."""
        planned = trainer.estimated_stepping_batches
        if planned < 0:
            return math.inf  # Lightning 2.6.6 returns -1 for an iterable without a length.
        epochs = trainer.max_epochs or -1
        if not trainer.ckpt_path or not self._saved or epochs < 0 or planned == trainer.max_steps:
            return planned
        saved = self._saved
        if planned / epochs == saved["steps_per_epoch"]:
            return planned
        # The length of an epoch has changed: epochs that are done keep their steps.
        return int(saved["steps"] + (epochs - saved["epochs"]) * planned / epochs)

    def planned_schedule(self, trainer: Trainer) -> Schedule:
        """Return the schedule of the run: a resumed run keeps its first warm-up."""
        first, total = self._saved.get("first_total"), self.total_steps(trainer)
        if not trainer.ckpt_path or first is None or first == total:
            return self.schedule
        return self.schedule.with_fixed_warmup(first)

    def configure(self, trainer: Trainer, groups: list[dict[str, Any]]) -> OptimizerLRScheduler:
        """Return the optimiser of the parameter groups, and a scheduler that Lightning steps with it.

        Raises:
            UsageError: When the optimiser refuses a value, when the schedule does not fit the run, or when a resumed
                run has done more steps than are planned.
        """
        try:
            optimizer = self.build_optimizer(groups)
            if len(groups) > 1 and not any(group.get("weight_decay") for group in optimizer.param_groups):
                # Nothing decays: with one group, a step of `tiny` takes 0.92 of the time.
                optimizer = self.build_optimizer([{"params": [p for group in groups for p in group["params"]]}])
            optimizer.register_load_state_dict_pre_hook(_fit_groups)
        except ValueError as error:  # torch raises it for a value outside its range.
            raise UsageError(f"optimizer: {error}") from error
        total = self.total_steps(trainer)
        if trainer.ckpt_path and self._saved and total < self._saved["steps"]:
            raise UsageError(
                f"the run has done {self._saved['steps']:,} optimiser steps, but only {total:,} are planned now: plan "
                "more epochs or steps"
            )
        schedule = self.planned_schedule(trainer)
        schedule(0, total)  # Raises now if the schedule does not fit the run.
        scheduler = _OneFactorLR(optimizer, lambda step: schedule(step, total))
        self._groups = [{**group, "params": None} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def start(self, trainer: Trainer) -> None:
        """Start training. In a resumed run, today's options replace those that the checkpoint restored."""
        total = self.total_steps(trainer)
        is_resumed = bool(trainer.ckpt_path and self._saved)
        before = self._saved["total"] if is_resumed else total
        self._first_total = self._saved["first_total"] if is_resumed else total
        self._total = total
        if is_resumed:
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            assert isinstance(scheduler, LambdaLR)
            old, new = self._restore_options(scheduler, before != total)
            if trainer.is_global_zero and f"{old:.3g}" != f"{new:.3g}":
                plan = f"the plan changes from {before:,} to {total:,} optimiser steps: " if before != total else ""
                _log.warning(
                    f"{plan}at step {scheduler.last_epoch:,} the learning rate moves from {old:.3g} to {new:.3g}"
                )

    def state_dict(self, trainer: Trainer) -> dict[str, float]:
        """Return the plan of the run, and the steps and epochs that are done."""
        return {
            "first_total": self._first_total,
            "total": self._total,
            "steps": trainer.global_step,
            "epochs": trainer.fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
            "steps_per_epoch": trainer.estimated_stepping_batches / (trainer.max_epochs or math.inf),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the plan of the run that is resumed."""
        self._saved = state

    def _restore_options(self, scheduler: LambdaLR, is_replanned: bool) -> tuple[float, float]:
        """Set the options that are configured now; return the learning rate before and after."""
        groups = scheduler.optimizer.param_groups
        old = float(groups[0]["lr"])
        for group, now in zip(groups, self._groups, strict=True):
            group.update({name: value for name, value in now.items() if name not in ("params", "lr", "initial_lr")})
        rates = [group["initial_lr"] for group in self._groups]
        if is_replanned or rates != scheduler.base_lrs:
            # The scheduler would set the new learning rate from the next step on only.
            scheduler.base_lrs = rates
            factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
            for group, rate in zip(groups, rates, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * factor
        return old, float(groups[0]["lr"])


def _fit_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state with the groups of `optimizer`: weight decay may have been turned on or off since.

    All groups list the parameters in one order, so a parameter keeps its index. `start` sets the options.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = state["param_groups"]
    indices = iter([index for group in saved for index in group["params"]])
    if len(saved) == len(sizes):
        return state
    groups = [{**saved[0], "params": list(islice(indices, size))} for size in sizes]
    return {**state, "param_groups": groups}


class _OneFactorLR(LambdaLR):
    """LambdaLR with one factor for all groups, which it computes once a step.

    torch's `step` computes it for each group, and checks at each step that it is called correctly: 20 Python calls
    instead of 6. The factor is a plain function, because LambdaLR saves the attributes of callable objects: it would
    restore the old plan of a resumed run.
    """

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of the next step."""
        if epoch is not None or isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            super().step(epoch)
            return
        self._step_count += 1
        self.last_epoch += 1
        factor = self.lr_lambdas[0](self.last_epoch)
        self._last_lr: list[Any] = []
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * factor
            self._last_lr.append(group["lr"])
