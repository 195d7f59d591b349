"""Tell Optuna how a trial goes, and end the trial if others do better."""

import math
import time
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from firstlight.errors import UsageError, check_saved
from firstlight.tasks import Task

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

FACTOR, FIRST_RUNG = 3, 10
"""The best third of the trials continues after 10 %, 30 % and 90 % of its plan."""


class Pruning(Callback):
    """Report the monitored metric of each validation to a trial of Optuna, and end a fit that Optuna prunes.

    Trials are compared at the same share of their plan, in percent of its optimiser steps, because the learning rate
    follows the plan. Without a known plan, they are compared after the same number of validations. What is reported is
    the best value so far, which is that of `best.ckpt`. The first process asks Optuna and decides for all.

    Args:
        storage: Storage of the study: a URL of a data base, the path of a journal file, or an Optuna storage.
        study: Name of the study.
        trial: Number of the trial. One that has ended is not touched any more.
        monitor: Metric that the study compares.
        mode: Whether lower or higher values are better.
        deadline: End the fit after the first validation at which `time.time()` is later. None is no limit.

    Attributes:
        is_pruned: Whether the fit was ended.
        best: Best value so far; NaN without one.

    Raises:
        UsageError: At the start of the fit, if the storage has no such study or trial.
    """

    def __init__(
        self,
        storage: "str | BaseStorage",
        study: str,
        trial: int,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        deadline: float | None = None,
    ) -> None:
        self.storage, self.study, self.trial = storage, study, trial
        self.monitor, self.mode, self.deadline = monitor, mode, deadline
        self.is_pruned, self.best = False, math.nan
        self._validations = 0
        self._trial: Any = None
        self._reported: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint restores its own fit afterwards."""
        if stage == "fit":
            self.best, self._validations = math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen."""
        return {"best": self.best, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        check_saved("Pruning", state_dict, best=int | float, validations=int)
        self.best, self._validations = state_dict["best"], state_dict["validations"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the trial, and note its run directory in it."""
        self.is_pruned, self._trial = False, None
        if not trainer.is_global_zero:
            return
        from optuna.trial import Trial

        study = open_study(self.storage, self.study)
        found = next((each for each in study.get_trials(deepcopy=False) if each.number == self.trial), None)
        if found is None:
            raise UsageError(f"study {self.study} in {self.storage} has no trial {self.trial}")
        if not found.state.is_finished():
            self._trial, self._reported = Trial(study, found._trial_id), set(found.intermediate_values)
            self._trial.set_user_attr("run", str(trainer.default_root_dir))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric, and end the fit if it is worse than that of other trials."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        ends = False
        if trainer.is_global_zero and self._trial is not None:
            ends = self._report(trainer, pl_module)
        if trainer.world_size > 1:
            ends = trainer.strategy.broadcast(ends, 0)
        if ends:
            self.is_pruned = trainer.should_stop = True

    def _report(self, trainer: Trainer, module: LightningModule) -> bool:
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        better = min if self.mode == "min" else max
        self.best = value if math.isnan(self.best) else better(self.best, value)
        if math.isnan(value) and math.isnan(self.best):
            return True  # Nothing else can be better than no number.
        total = module.total_steps if isinstance(module, Task) else trainer.estimated_stepping_batches
        share = self._validations if not 0 < total < math.inf else int(100 * trainer.global_step / total)
        if share >= 100:
            return False
        if share not in self._reported:  # A trial that was killed and resumed has reported it.
            self._trial.report(self.best, share)
            self._reported.add(share)
        is_late = self.deadline is not None and time.time() > self.deadline
        return is_late or bool(self._trial.should_prune())


def open_study(storage: "str | BaseStorage", name: str) -> "Study":
    """Return a study, which prunes by successive halving (Li et al., 2020), or raise a `UsageError` without one."""
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=FIRST_RUNG, reduction_factor=FACTOR)
    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage), pruner=pruner)
    except KeyError as error:
        raise UsageError(f"{storage} has no study {name}") from error


def open_storage(storage: "str | BaseStorage") -> "BaseStorage":
    """Return an Optuna storage for the URL of a data base or the path of a journal file.

    Raises:
        UsageError: Without Optuna, or if the storage cannot be opened.
    """
    try:
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise UsageError(f"a search needs {error.name}: pip install 'firstlight[search]'") from error
    if not isinstance(storage, str):
        return storage
    try:
        if "://" in storage:
            return RDBStorage(storage)
        return JournalStorage(JournalFileBackend(storage))
    except Exception as error:  # SQLAlchemy and drivers raise many.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"the storage {storage} cannot be opened: {reason}") from error
