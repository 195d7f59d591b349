"""The command line: from options to an experiment.

All verbs share one schema, so a configuration that one of them wrote is read by every other.
"""

import argparse
import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from firstlight.__main__ import VERBS
from firstlight.callbacks.defaults import DEFAULTS, LINKED
from firstlight.checkpoints.trust import only_trusted, stored_config
from firstlight.cli.class_help import ShortHelp, class_help, full_names
from firstlight.cli.parser_errors import explain
from firstlight.errors import UsageError, root_cause
from firstlight.loggers import as_list
from firstlight.run import directory
from firstlight.run.experiment import Experiment
from firstlight.tasks import Task

__all__ = ["CLI"]

_USAGE = """firstlight {verb} --config FILE [--config OVERLAY] [options]    later files and options win
       firstlight {verb} --run DIR [options]                           DIR's own configuration comes first
       firstlight {verb} --ckpt PATH [options]                         test, validate, predict: PATH says what it needs
       firstlight {verb} --config FILE --print_config                  everything that would be used
       firstlight {verb} --model.help                                  the tasks; --data.help and others alike
       firstlight {verb} --model.help CLASS                            the options of one"""


class CLI(LightningCLI):
    """One parser for all verbs, which builds the experiment."""

    def __init__(self, verb: str, args: list[str]) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.started = time.monotonic()
        self.verb = verb
        self.stored: str | None = None
        args = full_names(args)
        if (text := class_help(args)) is not None:
            print(text)
            sys.exit()
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        early.add_argument("--run", type=Path, default=None)
        early.add_argument("--runs", default="runs")
        early.add_argument("--experiment")
        early.add_argument("--resume", action="store_true")
        early.add_argument("--disable", action="append", default=[])
        early.add_argument("--config", "-c", type=Path, action="append", default=[])
        for name in ("--ckpt", "--trust", "--model", "--data"):
            early.add_argument(name)
        given = argparse.Namespace(config=[])
        try:
            given = early.parse_known_args(args)[0]
            if len(given.disable) > 1:
                args = [*args, f"--disable=[{','.join(each.strip('[]') for each in given.disable)}]"]
            self.name = given.config[0].stem if given.config else "unnamed"
            self.run_dir = None if given.run is None else directory.find(given.run)
            if given.resume and self.run_dir is None:
                self.run_dir = directory.unfinished(Path(given.runs) / (given.experiment or self.name))
            if self.run_dir is not None:
                given.config.insert(0, self.run_dir / "config.yaml")
                args = ["--config", str(given.config[0]), *args]
            configured = given.config or given.model or given.data or given.ckpt in (None, "best", "last")
            if not configured and verb in ("validate", "test", "predict"):
                self.stored = given.ckpt
                args = ["--config", stored_config(self.stored), *args]
            self.trust = [] if given.trust is None else given.trust.split(",")
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
                parser_kwargs={
                    "prog": f"firstlight {verb}",
                    "usage": _USAGE.format(verb=verb),
                    "description": VERBS[verb][0] + ". What is best follows from the task: --model.monitor.",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    "formatter_class": ShortHelp,
                },
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
        add("--resume", action="store_true", help="Go on with the newest run of the experiment, if there is one.")
        add(
            "--allow_inexact",
            action="store_true",
            help="Go on although the batches will be others than they would have been.",
        )
        add("--ckpt", type=str | None, help="What validate, test and predict score: best (default), last, or a path.")
        add("--trust", type=str | None, help="Modules, A,B, that a checkpoint may name if --ckpt PATH is all there is.")
        add(
            "--disable",
            type=list[str] | str,
            default=[],
            help=f"Left out, A,B or [A,B] or one each time: {', '.join(DEFAULTS)}.",
        )
        for name, callback in DEFAULTS.items():
            parser.add_class_arguments(callback, name, skip=LINKED, instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own warns when a program hands over arguments."""
        with self._judged():
            self.config = parser.parse_args(args)
            _refuse_nulls(parser, self.config)
        if self.config.trust and self.stored is None:
            raise UsageError(
                "--trust is for test, validate and predict with nothing but --ckpt PATH: what a --config or a run's "
                "own configuration names is trusted"
            )

    def _judged(self) -> AbstractContextManager[None]:
        """Watch over what is imported and built where a checkpoint, and not the user, says what that is."""
        return nullcontext() if self.stored is None else only_trusted(self.stored, self.trust)

    def instantiate_classes(self) -> None:
        """Build model, data, and what trainers are made of."""
        try:
            with self._judged():
                self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            # jsonargparse 4.53 folds whatever a constructor raises into its own error.
            raise root_cause(error) from None
        options = {**self.config_init["trainer"]}
        disable = {name.strip() for given in as_list(self.config.disable) for name in given.split(",")}
        if options["enable_progress_bar"] is False:
            disable.add("progress")
        if options["enable_checkpointing"] is False:
            disable |= {"best", "last"}
        name = self.config.experiment or self.name
        config = self.config.clone()
        once = {"run": None, "ckpt": None, "experiment": name, "resume": False, "allow_inexact": False, "trust": None}
        for key, value in once.items():
            config[key] = value
        self.experiment = Experiment(
            self.config_init["model"],
            self.config_init["data"],
            options,
            {name: {**self.config_init[name]} for name in DEFAULTS if name in self.config_init},
            disable,
            Path(self.config.runs) / name,
            self.parser.dump(config, skip_none=False),
            self.run_dir,
            self.config.allow_inexact,
            self.verb,
            self.started,
        )

    def training(self) -> Experiment:
        """Return the experiment for a verb that trains."""
        if self.config.ckpt:
            raise UsageError("--ckpt says what to score; fit goes on from the last checkpoint of --run DIR")
        return self.experiment

    def evaluate(self, verb: Literal["validate", "test", "predict"]) -> None:
        """Score the checkpoint that was asked for."""
        self.experiment.evaluate(verb, self.config.ckpt)


def _refuse_nulls(parser: LightningArgumentParser, config: Namespace) -> None:
    """Refuse a null where the type has none; jsonargparse 4.53 takes each for what is not said, and checks it not."""
    for group in ("trainer", *DEFAULTS):
        if config.get(group, {}) is None:
            raise UsageError(f"{group}: null is no set of options; leave {group} out for the defaults")
    set_parsing_settings(unset_sentinel=True)
    try:
        parser.validate(config)
    except TypeError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    finally:
        set_parsing_settings(unset_sentinel=False)
