"""Parse options and configuration files, and build the experiment.

All verbs share one schema, so every verb reads a configuration that any of them wrote.
"""

import argparse
import json
import logging
import re
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng

from firstlight.callbacks.defaults import DEFAULTS, LINKED
from firstlight.checkpoints.trust import only_trusted, stored_config
from firstlight.cli import VERBS, packaged
from firstlight.cli.class_help import ShortHelp, class_help, full_names
from firstlight.cli.parser_errors import explain, import_fault, read_yaml, refuse_huge_yaml
from firstlight.cli.sizes import Holes
from firstlight.errors import UsageError, root_cause
from firstlight.preflight.rules import monitored
from firstlight.run import directory
from firstlight.run.experiment import Experiment

_TRAIN = """firstlight {verb} --config FILE [--config OVERLAY] [options]    later files and options override
       firstlight {verb} --run DIR [options]                           {resume} a run with its configuration
"""
_EVALUATE = """firstlight {verb} --run DIR [options]                           the best checkpoint, or --ckpt last
       firstlight {verb} --ckpt PATH [options]                         any checkpoint; writes to runs/unnamed
       firstlight {verb} --config FILE --ckpt PATH [options]           a checkpoint with another configuration
"""
_USAGE = """       firstlight {verb} --config FILE --print_config                  print the complete configuration
       firstlight {verb} --model.help                                  list the tasks; also --data.help and others
       firstlight {verb} --model.help CLASS                            list the options of a class"""

_EVALUATIONS = ("validate", "test", "predict", "export")

_PER_COMMAND = {"run": None, "ckpt": None, "resume": False, "allow_inexact": False, "trust": None, "to": None}
"""Options of one command, which `config.yaml` does not keep."""


class CLI(LightningCLI):
    """One parser for all verbs. It builds `experiment`, or raises a `UsageError` when options or files are wrong."""

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
        configs: list[Path] = []
        try:
            args = _join_metrics(_merge_disable(args))
            args, packaged_files = packaged.with_files(_replace_limits(args))
            early = _early_parser().parse_known_args(args)[0]
            configs = early.config
            name = configs[0].stem if configs else "unnamed"
            self.name = early.experiment or name
            # A shell does not expand the `~` of `--run=~/x`.
            self.run_dir = None if early.run is None else directory.find(Path(early.run).expanduser())
            if early.resume and self.run_dir is None:
                self.run_dir = directory.find_resumable(Path(early.runs).expanduser() / self.name)
            if self.run_dir is not None:
                configs.insert(0, self.run_dir / "config.yaml")
                args = ["--config", str(configs[0]), *(_reset_lists(args) if early.resume else []), *args]
                early = _early_parser().parse_known_args(args)[0]
                self.name = early.experiment or name
            self.experiment_dir = Path(early.runs).expanduser() / self.name
            self.trust = [] if early.trust is None else early.trust.split(",")
            is_configured = configs or early.model or early.data or early.ckpt in (None, *directory.CHECKPOINTS)
            if not is_configured and verb in _EVALUATIONS:
                self.stored = early.ckpt
                args = ["--config", stored_config(self.stored, self.trust), *args]
            args = packaged.with_data(args, packaged_files)
            super().__init__(
                LightningModule,
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
                    "usage": ((_EVALUATE if verb in _EVALUATIONS else _TRAIN) + _USAGE).format(
                        verb=verb, resume="check" if verb == "check" else "resume"
                    ),
                    "description": f"{VERBS[verb]}. --model.monitor names the metric that decides what is best.",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    "formatter_class": ShortHelp,
                },
            )
        except argparse.ArgumentError as error:
            if fault := import_fault(error):
                raise UsageError(fault) from error
            options = self.parser._option_string_actions if hasattr(self, "parser") else []
            message = explain(str(error), options, configs)
            if self.stored and (missing := re.fullmatch(r"data: \S+ needs (\w+)", message)):
                message += f": checkpoints hold no locations, so add --data.{missing[1]}"
            raise UsageError(message) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and one group of options for each default callback."""
        add = parser.add_argument
        add("--runs", type=str, default="runs", help="Folder of all runs.")
        add(
            "--experiment",
            type=str | None,
            help="Name of the experiment's folder; default: name of the first config, or unnamed.",
        )
        add("--run", type=str | None, help="Folder of a run to resume or evaluate; options override its configuration.")
        add(
            "--refit",
            type=bool,
            default=False,
            help="Train once more, on training and validation samples together, for the steps of the best checkpoint.",
        )
        add("--resume", action="store_true", help="Resume the newest run of the experiment, if there is one.")
        add("--monitor", type=str | None, help="Metric that decides what is best, if the module declares none.")
        add("--mode", type=Literal["min", "max"] | None, help="Whether lower or higher values of --monitor are better.")
        add(
            "--time",
            type=str | None,
            help="Train as many steps as fit into a time, for example 90s, 10m, 1h30m; it replaces max_epochs and "
            "max_steps of the configuration.",
        )
        add("--allow_inexact", action="store_true", help="Resume although a changed option breaks exact resume.")
        add(
            "--ckpt",
            type=str | None,
            help="Checkpoint that validate, test, predict and export use: best, last, final, a path.",
        )
        add("--to", type=Literal["onnx", "pt2", "safetensors"] | None, help="Format that export writes.")
        add("--trust", type=str | None, help="Modules A,B whose classes a checkpoint may name; only with --ckpt PATH.")
        add(
            "--disable",
            type=list[str],
            default=[],
            help=f"Default callbacks to leave out, A,B or [A,B]; may be repeated: {', '.join(DEFAULTS)}.",
        )
        for name, callback in DEFAULTS.items():
            parser.add_class_arguments(callback, name, skip=LINKED, instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments. Lightning's own method warns when a program passes them."""
        with self._only_trusted():
            self.config = _plain(parser.parse_args(args, _skip_validation=True))
            self.holes = Holes(self.config)
            _validate(parser, self.config)
            _refuse_nulls(parser, self.config)
        if self.config.trust and self.stored is None:
            raise UsageError(
                f"--trust works only for {', '.join(_EVALUATIONS)} with --ckpt PATH and without --config and --run: "
                "the classes that a configuration names are trusted anyway"
            )

    def _only_trusted(self) -> AbstractContextManager[None]:
        """Restrict imports where the configuration comes from a checkpoint, and not from the user."""
        return nullcontext() if self.stored is None else only_trusted(self.stored, self.trust)

    def instantiate_classes(self) -> None:
        """Build task, data, and the arguments of trainers and callbacks."""
        try:
            with self._only_trusted():
                self.config_init = self._build()
        except ValueError as error:
            # jsonargparse 4.53 wraps what a constructor raises in its own error.
            raise root_cause(error) from None
        options = {**self.config_init["trainer"]}
        disable = set(self.config.disable)
        if options["enable_progress_bar"] is False:
            disable.add("progress")
        if options["enable_checkpointing"] is False:
            disable |= {"best", "last"}
        saved = self.config.clone()
        for key, value in {**_PER_COMMAND, "experiment": self.name}.items():
            saved[key] = value
        self.experiment = Experiment(
            task=self.config_init["model"],
            datamodule=self.config_init["data"],
            options=options,
            groups={name: {**self.config_init[name]} for name in DEFAULTS if name in self.config_init},
            disable=disable,
            experiment_dir=self.experiment_dir,
            config=_dump(self.parser, saved),
            run_dir=self.run_dir,
            allow_inexact=self.config.allow_inexact,
            monitored=monitored(self.config_init["model"], self.config.monitor, self.config.mode),
            verb=self.verb,
            time_limit=self.config.time,
            started=self.started,
        )

    def _build(self) -> Any:
        """Build everything that the configuration names. If sizes are left out, the data come first."""
        if not self.holes:
            return self.parser.instantiate_classes(self.config)
        with isolate_rng():  # The network starts with the same weights as if the sizes were given.
            data = self.parser.instantiate_classes(Namespace(data=self.config.data)).data  # type: ignore[no-untyped-call]
            self.holes.fill(data)
        _validate(self.parser, self.config)
        del self.config_dump  # Lightning's copy of the configuration, which the task keeps.
        config = self.config.clone()
        del config["data"]
        built = self.parser.instantiate_classes(config)
        built["data"] = data
        return built

    def training(self) -> Experiment:
        """Return the experiment of `run`, `fit` or `check`, and refuse `--ckpt`."""
        if self.config.ckpt:
            raise UsageError("--ckpt is for validate, test and predict; fit resumes the last checkpoint of --run DIR")
        if self.config.refit and self.config.time:
            raise UsageError("--refit trains once more after the time that --time gives: leave one of them out")
        if self.config.refit and (self.experiment.monitored is None or "best" in self.experiment.disable):
            raise UsageError("--refit needs the steps of the best checkpoint: give --monitor NAME, and enable best")
        return self.experiment


def _early_parser() -> argparse.ArgumentParser:
    """Return a parser of the options that decide which run is meant, also where a configuration file sets them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--config", "-c", action=_ReadConfig, default=[])
    for name in ("--experiment", "--ckpt", "--trust", "--model", "--data"):
        parser.add_argument(name)
    return parser


class _ReadConfig(argparse.Action):
    """Collect configuration files, and read the options of the early parser in them: what comes later overrides."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        path = Path(values).expanduser()
        namespace.config = [*namespace.config, path]
        refuse_huge_yaml(path)
        content = read_yaml(path)  # The main parser reports what is wrong with it.
        for name in ("run", "runs", "resume", "experiment", "ckpt", "trust"):
            value = content.get(name) if isinstance(content, dict) else None
            if isinstance(value, str | bool):
                setattr(namespace, name, value)


def _reset_lists(args: list[str]) -> list[str]:
    """Return options that empty the saved lists to which a repeated command appends again."""
    empty = {"trainer.callbacks": "null", "trainer.plugins": "null"}
    appends = {arg.partition("=")[0] for arg in args}
    return [f"--{name}={value}" for name, value in empty.items() if f"--{name}+" in appends]


def _replace_limits(args: list[str]) -> list[str]:
    """Return arguments in which `--time` replaces the limits of earlier configuration files, unless they are given.

    >>> _replace_limits(["--config", "a.yaml", "--time", "10m", "--trainer.max_steps=9"])
    ['--config', 'a.yaml', '--trainer.max_epochs=-1', '--time', '10m', '--trainer.max_steps=9']
    >>> _replace_limits(["--time", "null"])
    ['--time', 'null']
    """
    names = [arg.partition("=")[0] for arg in args]
    at = names.index("--time") if "--time" in names else -1
    if at < 0 or "null" in (args[at].partition("=")[2], *args[at + 1 : at + 2]):
        return args
    limits = [f"--trainer.{name}=-1" for name in ("max_epochs", "max_steps") if f"--trainer.{name}" not in names]
    return [*args[:at], *limits, *args[at:]]


def _merge_disable(args: list[str]) -> list[str]:
    """Return arguments with one `--disable` in YAML in place of those that may be repeated and spelled `A,B`.

    >>> _merge_disable(["--disable=best, last", "--run", "DIR", "--disable", "[lr]"])
    ['--run', 'DIR', '--disable=["best", "last", "lr"]']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--disable", action="append")
    given, rest = parser.parse_known_args(args)
    if given.disable is None:
        return args
    names = [name.strip(" []") for text in given.disable for name in text.split(",")]
    return [*rest, f"--disable={json.dumps([name for name in names if name])}"]


def _join_metrics(args: list[str]) -> list[str]:
    """Return arguments with one option for each metric, at the end, in place of its class path and its arguments.

    jsonargparse 4.53 takes `kappa.class_path` for the name of a metric.

    >>> _join_metrics(["--model.metrics.k.class_path=Kappa", "--model.metrics.k.init_args.classes", "9", "--run=a"])
    ['--run=a', '--model.metrics.k={"class_path": "Kappa", "init_args": {"classes": 9}}']
    """
    rest: list[str] = []
    metrics: dict[str, dict[str, Any]] = {}
    left = iter(args)
    for arg in left:
        option, equals, value = arg.partition("=")
        part = re.fullmatch(r"--model\.metrics\.([^.]+)\.(class_path|init_args\.([^.]+))", option)
        if not part:
            rest.append(arg)
            continue
        metric = metrics.setdefault(part[1], {})
        value = value if equals else next(left, "")
        if not value:
            raise UsageError(f"{option} has no value")
        try:
            known = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{option}={value} is not valid YAML") from error
        if part[3]:
            metric.setdefault("init_args", {})[part[3]] = known
        else:
            metric["class_path"] = value
    return [*rest, *(f"--model.metrics.{name}={json.dumps(metric)}" for name, metric in metrics.items())]


def _plain(value: Any) -> Any:
    """Return a configuration with plain text in place of devices, dtypes and enumerations, which YAML cannot hold.

    They are defaults of arguments that also take text, for example `device` of StochasticWeightAveraging.
    """
    if isinstance(value, Namespace):
        for key in vars(value):
            vars(value)[key] = _plain(vars(value)[key])
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Enum) and isinstance(value, str):
        return str(value.value)
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"the option {value.replace(chr(0), '?')[:80]!r} holds a NUL character, which no path has")
    return str(value) if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype") else value


def _dump(parser: LightningArgumentParser, config: Namespace) -> str:
    """Return a configuration as YAML, or refuse a value that could not be read back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"(?s).*Unable to serialize")
        try:
            return str(parser.dump(config, skip_none=False))
        except (UserWarning, yaml.YAMLError, ValueError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if "erialize" in line), str(error))
            raise UsageError(
                f"config.yaml cannot hold a value of this configuration: {' '.join(reason.split())}"
            ) from error


def _validate(parser: LightningArgumentParser, config: Namespace) -> None:
    try:
        parser.validate(config)
    except (TypeError, KeyError) as error:
        parser.error(str(error), error)


def _refuse_nulls(parser: LightningArgumentParser, config: Namespace) -> None:
    """Refuse a null for an option that takes none. jsonargparse 4.53 treats it as "not given" and does not check it."""
    for group in ("trainer", *DEFAULTS):
        if config.get(group, {}) is None:
            raise UsageError(f"{group}: null is not a set of options; leave {group} out for the defaults")
    set_parsing_settings(unset_sentinel=True)
    try:
        parser.validate(config)
    except TypeError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    finally:
        set_parsing_settings(unset_sentinel=False)
