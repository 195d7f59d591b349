"""The command line: the only place that joins tasks, data and callbacks.

All verbs share one schema, so a configuration that one of them wrote is read by every other.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from firstlight import callbacks, runs
from firstlight.callbacks.checkpoints import recorded
from firstlight.callbacks.defaults import DEFAULTS, LINKED, refuse_collisions
from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.explain import explain, origin, weights_fault
from firstlight.loggers import all_loggers, as_list
from firstlight.tasks import Task

__all__ = ["CLI", "fit", "predict", "run", "test", "validate"]


def run(args: list[str]) -> None:
    """Fit, then test the best checkpoint."""
    cli = CLI("run", args)
    trainer = cli.config.trainer
    if "best" in cli.config.without or trainer.enable_checkpointing is False or trainer.fast_dev_run:
        raise UsageError("run tests the best checkpoint, and none would be kept: use fit, or keep it")
    results = cli.fit()
    if results is not None:
        try:
            results["metrics"] = cli.test_best()
        finally:
            cli.write_results(results)


def fit(args: list[str]) -> None:
    """Train, or go on with a run."""
    cli = CLI("fit", args)
    results = cli.fit()
    if results is not None:
        cli.write_results(results)


def validate(args: list[str]) -> None:
    """Score a checkpoint on the validation split."""
    CLI("validate", args).evaluate("validate")


def test(args: list[str]) -> None:
    """Score a checkpoint on the test split."""
    CLI("test", args).evaluate("test")


def predict(args: list[str]) -> None:
    """Write a checkpoint's predictions for the test split."""
    CLI("predict", args).evaluate("predict")


class CLI(LightningCLI):
    """One parser for all verbs. `model` and `data` are built at once, trainers for what they are to do."""

    model: Task
    datamodule: LightningDataModule

    def __init__(self, verb: str, args: list[str]) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.started = time.monotonic()
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        early.add_argument("--run", type=Path, default=None)
        early.add_argument("--config", "-c", type=Path, action="append", default=[])
        given = argparse.Namespace(config=[])
        try:
            given = early.parse_known_args(args)[0]
            self.run_dir = None if given.run is None else runs.find(given.run)
            if self.run_dir is not None:
                args = ["--config", str(self.run_dir / "config.yaml"), *args]
            self.experiment = given.config[0].stem if given.config else "unnamed"
            super().__init__(
                Task,
                LightningDataModule,
                run=False,
                args=args,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                trainer_defaults={"enable_model_summary": False, "enable_autolog_hparams": False},
                parser_kwargs={"prog": f"firstlight {verb}", "exit_on_error": False, "allow_abbrev": False},
            )
        except argparse.ArgumentError as error:
            options = self.parser._option_string_actions if hasattr(self, "parser") else []
            raise UsageError(explain(str(error), options, given.config)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what concerns runs, and a group of options for each default callback."""
        add = parser.add_argument
        add("--runs", type=str, default="runs", help="Folder of all runs.")
        add("--experiment", type=str | None, help="Folder of the run in --runs; default: the first config's name.")
        add("--run", type=str | None, help="Folder of a run; its configuration comes before what is typed.")
        add("--ckpt", type=str | None, help="What to score: best (default), last, or a path.")
        add("--without", type=list[str], default=[], help=f"Left out, [A,B]: {', '.join(DEFAULTS)}.")
        for name, callback in DEFAULTS.items():
            parser.add_class_arguments(callback, name, skip=LINKED, instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own warns when a program hands over arguments."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build model, data, and what trainers are made of."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            # jsonargparse 4.53 folds whatever a constructor raises into its own error.
            raise origin(error) from None
        self.model = self.config_init["model"]
        self.datamodule = self.config_init["data"]
        self.options: dict[str, Any] = {**self.config_init["trainer"]}
        self.experiment = self.config.experiment or self.experiment
        self.groups = {name: {**self.config_init[name]} for name in DEFAULTS if name in self.config_init}
        self.without = set(self.config.without)
        if self.options["enable_progress_bar"] is False:
            self.without.add("progress")
        if self.options["enable_checkpointing"] is False:
            self.without |= {"best", "last"}

    def fit(self) -> dict[str, Any] | None:
        """Train in a new run directory, or the one that was given; return `results.json`, on the first process."""
        if self.config.ckpt:
            raise UsageError("--ckpt says what to score; fit goes on from the last checkpoint of --run DIR")
        if isinstance(self.datamodule, DataModule):
            self.datamodule.setup()
            for split in self.datamodule.indices:
                samples = self.datamodule.dataset(split)
                self.model.check(self.datamodule.transform(samples.inputs[:2]), samples.targets)
        resumed = None if self.run_dir is None else runs.checkpoint(self.run_dir, "last")
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if self.run_dir is None:
            root = Path(self.config.runs)
            # Lightning hands the first process's folder to the others.
            self.run_dir = runs.create(root, self.experiment) if first else root / self.experiment
        try:
            return self._fit(resumed, self.run_dir)
        except UsageError:
            if first and resumed is None:
                runs.discard(self.run_dir)
            raise

    def _fit(self, resumed: Path | None, folder: Path) -> dict[str, Any] | None:
        defaults = callbacks.defaults(self.model, folder / "checkpoints", self.without, **self.groups)
        own = as_list(self.options["callbacks"])
        refuse_collisions(own, defaults)
        trainer = self._trainer(
            default_root_dir=folder,
            logger=all_loggers(folder, self.options["logger"]),
            callbacks=[*own, *defaults, LambdaCallback(on_train_start=self._start)],
            # Lightning puts its own in place of what is left out.
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in [*own, *defaults]),
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in [*own, *defaults]),
        )
        try:
            with warnings.catch_warnings():
                if resumed:
                    # The folder is meant to have checkpoints, and callbacks are left out on purpose.
                    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
                    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
                trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=resumed, weights_only=True)
        except SystemExit as stopped:
            # Lightning 2.6.6 ends Ctrl-C with exit code 1.
            if not trainer.interrupted:
                raise
            kept = (folder / "checkpoints" / "last.ckpt").is_file()
            then = f"go on with: firstlight fit --run {folder}" if kept else "nothing was kept yet"
            print(f"interrupted at step {trainer.global_step:,}; {then}")
            raise SystemExit(130) from stopped
        except RuntimeError as error:
            raise weights_fault(error, resumed) from error
        return self._results(trainer) if trainer.is_global_zero else None

    def test_best(self) -> dict[str, float]:
        """Return the test metrics of the best checkpoint of the run that was just trained."""
        assert self.run_dir is not None
        if torch.distributed.is_initialized():
            # The other processes are done, and the metrics would wait for them.
            torch.distributed.destroy_process_group()
        metrics: dict[str, float] = self._evaluate("test", runs.checkpoint(self.run_dir, "best"))[0]
        print(f"test   {_listed(metrics)} (best checkpoint)")
        return metrics

    def write_results(self, results: dict[str, Any]) -> None:
        """Write `results.json` of the run that was just trained, and say where the run lies."""
        assert self.run_dir is not None
        results["seconds"] = round(time.monotonic() - self.started, 1)
        runs.write_results(self.run_dir, results)
        print(f"run    {self.run_dir}\nlook   tensorboard --logdir {self.run_dir.parent}")

    def evaluate(self, verb: Literal["validate", "test", "predict"]) -> None:
        """Score the checkpoint that was asked for, and write below `evaluations/` what came out."""
        asked = self.config.ckpt or ("best" if self.run_dir else None)
        if asked is None:
            raise UsageError(f"{verb} needs a checkpoint: --run DIR or --ckpt PATH; random weights are never scored")
        if asked in ("best", "last"):
            if self.run_dir is None:
                raise UsageError(f"--ckpt {asked} is a checkpoint of a run: say which with --run DIR")
            ckpt = runs.checkpoint(self.run_dir, asked)
        else:
            ckpt = Path(asked)
            if not ckpt.is_file():
                raise UsageError(f"there is no checkpoint {ckpt}")
        found = self._evaluate(verb, ckpt)
        home = self.run_dir or Path(self.config.runs) / self.experiment
        folder = runs.make_unique(home / "evaluations", f"{verb}-{runs.timestamp()}")
        results = {"checkpoint": str(ckpt), "seconds": round(time.monotonic() - self.started, 1)}
        if verb == "predict":
            columns = {name: torch.cat([batch[name] for batch in found]).tolist() for name in found[0]}
            rows: Sequence[int] = range(len(next(iter(columns.values()))))
            names: list[str] = []
            if isinstance(self.datamodule, DataModule):
                rows, names = self.datamodule.rows("test").tolist(), self.datamodule.class_names
            runs.write_predictions(folder, columns, rows, names)
            print(f"predictions of {ckpt} for {len(rows):,} samples")
        else:
            results["metrics"] = found[0]
            print(f"{verb:<8} {_listed(found[0])} ({ckpt})")
        runs.write_results(folder, results)
        print(f"wrote    {folder}")

    def _evaluate(self, verb: str, ckpt: Path) -> list[Any]:
        own = [each for each in as_list(self.options["callbacks"]) if not isinstance(each, ModelCheckpoint)]
        progress = [] if "progress" in self.without else [callbacks.Progress(**self.groups["progress"])]
        # One process counts no sample twice; the callbacks of the fit are missing on purpose.
        one = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        trainer = self._trainer(**one, logger=False, enable_checkpointing=False, callbacks=[*own, *progress])
        quiet = {} if verb == "predict" else {"verbose": False}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
                found: list[Any] = getattr(trainer, verb)(
                    self.model, datamodule=self.datamodule, ckpt_path=str(ckpt), weights_only=True, **quiet
                )
        except RuntimeError as error:
            raise weights_fault(error, ckpt) from error
        return found

    def _trainer(self, **changes: Any) -> Trainer:
        try:
            return Trainer(**{**self.options, **changes})
        except (MisconfigurationException, ValueError) as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write before the first step what the run is made of, and say what it is going to do."""
        if not trainer.is_global_zero:
            return
        assert self.run_dir is not None
        config = self.config.clone()
        config["run"], config["ckpt"], config["experiment"] = None, None, self.experiment
        runs.write_config(self.run_dir, self.parser.dump(config, skip_none=False))
        if isinstance(self.datamodule, DataModule):
            sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self.datamodule.indices.items())
            dropped = f", {self.datamodule.dropped:,} dropped" if self.datamodule.dropped else ""
            print(f"data   {sizes} samples{dropped}")
        total = self.model.total_steps
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        warmup = self.model.planned_schedule.warmup_length(total)
        print(f"plan   {trainable:,} parameters, {total:,} optimiser steps, {warmup:,} of them warm-up", flush=True)

    def _results(self, trainer: Trainer) -> dict[str, Any]:
        assert self.run_dir is not None
        best = self.run_dir / "checkpoints" / "best.ckpt"
        planned = self.model.total_steps
        early = trainer.should_stop and trainer.global_step < planned
        ended = (
            f"stopped early, {trainer.global_step:,} of {planned:,} steps"
            if early
            else f"{trainer.global_step:,} steps"
        )
        print(f"fit    {trainer.current_epoch} epochs, {ended}")
        results: dict[str, Any] = {"metrics": {}, "best": {}, "steps": trainer.global_step}
        if best.is_file():
            results |= {"best": recorded(best), "checkpoint": "checkpoints/best.ckpt"}
            print(f"best   {_listed(results['best'])}")
        return results


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
