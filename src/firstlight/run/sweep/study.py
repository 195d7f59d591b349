"""A study: trials in a storage that processes and machines share, and which process works on which trial."""

import json
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from firstlight.callbacks.pruning import open_storage, open_study
from firstlight.errors import UsageError
from firstlight.run.sweep.space import Space, draw, own_values

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

JOURNAL = "study.journal"
_UNCLAIMED = 60.0
"""Seconds after which a trial without a worker was left by a process that ended before it could write its name."""

State = Literal["complete", "pruned", "failed"]


class Study:
    """A study of Optuna in the folder of a sweep, and this process as one of its workers.

    A worker locks a file as long as it lives, and each of its trials holds the name of that file. So another worker
    that finds the file unlocked knows that the trial was killed, and resumes it.

    Args:
        folder: Folder of the sweep.
        storage: Storage of the study, see `callbacks.Pruning`; None: a journal file in the folder.
        mode: Whether lower or higher values are better.
        asked: What the sweep searches: plain values, which must be the same whenever it is continued.
        seed: Seed of the first trials.

    Raises:
        UsageError: Without Optuna, if the storage fails, or if the study searches something else.
    """

    def __init__(
        self, folder: Path, storage: str | None, mode: Literal["min", "max"], asked: Mapping[str, Any], seed: int
    ) -> None:
        self.folder, self.name, self.mode = folder, folder.name, mode
        self.storage = storage or str(folder / JOURNAL)
        self._workers = folder / "workers"
        self._workers.mkdir(parents=True, exist_ok=True)
        self.worker = uuid.uuid4().hex
        self._lock = FileLock(self._workers / f"{self.worker}.lock")
        self._lock.acquire()
        try:
            self._open(asked, seed)
        except BaseException:
            self._discard()
            raise

    def _open(self, asked: Mapping[str, Any], seed: int) -> None:
        opened = open_storage(self.storage)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._alone():
            direction: Literal["minimize", "maximize"] = "minimize" if self.mode == "min" else "maximize"
            created = optuna.create_study(
                study_name=self.name, storage=opened, direction=direction, load_if_exists=True
            )
            text = json.dumps(asked, sort_keys=True, default=str)
            if created.user_attrs.get("asked", text) != text:
                before = json.loads(created.user_attrs["asked"])
                changed = next((key for key in {**before, **asked} if before.get(key) != json.loads(text).get(key)), "")
                raise UsageError(
                    f"{self.folder} holds a sweep with another {changed}: give --experiment NAME to start a new one"
                )
            created.set_user_attr("asked", text)
        self._study = open_study(opened, self.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # Of `group` in Optuna 5.0.
            self._study.sampler = optuna.samplers.TPESampler(
                multivariate=True, group=True, constant_liar=True, seed=seed + len(self.trials)
            )

    def _discard(self) -> None:
        """Leave nothing of a sweep that is refused: neither its lock, nor folders that hold nothing else."""
        self._lock.release()
        (self._workers / f"{self.worker}.lock").unlink(missing_ok=True)
        with suppress(OSError):
            for folder in (self._workers, self.folder, self.folder.parent):
                folder.rmdir()

    @property
    def trials(self) -> "list[FrozenTrial]":
        """All trials, in the order of their numbers."""
        found: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return found

    @property
    def best(self) -> "FrozenTrial | None":
        """The best complete trial."""
        with suppress(ValueError):
            return self._study.best_trial
        return None

    def next(self, space: Space, own: Mapping[str, Any], count: int) -> "tuple[Trial, dict[str, Any]] | None":
        """Return a trial that was killed, or a new one, with its values; None when `count` trials are given out.

        Args:
            space: What new values are drawn from.
            own: Values of the configuration by option, for the first trial. If one of them is outside the space, Optuna
                learns nothing from that trial.
            count: Largest number of trials.
        """
        from optuna.trial import Trial, TrialState

        stored = own_values(space, own)
        with self._alone():
            running = [each for each in self.trials if each.state == TrialState.RUNNING]
            killed = next((each for each in running if self._was_killed(each)), None)
            if killed is not None:
                trial = Trial(self._study, killed._trial_id)
            elif len(self.trials) < count:
                if not self.trials and stored is not None:
                    self._study.enqueue_trial(stored)
                trial = self._study.ask()
            else:
                return None
            trial.set_user_attr("worker", self.worker)
            if trial.number == 0 and stored is None:
                return trial, {name: own[name] for name in space if name in own}
            return trial, draw(space, trial)

    def end(self, number: int, state: State, notes: Mapping[str, Any]) -> None:
        """Note how a trial has ended; `notes` holds its `value`, if it is complete."""
        from optuna.trial import Trial, TrialState

        trial = Trial(self._study, self.trials[number]._trial_id)
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(number, notes["value"] if state == "complete" else None, states[state])

    def close(self) -> None:
        """Leave the study: others may resume what this process has not ended."""
        self._lock.release()
        if not any(
            each.user_attrs.get("worker") == self.worker and not each.state.is_finished() for each in self.trials
        ):
            (self._workers / f"{self.worker}.lock").unlink(missing_ok=True)

    def importance(self) -> dict[str, float]:
        """Return how much each parameter explains of the values, by PED-ANOVA (Watanabe et al., 2023)."""
        import optuna

        # Few trials have no importance; Optuna warns of it, too.
        with suppress(ValueError, RuntimeError, ZeroDivisionError, UserWarning), warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))
        return {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.folder / ".lock"):
            yield

    def _was_killed(self, trial: "FrozenTrial") -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:
            return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() > _UNCLAIMED
        if worker == self.worker:
            return False
        path = self._workers / f"{worker}.lock"
        try:  # A worker without a file here works on another machine.
            return path.is_file() and bool(FileLock(path).acquire(timeout=0))
        except Timeout:
            return False
