"""The optimiser and the learning-rate schedule of a task, and the number of steps that a run plans."""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from firstlight.errors import UsageError, check_saved, restoring
from firstlight.optim import build
from firstlight.schedules import Schedule
from firstlight.tasks.timed_schedule import TimedSchedule

_log = logging.getLogger(__name__)


def planned_steps(
    steps: int,
    epochs: int,
    batch: int,
    batches: float,
    max_epochs: int,
    max_steps: int,
    accumulated: Sequence[Sequence[int]],
) -> float:
    """Return the optimiser steps of a whole run, infinite if nothing ends it.

    Args:
        steps: Optimiser steps done.
        epochs: Epochs done.
        batch: Batches done in the epoch after these.
        batches: Batches of an epoch; infinite if unknown.
        max_epochs: Epochs of the run, -1 for no limit.
        max_steps: Optimiser steps of the run, -1 for no limit.
        accumulated: Pairs of an epoch and the batches that are accumulated for a step from that epoch on, sorted.

    >>> planned_steps(0, 0, 0, batches=40, max_epochs=4, max_steps=-1, accumulated=[(0, 1), (2, 4)])
    100
    """
    total: float = steps
    if max_epochs < 0 or math.isinf(batches):
        total = math.inf
    ends = [*(start for start, _ in accumulated[1:]), max_epochs]
    for (start, size), end in zip(accumulated, ends, strict=True):
        per_epoch = math.ceil(batches / size) if math.isfinite(total) else 0
        total += max(min(end, max_epochs) - max(start, epochs), 0) * per_epoch
        if start <= epochs < end:
            total -= batch // size if batch < batches else per_epoch
    return total if max_steps < 0 else min(total, max_steps)


def as_many_epochs(steps: int, before: int, after: int, accumulated: Sequence[Sequence[int]]) -> int:
    """Return the optimiser steps of as many epochs of `after` batches as `steps` are with epochs of `before` batches.

    Args:
        steps: At least 0.
        before: Batches of an epoch, at least 1.
        after: Batches of an epoch, at least 1.
        accumulated: As in `planned_steps`.

    >>> as_many_epochs(50, before=40, after=48, accumulated=[(0, 1), (1, 4)])
    60
    """
    total = epoch = 0
    while True:
        size = next(size for start, size in reversed(accumulated) if start <= epoch)
        planned = math.ceil(before / size)
        if steps <= planned:
            return total + round(math.ceil(after / size) * steps / planned)
        total, steps, epoch = total + math.ceil(after / size), steps - planned, epoch + 1


class Optimization:
    """Builds the optimiser and its scheduler, and plans the optimiser steps of a run.

    The plan is made again when training starts and at each epoch, because callbacks may change what it depends on. If
    the plan changes, also when a run is resumed, the learning rate moves once to the new plan, which is logged. The
    warm-up keeps the length that it had in the first plan.

    Args:
        build_optimizer: Builds an optimiser from parameters or parameter groups.
        schedule: Factor of the learning rate at each optimiser step.
    """

    def __init__(self, build_optimizer: OptimizerCallable, schedule: Schedule) -> None:
        self.build_optimizer = build_optimizer
        self.schedule = schedule
        self._first_total: float = 0
        self._total: float = 0
        self._configured: list[Any] = []
        self._limits: list[Any] = []
        self._origin = (0, 0, 0)
        self._saved: dict[str, Any] = {}
        self._groups: list[dict[str, Any]] = []
        self._found: dict[str, list[float]] = {}
        self.is_timed = False
        self.timed: TimedSchedule | None = None

    def total_steps(self, trainer: Trainer) -> float:
        """Return the optimiser steps of the whole run, infinite if unknown; at most these if something stops it."""
        return self.timed.end if self.timed else self.limit(trainer)

    def limit(self, trainer: Trainer) -> float:
        """Return the optimiser steps after which epochs or steps end the run, infinite if nothing does."""
        origin, limits, saved = self._origin, _limits(trainer), self._resumed(trainer)
        if saved and origin == (0, 0, 0):
            if limits == saved["configured"]:
                return saved["total"]  # type: ignore[no-any-return]
            origin = (saved["steps"], saved["epochs"], saved["batches"])  # What is done keeps its steps.
        return planned_steps(*origin, *limits)

    def has_schedule(self, trainer: Trainer) -> bool:
        """Return whether the schedule decides the learning rate: nothing has replaced it."""
        return _scheduler(trainer) is not None

    def planned_schedule(self, trainer: Trainer) -> Schedule:
        """Return the schedule of the run: a plan that changes keeps its first warm-up."""
        if self.timed:
            return self.timed.schedule
        first, total = self._resumed(trainer).get("first_total", self._first_total), self.limit(trainer)
        return self.schedule.with_fixed_warmup(first) if first and first != total else self.schedule

    def configure(self, trainer: Trainer, module: nn.Module) -> OptimizerLRScheduler:
        """Return the optimiser of the trainable parameters, and a scheduler that Lightning steps with it.

        Raises:
            UsageError: When optimiser or schedule do not fit the run, or when a resumed run has done more steps than
                are planned.
        """
        self._origin, self._first_total, self._configured, self.timed = (0, 0, 0), 0, [], None
        optimizer = build(self.build_optimizer, module)
        if isinstance(optimizer, LBFGS) and accumulated_batches(trainer) != [[0, 1]]:
            # Lightning 2.6.6 computes only the last batch of the step again for each evaluation.
            raise UsageError(
                "LBFGS evaluates batches several times and cannot accumulate: set accumulate_grad_batches=1"
            )
        optimizer.register_load_state_dict_pre_hook(_fit_groups)
        total, saved, limits = self.limit(trainer), self._resumed(trainer), _limits(trainer)
        if saved and (total < saved["steps"] or 0 <= limits[1] < saved["epochs"]):
            raise UsageError(
                f"the run has done {saved['steps']:,} optimiser steps, but only {planned_steps(0, 0, 0, *limits):,} "
                "are planned now: plan more epochs or steps"
            )
        if self.is_timed:
            self.timed = self._timed(saved, total)
        scheduler = _OneFactorLR(optimizer, self._factor(trainer, total))
        self._groups = [{**group, "params": None} for group in optimizer.param_groups]
        parameters = dict(module.named_parameters())
        for names in saved.get("added", []):  # By a callback, which may add them at a later epoch only.
            with restoring("a parameter group"):
                added = [parameters[name].requires_grad_() for name in names]
                optimizer.add_param_group({"params": added})
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def peak(self) -> float:
        """The configured peak learning rate of the first parameter group."""
        return float(self._groups[0]["initial_lr"])

    def start(self, trainer: Trainer) -> None:
        """Start training. In a resumed run, today's options replace those that the checkpoint restored."""
        total, saved, scheduler = self.limit(trainer), self._resumed(trainer), _scheduler(trainer)
        before = saved.get("total", self._total if scheduler else total)
        if timed := saved.get("timed") or (self.timed and self.timed.state_dict()):
            before = TimedSchedule(self.schedule, **timed).end
        self._first_total, self._total, self._found = saved.get("first_total", total), total, saved.get("found", {})
        self._configured = self._limits = _limits(trainer)
        if saved and saved["configured"] == self._configured:
            self._limits = saved["limits"]
        if scheduler is None:
            return  # The task or a callback has another optimiser or schedule.
        groups = scheduler.optimizer.param_groups
        rates: list[Any] = [group["initial_lr"] for group in self._groups]
        if saved:
            if len(groups) != len(rates) + len(saved["added"]):
                raise UsageError("weight decay cannot be turned on or off: a callback has added parameter groups")
            kept = ("params", "lr", "initial_lr")
            configured = saved["groups"] if len(saved["groups"]) == len(rates) else [{}] * len(rates)
            for group, options, known in zip(groups, self._groups, configured, strict=False):
                # Options that a callback changed stay as the checkpoint has them, unless their configuration changed.
                for name, value in options.items():
                    if name not in kept and (name not in known or known[name] != value):
                        group[name] = value
            if self._found.get("configured") == rates:
                rates = self._found["rates"]
        else:
            now = [group["lr"] for group in groups[: len(rates)]]
            if now != scheduler.get_last_lr()[: len(rates)]:  # A callback has set the peak, as LearningRateFinder does.
                self._found = {"configured": rates, "rates": now}
                if trainer.is_global_zero:
                    _log.warning(f"a callback has set the peak learning rate to {now[0]:.3g}; it was {rates[0]:.3g}")
                for group, rate in zip(groups, now, strict=False):
                    group["lr"] = rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
                rates = now
        self._follow(trainer, scheduler, before, rates)

    def start_epoch(self, trainer: Trainer) -> None:
        """Plan again if a callback or a reloaded data loader has changed the number of steps of an epoch.

        Raises:
            UsageError: When a callback has added parameters whose gradients the processes would not share.
        """
        if trainer.fit_loop._skip_backward:
            # Lightning 2.6.6 steps once with the last gradient, after StochasticWeightAveraging has set the average.
            for parameter in trainer.lightning_module.parameters():
                parameter.grad = None
        scheduler, limits = _scheduler(trainer), _limits(trainer)
        is_added = scheduler is not None and len(scheduler.optimizer.param_groups) > len(self._groups)
        if is_added and isinstance(trainer.strategy.model, DistributedDataParallel):
            raise UsageError(
                "a callback added parameters to the optimiser, but DistributedDataParallel averages the gradients of "
                "the parameters that were trainable at the start only: train on one process"
            )
        if scheduler is None or limits == self._limits:
            return
        before, self._limits = self._total, limits
        self._origin = (trainer.global_step, trainer.current_epoch, 0)
        if self.timed:
            return  # It is planned again as the run goes.
        self._total = self.total_steps(trainer)
        self._follow(trainer, scheduler, before, scheduler.base_lrs)

    def plan_end(self, trainer: Trainer, left: int) -> None:
        """Let the schedule of a timed run end after `left` more optimiser steps. The rate moves only if it had ended.

        Raises:
            UsageError: When the warm-up is not shorter than the run.
        """
        if self.timed is not None:
            self.timed.plan(trainer.global_step, left)

    def state_dict(self, trainer: Trainer, module: nn.Module) -> dict[str, Any]:
        """Return the plan of the run, and the steps, epochs and batches that are done."""
        loop: Any = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        most = self._limits[1] if self._limits else -1
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        scheduler = _scheduler(trainer)
        added = scheduler.optimizer.param_groups[len(self._groups) :] if scheduler else []
        return {
            "first_total": 0 if self.timed else self._first_total,
            "total": self._total,
            "timed": self.timed.state_dict() if self.timed else {},
            "configured": self._configured,
            "limits": self._limits,
            "steps": trainer.global_step,
            "epochs": epochs.processed if most < 0 else min(epochs.processed, most),
            "batches": batches.ready if epochs.ready > epochs.processed else 0,
            "found": self._found,
            "groups": self._groups,
            "added": [[names[id(each)] for each in group["params"]] for group in added],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the plan of the run that is resumed, or refuse a damaged one."""
        if state.get("configured"):
            names = ("steps", "epochs", "batches")
            check_saved("the plan", state, configured=list, limits=list, found=dict, added=list, timed=dict)
            check_saved("the plan", state, first_total=int | float, total=int | float, **dict.fromkeys(names, int))
            if state["found"]:
                check_saved("the plan", state["found"], configured=list, rates=list)
            if state["timed"]:
                TimedSchedule.check_state(state["timed"])
            for each in tree_leaves([state["configured"], state["limits"], state["found"]]):
                check_saved("the plan", {"an entry": each}, **{"an entry": int | float | Tensor})
                if isinstance(each, Tensor) and each.ndim:
                    raise UsageError("the checkpoint is damaged: an entry of the plan is a tensor with an axis")
        self._saved = state

    def _resumed(self, trainer: Trainer) -> dict[str, Any]:
        """Return the plan of the checkpoint, empty if the run does not resume a training that had started.

        Lightning's LearningRateFinder saves and restores a checkpoint before training starts.
        """
        return self._saved if trainer.ckpt_path and self._saved.get("configured") else {}

    def _timed(self, saved: dict[str, Any], limit: float) -> TimedSchedule:
        """Return the schedule of a run with a time limit, where the checkpoint left it."""
        if saved.get("timed"):
            return TimedSchedule(self.schedule, **saved["timed"])
        if saved:  # The run had no time limit before.
            return TimedSchedule(self.schedule, saved["total"], saved["steps"], saved["steps"])
        return TimedSchedule(self.schedule, limit)

    def _factor(self, trainer: Trainer, total: float) -> Callable[[int], float]:
        """Return the schedule of a plan as a plain function.

        LambdaLR saves the attributes of callable objects: it would restore the old plan of a resumed run.
        """
        if timed := self.timed:
            timed.factor(0)
            return lambda step: timed.factor(step)
        schedule = self.planned_schedule(trainer)
        schedule(0, total)  # Raises now if the schedule does not fit the run.
        self._total = total
        return lambda step: schedule(step, total)

    def _follow(self, trainer: Trainer, scheduler: "_OneFactorLR", before: float, rates: list[Any]) -> None:
        """Let the scheduler follow the present plan and peak rates; log a change of the plan or the rate."""
        groups, step = scheduler.optimizer.param_groups, scheduler.last_epoch
        total = self.timed.end if self.timed else self._total
        if before == total and rates == scheduler.base_lrs:
            return
        old = float(groups[0]["lr"])
        scheduler.lr_lambdas, scheduler.base_lrs = [self._factor(trainer, total)] * len(rates), rates
        # The scheduler would set the new learning rate from the next step on only.
        factor = scheduler.lr_lambdas[0](step)
        for group, rate in zip(groups, rates, strict=False):
            group["initial_lr"], group["lr"] = rate, rate * factor
        new = float(groups[0]["lr"])
        for group in groups[len(rates) :]:
            group["lr"] = group["initial_lr"] * factor if "initial_lr" in group else group["lr"]
        if trainer.is_global_zero and f"{old:.3g}" != f"{new:.3g}":
            plan = f"the plan changes from {before:,} to {total:,} optimiser steps: " if before != total else ""
            _log.warning(f"{plan}at step {step:,} the learning rate moves from {old:.3g} to {new:.3g}")


def _limits(trainer: Trainer) -> list[Any]:
    """Return what determines the steps of a run: batches of an epoch, epochs, steps, and accumulated batches."""
    trainer.estimated_stepping_batches  # noqa: B018  # Lightning loads the training data, if it must.
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside the class
        if isinstance(callback, StochasticWeightAveraging):
            # Lightning 2.6.6 adds an epoch without a step, for the statistics of batch normalisation.
            epochs = min(epochs, getattr(callback, "_max_epochs", epochs))
    return [trainer.num_training_batches, epochs, trainer.max_steps, accumulated_batches(trainer)]


def accumulated_batches(trainer: Trainer) -> list[list[int]]:
    """Return pairs of an epoch and the batches that are accumulated for one step from that epoch on."""
    for callback in reversed(trainer.callbacks):  # type: ignore[attr-defined]  # set outside the class
        if isinstance(callback, GradientAccumulationScheduler):
            return sorted(map(list, callback.scheduling.items()))
    return [[0, trainer.accumulate_grad_batches]]


def _scheduler(trainer: Trainer) -> "_OneFactorLR | None":
    """Return the scheduler of the task, unless the task or a callback has replaced it."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return next((each for each in schedulers if isinstance(each, _OneFactorLR)), None)


def _fit_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state with the groups of `optimizer`: weight decay may have been turned on or off since.

    All groups list the parameters in one order, so a parameter keeps its index. `start` sets the options.

    Raises:
        UsageError: When the optimiser had another number of parameters.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [(index, group) for group in state["param_groups"] for index in group["params"]]
    if len(saved) != sum(sizes):
        raise UsageError(
            f"cannot resume: the optimiser has {sum(sizes)} parameters, but the checkpoint has {len(saved)}: freeze "
            "the same parameters as in the saved run"
        )
    entries = iter(saved)
    groups = []
    for size in sizes:
        indices, options = zip(*islice(entries, size), strict=True)
        groups.append({**options[0], "params": list(indices)})
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
        factor, groups = self.lr_lambdas[0](self.last_epoch), self.optimizer.param_groups
        self._last_lr: list[Any] = [rate * factor for rate in self.base_lrs]
        if len(groups) > len(self._last_lr):
            self._last_lr += self._added_rates()
        for group, rate in zip(groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """Return the learning rates of all groups."""
        return [*super().get_lr(), *self._added_rates()]

    def _added_rates(self) -> list[Any]:
        """Return the rates of the groups that a callback has added: they follow the schedule from the rate it set."""
        before, now = (self.lr_lambdas[0](step) for step in (self.last_epoch - 1, self.last_epoch))
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        for group in added:
            if before and group["lr"] != group.get("initial_lr", math.nan) * before:  # It is new, or has changed.
                group["initial_lr"] = group["lr"] / before
        return [group["initial_lr"] * now if "initial_lr" in group else group["lr"] for group in added]
