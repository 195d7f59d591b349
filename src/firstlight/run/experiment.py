"""One experiment: a task, its data and the options of its trainer. `fit` trains it in a run directory."""

import math
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    LambdaCallback,
    LearningRateFinder,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from firstlight.callbacks import FinalCheckpoint, GracefulShutdown, Insight, defaults
from firstlight.callbacks.defaults import DEFAULTS, MONITORING, Monitored
from firstlight.callbacks.facts.data import data_findings
from firstlight.callbacks.graceful_shutdown import interruptible
from firstlight.callbacks.gradient_norm import let_fused_optimisers_clip, let_sharded_gradients_clip
from firstlight.callbacks.progress import Progress, metrics_of_line
from firstlight.callbacks.time_limit import TimeLimit, parse_time
from firstlight.checkpoints.io import (
    AtomicCheckpointIO,
    first_index,
    newest_resumable,
    raise_fault,
    read_checkpoint_metrics,
    remove_leftovers,
)
from firstlight.data import DataModule
from firstlight.data.quality.finding import Finding
from firstlight.errors import TrainingError, UsageError, current_mode, emit, is_users, say
from firstlight.fast_loop import fast_loop
from firstlight.loggers import all_loggers, as_list, log_findings, logged_names, steps_done
from firstlight.optim import skip_nvml_check
from firstlight.preflight import report as checks
from firstlight.preflight import rules
from firstlight.preflight.probe import probe_splits
from firstlight.preflight.rate_sweep import RangeTest, range_test
from firstlight.run import board, console, directory, report
from firstlight.run.ending import caveat, find_ending, limit, missed_average, no_best, stopped_early
from firstlight.run.outputs import outputs_path
from firstlight.run.resume import config_diff, refuse_inexact, start_anew
from firstlight.tasks import Task
from firstlight.tasks.notices import repeated_samples
from firstlight.tasks.optimization import accumulated_batches, as_many_epochs


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
        group: Place of a new run in a group of repetitions, see `directory.read_group`. Without a name, the group is
            named after the run. None: the run is in no group.
        reads_test: Whether the samples of the test split are tried before the first step.
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
    group: Mapping[str, Any] | None = None
    reads_test: bool = True
    _trained: bool = field(default=False, init=False)
    _told_epoch: bool = field(default=False, init=False)
    _diff: dict[str, Any] = field(default_factory=dict, init=False)
    stopped_early: bool = field(default=False, init=False)

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
        if self.time_limit is not None:
            default.insert(0, TimeLimit(parse_time(self.time_limit), self.started, self.verb == "run"))
        return [*self.own_callbacks, *default]

    def check(self) -> checks.Report:
        """Return what is right and wrong with a fit, without training."""
        self._check_time()
        return checks.check(self, self.run_dir or self.experiment_dir, fast_loop)

    def test_rates(self) -> RangeTest:
        """Return the learning rate that a range test on copies of the module suggests."""
        return range_test(self, fast_loop)

    def fit(self) -> dict[str, Any] | None:
        """Train in a new run directory, or resume `run_dir`.

        A run that ends before its first step, for whatever reason, leaves no directory.

        Returns:
            The content of `results.json` on the first process, if there is something new to write.

        Raises:
            UsageError: When the run is refused.
            TrainingError: When another process failed.
        """
        is_first = is_first_process()
        rules.refuse_options(self.options)
        rules.refuse_unreadable_checkpoints(self.task, self.datamodule, self.options, self.disable)
        self._check_time()
        probe_splits(self.task, self.datamodule, self.reads_test)
        checkpoint = None if self.run_dir is None else self._resume(self.run_dir)
        if is_first:
            rules.refuse_no_room(self.task, self.disable, self.run_dir or self.experiment_dir)
        if self.run_dir is None:
            self.run_dir = self.experiment_dir  # Lightning gives the folder of the first process to the others.
            if is_first:
                self.run_dir = directory.create(self.experiment_dir.parent, self.experiment_dir.name)
        try:
            if is_first and checkpoint is None and self.group:
                directory.write_group(self.run_dir, {"name": self.run_dir.name, **self.group})
            with directory.lock(self.run_dir) if is_first else nullcontext():
                if is_first:
                    remove_leftovers(self.run_dir / "checkpoints")
                return self._train(self.run_dir, checkpoint)
        except BaseException:
            if is_first and checkpoint is None and not self._trained:
                directory.discard(self.run_dir)
            raise

    def refit(self, folder: Path, steps: int, stopped_early: bool) -> dict[str, int | bool]:
        """Train on the training and validation samples together, from new weights, and write `refit.ckpt`.

        If the fit stopped early, further training did harm: the refit takes as many steps, and its schedule ends with
        them. Otherwise the best step may have had too little training, and a schedule that ends there would train even
        less: the refit takes as many epochs, at the learning rates of the fit.

        Args:
            folder: The run directory of the fit that found the steps.
            steps: Optimiser steps of its best checkpoint.
            stopped_early: Whether that fit stopped early.

        Returns:
            The number of `samples` and of `steps`, and whether the learning rate `follows_fit`.

        Raises:
            UsageError: When the samples cannot be joined or trained on.
        """
        if not isinstance(self.datamodule, DataModule):
            raise UsageError(
                f"{type(self.datamodule).__name__} cannot join its splits: it is not a firstlight.data module"
            )
        if torch.distributed.is_initialized():
            raise UsageError("it needs a run of one process")
        if not self.task.automatic_optimization:
            raise UsageError("the best step of a run with manual optimisation counts batches, not optimiser steps")
        if any(isinstance(each, StochasticWeightAveraging) for each in self.own_callbacks):
            raise UsageError(
                "StochasticWeightAveraging averages the last epochs, and a refit plans steps: use EMAWeightAveraging"
            )
        kept = [name for name in ("nonfinite", "progress") if name not in self.disable]
        default = [DEFAULTS[name](**self.groups.get(name, {})) for name in kept]
        own = [each for each in self.own_callbacks if not isinstance(each, EarlyStopping | Checkpoint)]
        start = LambdaCallback(
            on_train_start=lambda trainer, _: rules.refuse_single_samples(trainer),
            on_save_checkpoint=lambda _trainer, _module, saved: saved.update(has_seen_validation=True),
            on_train_batch_end=lambda trainer, *_: _stop_after(steps, trainer),
        )
        trainer = self.trainer(
            default_root_dir=folder,
            logger=False,
            callbacks=[*own, *default, start],
            **({"max_steps": steps, "max_epochs": -1} if stopped_early else {}),
            min_epochs=None,
            min_steps=None,
            max_time=None,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in [*own, *default]),
        )
        before = self._batches(trainer)
        self.datamodule.joins_validation = True
        if not stopped_early:
            steps = as_many_epochs(steps, before, self._batches(trainer), accumulated_batches(trainer))
            most = self.options.get("max_steps", -1)
            steps = steps if most < 0 else min(steps, most)
        for each in default:
            if isinstance(each, Progress):
                each.last_step = steps
        again = f"firstlight {self.verb} --run {folder}"
        samples, follows_fit = len(self.datamodule.rows("train")), not stopped_early
        done: dict[str, int | bool] = {"samples": samples, "steps": steps, "follows_fit": follows_fit}
        say(console.refit(samples, steps, follows_fit))
        emit("start", verb="refit", run=str(folder), **{**done, "samples": {"train": done["samples"]}})
        with (
            directory.lock(folder),
            interruptible(trainer, lambda: f"interrupted; train on all samples again with: {again}"),
            _ignored_warnings(resumes=True),
            fast_loop(trainer),
        ):
            try:
                trainer.fit(self.task, datamodule=self.datamodule)
            except MisconfigurationException as error:  # For example, a scheduler that reads a validation metric.
                if is_users(error):
                    raise
                raise UsageError(" ".join(str(error).split())) from error
            trainer.save_checkpoint(folder / "checkpoints" / "refit.ckpt")
        return {**done, "steps": steps_done(trainer)}

    def write_results(self, results: dict[str, Any], reports: bool = False) -> None:
        """Write `results.json` of the run that was just trained, and a report; print where the run is."""
        assert self.run_dir is not None
        results["seconds"] = round(time.monotonic() - self.started, 1)
        directory.write_results(self.run_dir, results)
        say(f"run    {self.run_dir}", always=True)
        if reports:
            report.keep_examples(self.run_dir, results, self.datamodule)
            say(f"report {report.write(self.run_dir)}")
        if self.options["logger"] is not False and results["metrics"] and isinstance(self.datamodule, DataModule):
            board.show(self.run_dir, results, self.task, self.datamodule)
        if any(self.run_dir.glob("events.out.tfevents.*")):
            say(f"look   tensorboard --logdir {self.run_dir.parent}  # http://localhost:6006/#custom_scalars")

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
        diff = self._diff = config_diff(directory.load_config(run), yaml.safe_load(self.config))
        is_exact = refuse_inexact(diff, self.allow_inexact)
        if isinstance(self.datamodule, DataModule) and not is_exact:
            self.datamodule.resume_exactly = False
        if is_first_process():
            for option, (before, now) in diff.items():
                say(f"change {option}: {before} -> {now}")
        # A CheckpointIO of the user may not write zip files, so its files are not verified.
        return checkpoint if self._has_own_io() else newest_resumable(checkpoint)

    def _train(self, folder: Path, checkpoint: Path | None) -> dict[str, Any] | None:
        every = self.callbacks(folder)
        if checkpoint is not None:  # It holds the rate that was found.
            every = [each for each in every if not isinstance(each, LearningRateFinder)]
            metrics = self.task.val_metrics.names if isinstance(self.task, Task) else []
            if (why := start_anew(self._diff, every, metrics, self.allow_inexact)) and is_first_process():
                say(f"best   best checkpoint and early stopping start anew: {why}")
        step = None if checkpoint is None else first_index(checkpoint)
        shutdown = next((each for each in every if isinstance(each, GracefulShutdown)), None)
        start = LambdaCallback(
            on_sanity_check_end=lambda trainer, _: _tell_unknown_monitors(trainer, every),
            on_train_start=lambda trainer, _: self._start(trainer, every, folder, loop.reason),
            on_train_epoch_end=lambda trainer, _: self._tell_own_epoch(trainer),
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
            say(console.resumed(folder, step, directory.logged_steps(folder)))
        try:
            with (
                interruptible(trainer, lambda: self._interrupted(trainer, folder)),
                _ignored_warnings(resumes=checkpoint is not None),
                fast_loop(trainer, handles_signals=shutdown is not None) as loop,
            ):
                trainer.fit(self.task, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as stopped:
            if trainer.interrupted:
                self._write_unfinished(trainer, folder, f"stopped by a signal, exit code {stopped.code}")
            raise
        except Exception as error:
            if isinstance(error, MisconfigurationException) and not is_users(error):
                raise UsageError(f"trainer: {error}") from error
            self._write_unfinished(trainer, folder, str(error) or type(error).__name__)
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
        self.stopped_early = stopped_early(trainer.callbacks)  # type: ignore[attr-defined]
        ending = find_ending(trainer, trainer.callbacks, self.own_callbacks)  # type: ignore[attr-defined]
        if not self._trained:
            cause, advice = (ending.cause, ending.advice) if ending else ("", f"increase {limit(trainer)}")
            say(console.nothing_to_do(steps_done(trainer), cause, advice), always=True)
            if directory.is_finished(folder):
                return None
        return self._results(trainer, folder, ending.cause if ending else "") | {"fast_loop": loop.reason or True}

    def _batches(self, trainer: Trainer) -> int:
        """Return the training batches of an epoch, as Lightning counts them."""
        batches, limit = len(self.datamodule.train_dataloader()), trainer.limit_train_batches
        return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def _write_unfinished(self, trainer: Trainer, folder: Path, error: str) -> None:
        """Write `results.json` of a run that failed or was stopped after its start: why, and what is known of it."""
        if not (self._trained and is_first_process()):
            return
        first = error.splitlines()[0]
        results = {"metrics": {}, "best": {}, "steps": steps_done(trainer), "error": first}
        with suppress(UsageError):  # The disk may be full, and the first error matters.
            directory.write_results(folder, results | self._insight(trainer, first))

    def _insight(self, trainer: Trainer, cause: str) -> dict[str, Any]:
        """Return the findings in the data and in the run, and the facts of the run; print the findings of the run."""
        found = data_findings(self.datamodule, self.task) or []
        insight = next((each for each in trainer.callbacks if isinstance(each, Insight)), None)  # type: ignore[attr-defined]
        seen = [] if insight is None else insight.finish(trainer, cause)
        shown = [each for each in seen if current_mode() == "lines" or each.severity != "info"]
        for text in console.seen(shown, () if insight is None else insight.told):
            say(text, always=True)
        others = [each for each in found if each not in seen]  # Of the data, which explain nothing in the run.
        results: dict[str, Any] = {"findings": [finding.plain() for finding in [*seen, *others]]}
        if isinstance(self.datamodule, DataModule):
            results["data_digest"] = self.datamodule.fitted.get("digest")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                log_findings(logger, results["findings"], steps_done(trainer))
                logger.finalize("success")  # Again: it was open for the text.
        return results if insight is None else results | {"facts": insight.facts(trainer)}

    def _start(self, trainer: Trainer, every: Sequence[Callback], folder: Path, slow: str | None) -> None:
        """Before the first step, write `config.yaml`, and print the data, the plan and why the fast loop is off."""
        rules.refuse_no_validation(trainer, every)
        rules.refuse_single_samples(trainer)
        if trainer.should_stop:
            return  # The resumed run had stopped early.
        if trainer.is_global_zero:
            directory.write_config(folder, self.config)
            # They are of an earlier best checkpoint.
            for stale in (folder / "checkpoints" / "refit.ckpt", *map(partial(outputs_path, folder), ("test", "val"))):
                stale.unlink(missing_ok=True)
        self._trained = True
        if not trainer.is_global_zero:
            return
        sizes: dict[str, int] = {}
        if isinstance(self.datamodule, DataModule):
            sizes = {str(split): len(rows) for split, rows in self.datamodule.indices.items()}
            say(console.data(sizes, self.datamodule.dropped, self.datamodule.split_note))
        total = self._planned(trainer)
        trainable = sum(parameter.numel() for parameter in self.task.parameters() if parameter.requires_grad)
        emit(
            "start",
            verb=self.verb,
            run=str(folder),
            samples=sizes,
            parameters=trainable,
            steps=total,
            epochs=trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else None,
            steps_done=steps_done(trainer),
        )
        if isinstance(self.datamodule, DataModule) and trainer.ckpt_path is None:  # A resumed run has said it.
            found = data_findings(self.datamodule, self.task) or []
            tell_findings(found)
            for logger in trainer.loggers:
                log_findings(logger, [finding.plain() for finding in found])
        note = caveat(trainer.callbacks, self.own_callbacks)  # type: ignore[attr-defined]
        if self.time_limit is None:
            warmup = self.task.warmup_steps if isinstance(self.task, Task) else None
            say(console.plan(trainable, total, warmup, note))
        else:
            limit = self.task.optimization.limit(trainer) if isinstance(self.task, Task) else total
            say(console.timed_plan(trainable, self.time_limit, limit) + note)
            if not (isinstance(self.task, Task) and self.task.optimization.has_schedule(trainer)):
                name = type(self.task).__name__
                say(f"time   {name} has a schedule of its own: the time stops the run, and plans no schedule")
        if note := rules.long_accumulation(trainer):
            say(f"steps  {note}")
        repeated = repeated_samples("val", trainer.val_dataloaders, trainer.world_size)
        if repeated and not isinstance(self.task, Task):  # A task says it.
            say(f"val    {repeated}")
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if trainer.loggers and not 0 < log_every <= total:
            option = f"--trainer.log_every_n_steps is {log_every:,}"
            known = f", the run has {total:,} steps" if math.isfinite(total) else ""
            say(f"log    no training metrics: {option}{known}")
        if self.monitored is None and (off := [name for name in MONITORING if name not in self.disable]):
            module = type(self.task).__name__
            say(f"best   {', '.join(off)} are off: {module} declares no monitor, give --monitor NAME and --mode")
        if slow:
            say(f"loop   the fast loop is off, so steps take longer: {slow}")

    def _tell_own_epoch(self, trainer: Trainer) -> None:
        """Say once that the module logs `epoch`, which Lightning adds to what validations log."""
        own = logged_names(trainer.fit_loop.epoch_loop._results, everything=True)
        if "epoch" in own and not self._told_epoch and trainer.is_global_zero:
            self._told_epoch = True
            name = type(self.task).__name__
            say(f"log    {name} logs epoch, and validations log the number of the epoch as epoch: rename yours")

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
        say(console.fitted(trainer.current_epoch, steps, self._planned(trainer), cause))
        if missed := missed_average(trainer, trainer.callbacks):  # type: ignore[attr-defined]
            say(missed, always=True)
        results: dict[str, Any] = {"metrics": {}, "best": {}, "steps": steps}
        if best.is_file():
            results |= {"best": read_checkpoint_metrics(best), "checkpoint": "checkpoints/best.ckpt"}
        if (folder / "checkpoints" / "final.ckpt").is_file():
            results |= {"checkpoint": "checkpoints/final.ckpt"}
        if best.is_file() or (self.monitored and "best" not in self.disable):
            others = {name: value for name, value in results["best"].items() if not name.startswith("val/")}
            monitor = self.monitored.monitor if self.monitored else ""
            say(
                console.best(others | metrics_of_line(results["best"], monitor), no_best(trainer, monitor)), always=True
            )
        return results | self._insight(trainer, cause)


def tell_findings(found: Sequence[Finding]) -> None:
    """Print findings: the first ones as lines, with `--quiet` only warnings and faults, with `--json` all."""
    for each in found:
        emit("finding", **each.plain())
    shown = [each for each in found if current_mode() == "lines" or each.severity != "info"]
    for line in console.findings(shown):
        say(line, always=True)


def _tell_unknown_monitors(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Print which monitored metric only the first validation can show, or refuse the run."""
    if (note := rules.unknown_monitors(trainer, callbacks)) and trainer.is_global_zero:
        say(f"best   {note}")


def _stop_after(steps: int, trainer: Trainer) -> None:
    """Stop training after optimiser steps that are no limit of the trainer, whose schedule would end with them."""
    if steps_done(trainer) >= steps:
        trainer.should_stop = True


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
