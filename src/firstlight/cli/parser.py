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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng

from firstlight.callbacks.defaults import DEFAULTS, LINKED
from firstlight.checkpoints.trust import only_trusted, stored_config
from firstlight.cli import VERBS, packaged
from firstlight.cli.arguments import early_parser, join_metrics, merge_disable, replace_limits, reset_lists
from firstlight.cli.class_help import ShortHelp, class_help, full_names
from firstlight.cli.parser_errors import explain, import_fault
from firstlight.cli.sizes import Holes
from firstlight.errors import UsageError, current_mode, did_you_mean, root_cause
from firstlight.preflight.rules import monitored
from firstlight.run import directory
from firstlight.run.experiment import Experiment

_TRAIN = """firstlight {verb} --config FILE [--config OVERLAY] [options]    later files and options override
       firstlight {verb} --run DIR [options]                           {resume} a run with its configuration
"""
_REPEAT = """firstlight repeat --config FILE --seeds 6 [options]              a run for each seed
       firstlight repeat --config FILE --folds 5 [options]              a run for each fold
       firstlight repeat --config FILE --seeds 6 --resume               continue the newest group of this command
"""
_SWEEP = """firstlight sweep --config FILE [--space FILE] [--trials 40]       search for good settings; again: continue
       firstlight sweep --config FILE --time 30m [--jobs 2]             for a time, with two processes
"""
_LR = """firstlight lr --config FILE [options]                       suggest a learning rate, and draw lr.png
       firstlight lr --config FILE --apply                         also write lr.yaml, for a second --config
"""
_EVALUATE = """firstlight {verb} --run DIR [options]                           the best checkpoint, or --ckpt last
       firstlight {verb} --ckpt PATH [options]                         any checkpoint; writes to runs/unnamed
       firstlight {verb} --config FILE --ckpt PATH [options]           a checkpoint with another configuration
"""
_USAGE = """       firstlight {verb} --config FILE --print_config                  print the complete configuration
       firstlight {verb} --model.help                                  list the tasks; also --data.help and others
       firstlight {verb} --model.help CLASS                            list the options of a class"""

_EVALUATIONS = ("validate", "test", "predict", "export")
_USAGES = {"repeat": _REPEAT, "sweep": _SWEEP, "lr": _LR, **dict.fromkeys(_EVALUATIONS, _EVALUATE)}

OF_BATCHES = ("data.batch_size", "data.batch_size_is", "data.num_workers")
"""Options of the data that change no sample and no size."""

_OF_VERBS = {
    "seeds": ("repeat", "sweep"),
    "folds": ("repeat",),
    "verbose": ("check",),
    "plot": ("check",),
    "space": ("sweep",),
    "trials": ("sweep",),
    "jobs": ("sweep",),
    "storage": ("sweep",),
    "apply": ("lr",),
    "output": ("lr",),
    "tries": ("lr",),
}
"""Options that only some verbs take."""


class CLI(LightningCLI):
    """One parser for all verbs. It builds `experiment`, or raises a `UsageError` when options or files are wrong."""

    def __init__(self, verb: str, args: list[str]) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.started = time.monotonic()
        self.verb, self._given = verb, args
        self.stored: str | None = None
        args = full_names(args)
        if (text := class_help(args)) is not None:
            print(text)
            sys.exit()
        configs: list[Path] = []
        try:
            args = join_metrics(merge_disable(args))
            args, packaged_files = packaged.with_files(args)
            early = early_parser().parse_known_args(args)[0]
            args = replace_limits(args)
            configs = early.config
            name = configs[0].stem if configs else "unnamed"
            self.name = early.experiment or (f"{name}_sweep" if verb == "sweep" else name)
            # A shell does not expand the `~` of `--run=~/x`.
            self.run_dir = None if early.run is None else directory.find(Path(early.run).expanduser())
            if early.resume and self.run_dir is None and verb != "repeat":
                self.run_dir = directory.find_resumable(Path(early.runs).expanduser() / self.name)
            if self.run_dir is not None:
                configs.insert(0, self.run_dir / "config.yaml")
                args = ["--config", str(configs[0]), *(reset_lists(args) if early.resume else []), *args]
                early = early_parser().parse_known_args(args)[0]
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
                    "usage": (_USAGES.get(verb, _TRAIN) + _USAGE).format(
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
            options = [each for each in options if verb in _OF_VERBS.get(each.removeprefix("--"), (verb,))]
            message = explain(str(error), options, configs)
            if self.stored and (missing := re.fullmatch(r"data: \S+ needs (\w+)", message)):
                message += f": checkpoints hold no locations, so add --data.{missing[1]}"
            raise UsageError(message) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and one group of options for each default callback."""
        _read_whole_numbers_first(parser)
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
            help="Train once more, on training and validation samples together: for the steps of the best checkpoint, "
            "or its epochs if nothing stopped early.",
        )
        add("--report", type=bool, default=True, help="Write report.html at the end of `run`.")
        add(
            "--resume",
            action="store_true",
            help="Resume the newest run of the experiment, if there is one; repeat: the newest group.",
        )
        add(
            "--seeds",
            type=int | None,
            help="Number of runs of repeat, with the seeds seed_everything, seed_everything + 1, ... A seed changes "
            "initial weights, order of batches, dropout and augmentation; the split keeps data.split_seed. At its end, "
            "sweep trains the configuration and the best one with 6 seeds, or as many as this; 0 leaves that out.",
        )
        add(
            "--folds",
            type=int | None,
            help="Number of runs of repeat, with a fold and a seed each. The validation splits of the folds divide all "
            "samples but those of the test split, which is the same for all.",
        )
        add("--monitor", type=str | None, help="Metric that decides what is best, if the module declares none.")
        add("--mode", type=Literal["min", "max"] | None, help="Whether lower or higher values of --monitor are better.")
        add(
            "--time",
            type=str | None,
            help="Train as many steps as fit into a time, for example 90s, 10m, 1h30m; it replaces max_epochs and "
            "max_steps of its own and earlier configuration files.",
        )
        add("--allow_inexact", action="store_true", help="Resume although a changed option breaks exact resume.")
        add(
            "--ckpt",
            type=str | None,
            help="Checkpoint that validate, test, predict and export use: best, last, final, refit, or a path.",
        )
        add("--to", type=Literal["onnx", "pt2", "safetensors"] | None, help="Format that export writes.")
        add("--quiet", action="store_true", help="Print only what went wrong, and the result.")
        add(
            "--json",
            action="store_true",
            help="Print one JSON object a line on standard output, and nothing else; docs/json.md lists them.",
        )
        add("--verbose", action="store_true", help="Let check print all figures, the layers and a few samples.")
        add("--plot", type=str | None, help="PNG in which check draws the learning rate and a grid of images.")
        add("--space", type=str | None, help="YAML file with the options that sweep searches, and their ranges.")
        add("--trials", type=int | None, help="Number of trials of sweep; default: 40.")
        add("--jobs", type=int | None, help="Processes of sweep on this machine, each with its own device; default: 1.")
        add(
            "--storage",
            type=str | None,
            help="URL of a data base that processes and machines of a sweep share; default: a file in its folder.",
        )
        add("--apply", action="store_true", help="Let lr write lr.yaml, an overlay with the rate that it suggests.")
        add("--tries", type=int | None, help="Short runs that lr compares at most, 0 for none; default: 9.")
        add("--output", type=str | None, help="Folder of lr.png and lr.yaml; default: the current folder.")
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
        for option, is_used in (("json", current_mode() == "json"), ("quiet", current_mode() != "lines")):
            if self.config[option] and not is_used:  # A configuration file is read too late for its own errors.
                raise UsageError(f"{option} is an option of one command: give --{option}, not {option}: true in a file")
        for name, verbs in _OF_VERBS.items():
            if self.config[name] is not None and self.config[name] is not False and self.verb not in verbs:
                raise UsageError(f"--{name} is an option of {' and '.join(verbs)}: leave it out of {self.verb}")
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
        self.experiment = Experiment(
            task=self.config_init["model"],
            datamodule=self.config_init["data"],
            options=options,
            groups={name: {**self.config_init[name]} for name in DEFAULTS if name in self.config_init},
            disable=disable,
            experiment_dir=self.experiment_dir,
            config=self._config_text,
            run_dir=self.run_dir,
            allow_inexact=self.config.allow_inexact,
            monitored=monitored(self.config_init["model"], self.config.monitor, self.config.mode),
            verb={"repeat": "run", "sweep": "fit"}.get(self.verb, self.verb),  # What resumes a repetition or a trial.
            time_limit=self.config.time,
            started=self.started,
        )

    def _dump_config(self) -> None:
        """Keep the text that `config.yaml` will hold, and Lightning's copy of it, which the task keeps."""
        if not hasattr(self, "config_dump"):
            saved = self.config.clone()
            for key, value in {**directory.PER_COMMAND, "experiment": self.name}.items():
                saved[key] = value
            self._config_text = _dump(self.parser, saved)
            self.config_dump = yaml.safe_load(self._config_text)

    def _build(self) -> Any:
        """Build everything that the configuration names. If sizes are left out, the data come first."""
        is_saved = self.verb in _EVALUATIONS and (self.run_dir is not None or self.stored is not None)
        if is_saved:  # The data may be other ones, without targets.
            self.holes.leave()
        if not self.holes or is_saved:
            return self.parser.instantiate_classes(self.config)
        with isolate_rng():  # The network starts with the same weights as if the sizes were given.
            data = self.parser.instantiate_classes(Namespace(data=self.config.data)).data  # type: ignore[no-untyped-call]
            self.holes.fill(data)
        _validate(self.parser, self.config)
        del self.config_dump  # It has no sizes.
        config = self.config.clone()
        del config["data"]
        built = self.parser.instantiate_classes(config)
        built["data"] = data
        return built

    def options(self) -> dict[str, Any]:
        """Return all options of the configuration by their names on the command line, with plain values."""
        plain = yaml.safe_load(self.experiment.config)
        return dict(_dotted(plain))

    @property
    def seed(self) -> int:
        """The seed of the first run; `true` and `false` count as 0."""
        seed: int | bool = self.config.seed_everything
        return 0 if isinstance(seed, bool) else seed

    def variant(self, values: Mapping[str, Any]) -> Experiment:
        """Return the experiment with other values of some options, by their names on the command line.

        It has the bits of the experiment that a command with these options builds, without the time of a parser.

        Raises:
            UsageError: When an option is unknown, or a part refuses a value.
        """
        resizes = self.holes.were_there and any(
            option.startswith("data.") and option not in OF_BATCHES for option in values
        )
        # Only the parser knows the options of a class, and which sizes follow from other data.
        if resizes or any(_names_class(self.config, option) for option in values):
            given = [f"--{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in values.items()]
            return CLI(self.verb, [*self._given, *given]).training()
        before = self.config
        self.config, self.started = before.clone(), time.monotonic()
        vars(self).pop("config_dump", None)
        try:
            for option, value in values.items():
                _set(self.config, option, value)
            _validate(self.parser, self.config)
            self._set_seed()
            self.instantiate_classes()
        except argparse.ArgumentError as error:
            raise UsageError(explain(str(error), [], [])) from error
        finally:
            self.config = before
        return self.training()

    def training(self) -> Experiment:
        """Return the experiment of a verb that trains, and refuse `--ckpt`."""
        if self.config.ckpt:
            raise UsageError(f"--ckpt is for {', '.join(_EVALUATIONS)}; fit resumes the last checkpoint of --run DIR")
        if self.config.refit and self.config.time:
            raise UsageError(
                "--refit trains once more after the time that --time gives: give --refit false, or no --time"
            )
        if self.config.refit and (self.experiment.monitored is None or "best" in self.experiment.disable):
            raise UsageError("--refit needs the steps of the best checkpoint: give --monitor NAME, and enable best")
        return self.experiment


def _dotted(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return the options of a plain configuration by their names on the command line.

    >>> dict(_dotted({"model": {"class_path": "A", "init_args": {"lr": 1}}, "runs": "runs"}))
    {'model': 'A', 'model.lr': 1, 'runs': 'runs'}
    """
    if isinstance(config, dict) and "class_path" in config:
        yield prefix, config["class_path"]
        config = config.get("init_args") or {}
    elif not isinstance(config, dict) or not config:
        yield prefix, config
        return
    for name, value in config.items():
        yield from _dotted(value, f"{prefix}.{name}" if prefix else name)


def _set(config: Namespace, option: str, value: Any) -> None:
    """Set an option, by its name on the command line, in a parsed configuration that has it."""
    node, parts = config, option.split(".")
    for place, part in enumerate(parts):
        if isinstance(node, Namespace) and "init_args" in node and part not in ("class_path", "init_args"):
            node = node.init_args
        known = vars(node) if isinstance(node, Namespace) else node
        if not isinstance(known, dict) or part not in known:
            names = [".".join([*parts[:place], name]) for name in known] if isinstance(known, dict) else []
            raise UsageError(f"the configuration has no option {option}" + did_you_mean(option, names))
        if place < len(parts) - 1:
            node = known[part]
        else:
            known[part] = value


def _names_class(config: Namespace, option: str) -> bool:
    """Return whether an option of a parsed configuration names a class."""
    node: Any = config
    for part in option.split("."):
        if isinstance(node, Namespace) and "init_args" in node:
            node = node.init_args
        node = node.get(part) if isinstance(node, Namespace | dict) else None
    return isinstance(node, Namespace) and "class_path" in node


def _read_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Let `--trainer.limit_test_batches 1` be one batch, and not 1.0, which is all of them.

    For `Optional[Union[int, float]]`, typing may return the equal `Optional[Union[float, int]]` of a package that was
    imported before Lightning, and jsonargparse 4.53 reads a value as the first type that takes it.
    """
    for action in parser._actions:
        kinds = get_args(vars(action).get("_typehint"))
        if action.dest.startswith("trainer.") and {int, float} <= {*kinds}:
            vars(action)["_typehint"] = Union[tuple(sorted(kinds, key=lambda kind: kind is not int))]  # noqa: UP007


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
    """Refuse a null for an option that takes none, and another value for a group of options.

    jsonargparse 4.53 treats a null as "not given", and checks no value of a group that is not a mapping.
    """
    for group in ("trainer", *DEFAULTS):
        if not isinstance(config.get(group, {}), Namespace | dict):
            given = json.dumps(config[group], default=str)
            raise UsageError(f"{group}: {given} is not a set of options; leave {group} out for the defaults")
    set_parsing_settings(unset_sentinel=True)
    try:
        parser.validate(config)
    except TypeError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    finally:
        set_parsing_settings(unset_sentinel=False)
