"""One experiment in its run directory: train it, go on with it, score it."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ModelCheckpoint, ProgressBar
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from firstlight import callbacks
from firstlight.callbacks.checkpoints import read_checkpoint_metrics
from firstlight.callbacks.defaults import refuse_collisions
from firstlight.callbacks.graceful_shutdown import interruptible
from firstlight.checkpoints.io import AtomicCheckpointIO, newest_resumable, remove_leftovers, weights_fault
from firstlight.compat import let_fused_optimisers_clip
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError, did_you_mean
from firstlight.fast_loop import fast_loop
from firstlight.loggers import all_loggers, as_list
from firstlight.preflight.rules import (
    check_data,
    check_room,
    check_sizes,
    refuse_no_batches,
    refuse_no_validation,
    refuse_options,
    refuse_unknown_monitors,
)
from firstlight.run import console, directory
from firstlight.run.config_diff import config_diff, inexact_options
from firstlight.tasks import Task

__all__ = ["Experiment"]


@dataclass
class Experiment:
    """A task, its data and what trainers are made of.

    Args:
        task: What is trained.
        datamodule: What it is trained on.
        options: Arguments of `Trainer`.
        groups: By name, the arguments of the default callbacks.
        without: Default callbacks that are left out.
        home: Folder of the experiment's runs.
        config: Text of `config.yaml`.
        run_dir: An earlier run to go on with or to score.
        inexact: Go on although the run will not end with the bits of one that was never stopped.
        verb: What goes on with the run, in the words of the command line.
    """

    task: Task
    datamodule: LightningDataModule
    options: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    disable: set[str]
    home: Path
    config: str
    run_dir: Path | None = None
    allow_inexact: bool = False
    verb: str = "fit"
    started: float = field(default_factory=time.monotonic)
    _trained: bool = field(default=False, init=False)

    def fit(self) -> dict[str, Any] | None:
        """Train in a new run directory, or go on in an earlier one; return `results.json`, on the first process."""
        refuse_options(self.options)
        check_data(self.task, self.datamodule)
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        resumed = None
        if self.run_dir is not None:
            resumed = directory.checkpoint(self.run_dir, "last")
            self._compare(self.run_dir)
        if resumed and not self._own_io():  # What another plugin writes may be no zip file.
            resumed = newest_resumable(resumed)
        if self.run_dir is None:
            # Lightning hands the first process's folder to the others.
            if first:
                check_room(self.task, self.home, self.disable)
            self.run_dir = directory.create(self.home.parent, self.home.name) if first else self.home
        elif first:
            check_room(self.task, self.run_dir, self.disable)
        lock = directory.lock(self.run_dir) if first else None
        try:
            if first:
                remove_leftovers(self.run_dir / "checkpoints")
            return self._fit(resumed, self.run_dir)
        except UsageError:
            if first and resumed is None and not self._trained:
                directory.discard(self.run_dir)
            raise
        finally:
            if lock is not None:
                lock.release()

    def _fit(self, resumed: Path | None, folder: Path) -> dict[str, Any] | None:
        every = self.all_callbacks(folder)
        step = None if resumed is None else int(read_checkpoint_metrics(resumed)["step"])
        started = LambdaCallback(
            on_sanity_check_end=lambda trainer, _: refuse_unknown_monitors(trainer, every),
            on_train_start=lambda trainer, _: self._start(trainer, every),
        )
        trainer = self.trainer(
            default_root_dir=folder,
            logger=all_loggers(folder, self.options["logger"], step),
            callbacks=[*every, started],
            # Lightning puts its own in place of what is left out.
            enable_checkpointing=any(isinstance(each, Checkpoint) for each in every),
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in every),
        )
        check_sizes(self.datamodule, trainer)
        try:
            with interruptible(trainer, lambda: self._left(trainer, folder)), warnings.catch_warnings():
                # A monitor that validation does not log is refused; one that never comes is said at the end.
                warnings.filterwarnings("ignore", r"`?ModelCheckpoint\(monitor=")
                if step is not None:
                    self._say_where(step, folder)
                    # The folder is meant to have checkpoints, and callbacks are left out on purpose.
                    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
                    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
                with fast_loop(
                    trainer, handles_signals=any(isinstance(each, callbacks.GracefulShutdown) for each in every)
                ):
                    trainer.fit(self.task, datamodule=self.datamodule, ckpt_path=resumed, weights_only=True)
        except MisconfigurationException as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
        except RuntimeError as error:
            if lost := next((each.failed_rank for each in every if isinstance(each, callbacks.GracefulShutdown)), None):
                raise TrainingError(f"{lost}\n{self._left(trainer, folder)}") from error
            raise weights_fault(error, resumed) from error
        if not self._trained:
            refuse_no_batches(trainer)
        if not trainer.is_global_zero:
            return None
        if not self._trained:
            print(console.nothing(trainer.global_step, trainer.should_stop))
            if (folder / "results.json").is_file():
                return None
        return self._results(trainer, folder)

    def all_callbacks(self, folder: Path) -> list[Callback]:
        """Return the callbacks of a fit, those that were asked for and the default ones."""
        defaults = callbacks.defaults(self.task, folder / "checkpoints", self.disable, **self.groups)
        refuse_collisions(own := as_list(self.options["callbacks"]), defaults)
        return [*own, *defaults]

    def untested(self) -> dict[str, Any] | None:
        """Return `results.json` of a run that was trained before and was never tested, on the first process."""
        if rank_zero_only.rank or self.run_dir is None:  # type: ignore[attr-defined]
            return None
        results = directory.read_results(self.run_dir)
        return None if results["metrics"] else results

    def test_best(self) -> dict[str, float]:
        """Return the test metrics of the best checkpoint of the run that was just trained."""
        assert self.run_dir is not None
        if torch.distributed.is_initialized():
            # The other processes are done, and the metrics would wait for them.
            torch.distributed.destroy_process_group()
        metrics: dict[str, float] = self._evaluate("test", directory.checkpoint(self.run_dir, "best"))[0]
        print(f"test   {console.listed(metrics)} (best checkpoint)")
        return metrics

    def write_results(self, results: dict[str, Any]) -> None:
        """Write `results.json` of the run that was just trained, and say where the run lies."""
        assert self.run_dir is not None
        results["seconds"] = round(time.monotonic() - self.started, 1)
        directory.write_results(self.run_dir, results)
        print(f"run    {self.run_dir}")
        if any(self.run_dir.glob("events.out.tfevents.*")):
            print(f"look   tensorboard --logdir {self.run_dir.parent}")

    def evaluate(self, verb: Literal["validate", "test", "predict"], checkpoint: str | None) -> None:
        """Score a checkpoint, `best`, `last` or a path, and write below `evaluations/` what came out."""
        ckpt = self._checkpoint(verb, checkpoint or ("best" if self.run_dir else None))
        found = self._evaluate(verb, ckpt)
        folder = directory.make_unique((self.run_dir or self.home) / "evaluations", f"{verb}-{directory.timestamp()}")
        results = {"checkpoint": str(ckpt), "seconds": round(time.monotonic() - self.started, 1)}
        if verb == "predict":
            columns = {name: torch.cat([batch[name] for batch in found]).tolist() for name in found[0]}
            rows: Sequence[int] = range(len(next(iter(columns.values()))))
            names: list[str] = []
            if isinstance(self.datamodule, DataModule):
                rows, names = self.datamodule.rows("test")[: len(rows)].tolist(), self.datamodule.class_names
            path = directory.write_predictions(folder, columns, rows, names)
            print(f"predict  {len(rows):,} samples ({ckpt})\nwrote    {path}")
        else:
            results["metrics"] = found[0]
            print(f"{verb:<8} {console.listed(found[0])} ({ckpt})\nwrote    {folder}")
        directory.write_results(folder, results)

    def _checkpoint(self, verb: str, asked: str | None) -> Path:
        if asked is None:
            raise UsageError(f"{verb} needs a checkpoint: --run DIR or --ckpt PATH; random weights are never scored")
        if asked in ("best", "last"):
            if self.run_dir is None:
                raise UsageError(f"--ckpt {asked} is a checkpoint of a run: say which with --run DIR")
            return directory.checkpoint(self.run_dir, asked)
        if not Path(asked).is_file():
            raise UsageError(f"there is no checkpoint {asked}" + did_you_mean(asked, ["best", "last"]))
        return Path(asked)

    def _evaluate(self, verb: str, ckpt: Path) -> list[Any]:
        own = [each for each in as_list(self.options["callbacks"]) if not isinstance(each, ModelCheckpoint)]
        progress = [] if "progress" in self.disable else [callbacks.Progress(**self.groups["progress"])]
        # One process counts no sample twice; the callbacks of the fit are missing on purpose.
        one = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        trainer = self.trainer(
            **one,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in [*own, *progress]),
            callbacks=[*own, *progress],
        )
        quiet = {} if verb == "predict" else {"verbose": False}
        again = f"interrupted; go on with: firstlight {verb} --run {self.run_dir}" if self.run_dir else "interrupted"
        try:
            with interruptible(trainer, lambda: again), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
                found: list[Any] = getattr(trainer, verb)(
                    self.task, datamodule=self.datamodule, ckpt_path=str(ckpt), weights_only=True, **quiet
                )
        except RuntimeError as error:
            raise weights_fault(error, ckpt) from error
        return found

    def _own_io(self) -> bool:
        return any(isinstance(each, CheckpointIO) for each in as_list(self.options["plugins"]))

    def trainer(self, **changes: Any) -> Trainer:
        """Return a trainer of the options, of which some are changed."""
        plugins = as_list(self.options["plugins"]) + ([] if self._own_io() else [AtomicCheckpointIO()])
        try:
            return let_fused_optimisers_clip(Trainer(**{**self.options, **changes, "plugins": plugins}))
        except (MisconfigurationException, ValueError) as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error

    def _start(self, trainer: Trainer, every: Sequence[Callback]) -> None:
        """Write before the first step what the run is made of, and say what it is going to do."""
        refuse_no_validation(trainer, every)
        if trainer.should_stop:
            return  # It had stopped early.
        self._trained = True
        if not trainer.is_global_zero:
            return
        assert self.run_dir is not None
        directory.write_config(self.run_dir, self.config)
        if isinstance(self.datamodule, DataModule):
            sizes = {str(split): len(rows) for split, rows in self.datamodule.indices.items()}
            print(console.data(sizes, self.datamodule.dropped))
        total = self.task.total_steps
        trainable = sum(parameter.numel() for parameter in self.task.parameters() if parameter.requires_grad)
        print(console.plan(trainable, total, self.task.planned_schedule.warmup_length(total)), flush=True)
        each: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if trainer.loggers and not 0 < each <= total:
            print(f"log    nothing of training: --trainer.log_every_n_steps is {each:,}", flush=True)

    def _compare(self, folder: Path) -> None:
        """Say what is otherwise than it was, and refuse what cannot be gone on with exactly."""
        changed = config_diff(yaml.safe_load(directory.read_config(folder)), yaml.safe_load(self.config))
        if optimizer := changed.get("model.init_args.optimizer.class_path"):
            raise UsageError(
                f"the run keeps what {optimizer[0]} remembers, which {optimizer[1]} cannot use: start a new one"
            )
        if hindrances := inexact_options(changed):
            if not self.allow_inexact:
                raise UsageError(
                    f"with another {', '.join(hindrances)} a run cannot resume exactly; --allow_inexact resumes anyway"
                )
            if isinstance(self.datamodule, DataModule):
                self.datamodule.resume_exactly = False
        for path, (before, now) in changed.items():
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                print(f"change {path} was {before} and is {now}")

    def _say_where(self, step: int, folder: Path) -> None:
        logged = directory.last_step(folder)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            again = f": steps up to {logged:,} are done and logged again" if logged > step else ""
            print(f"resume {folder} at step {step:,}{again}")

    def _left(self, trainer: Trainer, folder: Path) -> str:
        """Return what there is after Ctrl-C or SIGTERM."""
        kept = sorted(file.name for file in (folder / "checkpoints").glob("*.ckpt"))
        then = f"kept: {', '.join(kept)}" if kept else "nothing was kept yet"
        if "last" not in self.disable and "last.ckpt" in kept:
            then = f"go on with: firstlight {self.verb} --run {folder}"
        return f"interrupted at step {trainer.global_step:,}; {then}"

    def _results(self, trainer: Trainer, folder: Path) -> dict[str, Any]:
        best = folder / "checkpoints" / "best.ckpt"
        planned = self.task.total_steps
        print(console.fitted(trainer.current_epoch, trainer.global_step, planned, trainer.should_stop))
        results: dict[str, Any] = {"metrics": {}, "best": {}, "steps": trainer.global_step}
        if best.is_file():
            results |= {"best": read_checkpoint_metrics(best), "checkpoint": "checkpoints/best.ckpt"}
            print(f"best   {console.listed(results['best'])}")
        elif "best" not in self.disable:
            print("best   none: the run ended before its first validation")
        return results
