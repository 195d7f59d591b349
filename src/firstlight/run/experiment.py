"""One experiment: a task, its data and the options of its trainer. `fit` trains it in a run directory."""

import math
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LambdaCallback, LearningRateFinder, ProgressBar
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from firstlight.callbacks import FinalCheckpoint, GracefulShutdown, defaults
from firstlight.callbacks.defaults import DEFAULTS, MONITORING, Monitored
from firstlight.callbacks.graceful_shutdown import interruptible
from firstlight.callbacks.gradient_norm import let_sharded_gradients_clip
from firstlight.callbacks.progress import metrics_of_line
from firstlight.callbacks.time_limit import TimeLimit, parse_time
from firstlight.checkpoints.io import (
    AtomicCheckpointIO,
    first_index,
    newest_resumable,
    raise_fault,
    read_checkpoint_metrics,
    remove_leftovers,
)
from firstlight.compat import let_fused_optimisers_clip, skip_nvml_check
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError
from firstlight.fast_loop import fast_loop
from firstlight.loggers import all_loggers, as_list, steps_done
from firstlight.preflight import report, rules
from firstlight.preflight.probe import probe_splits
from firstlight.run import console, directory
from firstlight.run.ending import caveat, find_ending, limit, missed_average
from firstlight.run.resume import config_diff, refuse_inexact
from firstlight.tasks import Task
from firstlight.tasks.notices import repeated_samples


@dataclass
class Experiment:
    """A task, its data, and the options that trainers and callbacks are made from.

    Args:
        task: A task, or any other LightningModule.
        datamodule: Its data.
        options: Arguments of `Trainer`.
        groups: Arguments of the default callbacks, by name of the callback.
        disable: Names of default callbacks that are left out.
        experiment_dir: Folder of the experiment's runs.
        config: Text of `config.yaml`.
        run_dir: The run to resume or to evaluate; `None` for a new one.
        allow_inexact: Resume a run even if it will not end with the bits of an uninterrupted one.
        monitored: The metric that decides what is best; `None` if it is unknown.
        verb: The command that resumes the run, for messages.
        time_limit: The time that the run may take, for example `1h30m`; `None` is no limit.
        started: Time at which the command started, from `time.monotonic`.
    """

    task: LightningModule
    datamodule: LightningDataModule
    options: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    disable: set[str]
    experiment_dir: Path
    config: str
    run_dir: Path | None = None
    allow_inexact: bool = False
    monitored: Monitored | None = None
    verb: str = "fit"
    time_limit: str | None = None
    started: float = field(default_factory=time.monotonic)
    _trained: bool = field(default=False, init=False)

    @property
    def own_callbacks(self) -> list[Callback]:
        """The callbacks that the user has given to the trainer."""
        return as_list(self.options["callbacks"])

    def trainer(self, **changes: Any) -> Trainer:
        """Return a trainer; `changes` replace options."""
        if root := self.options["default_root_dir"]:
            raise UsageError(f"trainer.default_root_dir={root} is not used: --runs DIR is the folder of all runs")
        plugins = as_list(self.options["plugins"]) + ([] if self._has_own_io() else [AtomicCheckpointIO()])
        try:
            trainer = Trainer(**{**self.options, **changes, "plugins": plugins})
        except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:  # A strategy may need a package.
            raise UsageError(f"trainer: {error}") from error
        return let_sharded_gradients_clip(let_fused_optimisers_clip(trainer))

    def callbacks(self, folder: Path) -> list[Callback]:
        """Return the callbacks of a fit in the run directory `folder`: the user's and the default ones."""
        groups = {**self.groups, "random_state": {"allow_inexact": self.allow_inexact}}
        default = defaults(self.monitored, folder / "checkpoints", self.disable, **groups)
        rules.refuse_collisions(self.own_callbacks, default)
        limit = (
            []
            if self.time_limit is None
            else [TimeLimit(parse_time(self.time_limit), self.started, self.verb == "run")]
        )
        return [*self.own_callbacks, *limit, *default]

    def check(self) -> list[report.Result]:
        """Return what is right and wrong with a fit, without training."""
        self._check_time()
        return report.check(self, self.run_dir or self.experiment_dir)

    def fit(self) -> dict[str, Any] | None:
        """Train in a new run directory, or resume `run_dir`.

        A run that is refused before its first step leaves no directory.

        Returns:
            The content of `results.json` on the first process, if there is something new to write.

        Raises:
            UsageError: When the run is refused.
            TrainingError: When another process failed.
        """
        is_first = is_first_process()
        rules.refuse_options(self.options)
        self._check_time()
        probe_splits(self.task, self.datamodule)
        checkpoint = None if self.run_dir is None else self._resume(self.run_dir)
        if is_first:
            rules.refuse_no_room(self.task, self.disable, self.run_dir or self.experiment_dir)
        if self.run_dir is None:
            self.run_dir = self.experiment_dir  # Lightning gives the folder of the first process to the others.
            if is_first:
                self.run_dir = directory.create(self.experiment_dir.parent, self.experiment_dir.name)
        try:
            with directory.lock(self.run_dir) if is_first else nullcontext():
                if is_first:
                    remove_leftovers(self.run_dir / "checkpoints")
                return self._train(self.run_dir, checkpoint)
        except UsageError:
            if is_first and checkpoint is None and not self._trained:
                directory.discard(self.run_dir)
            raise

    def refit(self, folder: Path, steps: int) -> None:
        """Train on the training and validation samples together, from new weights, and write `refit.ckpt`.

        Args:
            folder: The run directory of the fit that found the steps.
            steps: Optimiser steps.

        Raises:
            UsageError: When the samples cannot be joined or trained on.
        """
        if not isinstance(self.datamodule, DataModule):
            raise UsageError(
                f"{type(self.datamodule).__name__} cannot join its splits: it is no firstlight.data module"
            )
        if torch.distributed.is_initialized():
            raise UsageError("it needs a run of one process")
        if not self.task.automatic_optimization:
            raise UsageError("the best step of a run with manual optimisation counts batches, not optimiser steps")
        self.datamodule.joins_validation = True
        kept = [name for name in ("nonfinite", "progress") if name not in self.disable]
        default = [DEFAULTS[name](**self.groups.get(name, {})) for name in kept]
        own = [each for each in self.own_callbacks if not isinstance(each, EarlyStopping | Checkpoint)]
        start = LambdaCallback(on_train_start=lambda trainer, _: rules.refuse_single_samples(trainer))
        trainer = self.trainer(
            default_root_dir=folder,
            logger=False,
            callbacks=[*own, *default, start],
            max_steps=steps,
            max_epochs=-1,
            min_epochs=None,
            min_steps=None,
            max_time=None,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in [*own, *default]),
        )
        again = f"firstlight {self.verb} --run {folder}"
        with (
            directory.lock(folder),
            interruptible(trainer, lambda: f"interrupted; train on all samples again with: {again}"),
            _ignored_warnings(resumes=True),
            fast_loop(trainer),
        ):
            trainer.fit(self.task, datamodule=self.datamodule)
            trainer.save_checkpoint(folder / "checkpoints" / "refit.ckpt")
        print(f"refit  {len(self.datamodule.rows('train')):,} training and validation samples, {steps:,} steps")

    def write_results(self, results: dict[str, Any]) -> None:
        """Write `results.json` of the run that was just trained, and print where the run is."""
        assert self.run_dir is not None
        results["seconds"] = round(time.monotonic() - self.started, 1)
        directory.write_results(self.run_dir, results)
        print(f"run    {self.run_dir}")
        if any(self.run_dir.glob("events.out.tfevents.*")):
            print(f"look   tensorboard --logdir {self.run_dir.parent}")

    def _check_time(self) -> None:
        """Refuse a time limit that cannot be, and tell a task of it."""
        if self.time_limit is not None:
            parse_time(self.time_limit)
            rules.refuse_other_limits(self.options, self.own_callbacks)
            if isinstance(self.task, Task):
                self.task.optimization.is_timed = True

    def _has_own_io(self) -> bool:
        return any(isinstance(each, CheckpointIO) for each in as_list(self.options["plugins"]))

    def _resume(self, run: Path) -> Path:
        """Return the checkpoint that a run resumes from, after a comparison of its saved config with the new one."""
        checkpoint = directory.checkpoint(run, "last")
        diff = config_diff(yaml.safe_load(directory.read_config(run)), yaml.safe_load(self.config))
        is_exact = refuse_inexact(diff, self.allow_inexact)
        if isinstance(self.datamodule, DataModule) and not is_exact:
            self.datamodule.resume_exactly = False
        if is_first_process():
            for option, (before, now) in diff.items():
                print(f"change {option}: {before} -> {now}")
        # A CheckpointIO of the user may not write zip files, so its files are not verified.
        return checkpoint if self._has_own_io() else newest_resumable(checkpoint)

    def _train(self, folder: Path, checkpoint: Path | None) -> dict[str, Any] | None:
        every = self.callbacks(folder)
        if checkpoint is not None:  # It holds the rate that was found.
            every = [each for each in every if not isinstance(each, LearningRateFinder)]
        step = None if checkpoint is None else first_index(checkpoint)
        shutdown = next((each for each in every if isinstance(each, GracefulShutdown)), None)
        start = LambdaCallback(
            on_sanity_check_end=lambda trainer, _: rules.refuse_unknown_monitors(trainer, every),
            on_train_start=lambda trainer, _: self._start(trainer, every, folder, loop.reason),
        )
        final = FinalCheckpoint(folder / "checkpoints", self.own_callbacks)
        trainer = self.trainer(
            default_root_dir=folder,
            logger=all_loggers(folder, self.options["logger"], step),
            callbacks=[*([] if {"best", "last"} <= self.disable else [final]), *every, start],
            # Otherwise Lightning adds its own in place of a default callback that is left out.
            enable_checkpointing=any(isinstance(each, Checkpoint) for each in every),
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in every),
        )
        rules.refuse_sizes(self.datamodule, trainer)
        skip_nvml_check()
        if step is not None and is_first_process():
            print(console.resumed(folder, step, directory.logged_steps(folder)))
        try:
            with (
                interruptible(trainer, lambda: self._interrupted(trainer, folder)),
                _ignored_warnings(resumes=checkpoint is not None),
                fast_loop(trainer, handles_signals=shutdown is not None) as loop,
            ):
                trainer.fit(self.task, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise UsageError(f"trainer: {error}") from error
        except Exception as error:
            if isinstance(error, RuntimeError) and shutdown and shutdown.failed_rank:
                raise TrainingError(f"{shutdown.failed_rank}\n{self._interrupted(trainer, folder)}") from error
            if _is_from_pickling(error):
                raise UsageError(
                    "num_workers needs data that Python can send to a new process, because multiprocessing forks none "
                    f"here ({error}): define it at the top of a module, or use num_workers=0"
                ) from error
            raise_fault(error, checkpoint)
        if not self._trained:
            rules.refuse_no_batches(trainer)
        if not trainer.is_global_zero:
            return None
        ending = find_ending(trainer, trainer.callbacks, self.own_callbacks)  # type: ignore[attr-defined]
        if not self._trained:
            cause, advice = (ending.cause, ending.advice) if ending else ("", f"increase {limit(trainer)}")
            print(console.nothing_to_do(steps_done(trainer), cause, advice))
            if (folder / "results.json").is_file():
                return None
        return self._results(trainer, folder, ending.cause if ending else "") | {"fast_loop": loop.reason or True}

    def _start(self, trainer: Trainer, every: Sequence[Callback], folder: Path, slow: str | None) -> None:
        """Before the first step, write `config.yaml`, and print the data, the plan and why the fast loop is off."""
        rules.refuse_no_validation(trainer, every)
        rules.refuse_single_samples(trainer)
        if trainer.should_stop:
            return  # The resumed run had stopped early.
        if trainer.is_global_zero:
            directory.write_config(folder, self.config)
            (folder / "checkpoints" / "refit.ckpt").unlink(missing_ok=True)  # Of an earlier best checkpoint.
        self._trained = True
        if not trainer.is_global_zero:
            return
        if isinstance(self.datamodule, DataModule):
            sizes = {str(split): len(rows) for split, rows in self.datamodule.indices.items()}
            print(console.data(sizes, self.datamodule.dropped, self.datamodule.split_note))
            if trainer.ckpt_path is None:  # A resumed run has said it.
                for line in console.findings(self.datamodule.findings()):
                    print(line)
        total = self._planned(trainer)
        trainable = sum(parameter.numel() for parameter in self.task.parameters() if parameter.requires_grad)
        note = caveat(trainer.callbacks, self.own_callbacks)  # type: ignore[attr-defined]
        if self.time_limit is None:
            warmup = self.task.warmup_steps if isinstance(self.task, Task) else None
            print(console.plan(trainable, total, warmup, note), flush=True)
        else:
            limit = self.task.optimization.limit(trainer) if isinstance(self.task, Task) else total
            print(console.timed_plan(trainable, self.time_limit, limit) + note, flush=True)
            if not (isinstance(self.task, Task) and self.task.optimization.has_schedule(trainer)):
                name = type(self.task).__name__
                print(f"time   {name} has a schedule of its own: the time stops the run, and plans no schedule")
        if note := rules.long_accumulation(trainer):
            print(f"steps  {note}", flush=True)
        repeated = repeated_samples("val", trainer.val_dataloaders, trainer.world_size)
        if repeated and not isinstance(self.task, Task):  # A task says it.
            print(f"val    {repeated}", flush=True)
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if trainer.loggers and not 0 < log_every <= total:
            option = f"--trainer.log_every_n_steps is {log_every:,}"
            print(f"log    no training metrics: {option}, the run has {total:,} steps", flush=True)
        if self.monitored is None and (off := [name for name in MONITORING if name not in self.disable]):
            module = type(self.task).__name__
            print(f"best   {', '.join(off)} are off: {module} declares no monitor, give --monitor NAME and --mode")
        if slow:
            print(f"loop   the fast loop is off, so steps take longer: {slow}", flush=True)

    def _planned(self, trainer: Trainer) -> float:
        """Return how many steps are planned, infinite if unknown. With manual optimisation they are batches."""
        if isinstance(self.task, Task):
            return self.task.total_steps
        planned = trainer.estimated_stepping_batches
        return math.inf if planned < 0 else planned

    def _interrupted(self, trainer: Trainer, folder: Path) -> str:
        kept = sorted(file.name for file in (folder / "checkpoints").glob("*.ckpt"))
        can_resume = "last" not in self.disable and "last.ckpt" in kept
        resume = f"firstlight {self.verb} --run {folder}" if can_resume else None
        return console.interrupted(steps_done(trainer), kept, resume)

    def _results(self, trainer: Trainer, folder: Path, cause: str) -> dict[str, Any]:
        """Return the content of `results.json`, and print it."""
        best = folder / "checkpoints" / "best.ckpt"
        steps = steps_done(trainer)
        print(console.fitted(trainer.current_epoch, steps, self._planned(trainer), cause))
        if missed := missed_average(trainer, trainer.callbacks):  # type: ignore[attr-defined]
            print(missed)
        results: dict[str, Any] = {"metrics": {}, "best": {}, "steps": steps}
        if isinstance(self.datamodule, DataModule):
            results["findings"] = [finding.plain() for finding in self.datamodule.findings()]
        if best.is_file():
            results |= {"best": read_checkpoint_metrics(best), "checkpoint": "checkpoints/best.ckpt"}
        if (folder / "checkpoints" / "final.ckpt").is_file():
            results |= {"checkpoint": "checkpoints/final.ckpt"}
        if best.is_file() or (self.monitored and "best" not in self.disable):
            others = {name: value for name, value in results["best"].items() if not name.startswith("val/")}
            monitor = self.monitored.monitor if self.monitored else ""
            print(console.best(others | metrics_of_line(results["best"], monitor)))
        return results


def is_first_process() -> bool:
    """Return whether this is the first process of a run, which prints and writes."""
    return not rank_zero_only.rank  # type: ignore[attr-defined]


def _is_from_pickling(error: BaseException) -> bool:
    """Return whether an exception was raised while an object was sent to a process that is started."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "multiprocessing.popen_spawn_posix" in modules or "multiprocessing.popen_forkserver" in modules


@contextmanager
def _ignored_warnings(resumes: bool) -> Iterator[None]:
    """Ignore the warnings of Lightning 2.6.6 about what a run does on purpose."""
    with warnings.catch_warnings():
        # A monitor that validation does not log is refused; one that is never logged is reported at the end.
        warnings.filterwarnings("ignore", r"`?ModelCheckpoint\(monitor=")
        if resumes:
            # The folder holds the run's own checkpoints, and callbacks may be left out.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            # The folder of the run was moved; BestCheckpoint restores its state nevertheless.
            warnings.filterwarnings("ignore", "The dirpath has changed from")
        yield
