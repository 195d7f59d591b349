"""Rewrite the arguments of a command before the parser reads them."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from firstlight.cli.parser_errors import read_yaml
from firstlight.errors import UsageError
from firstlight.run.directory import refuse_huge_yaml


def early_parser() -> argparse.ArgumentParser:
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


def reset_lists(args: list[str]) -> list[str]:
    """Return options that empty the saved lists to which a repeated command appends again."""
    empty = {"trainer.callbacks": "null", "trainer.plugins": "null"}
    appends = {arg.partition("=")[0] for arg in args}
    return [f"--{name}={value}" for name, value in empty.items() if f"--{name}+" in appends]


def replace_limits(args: list[str]) -> list[str]:
    """Return arguments in which a time replaces the limits of its own and earlier files, unless options give them.

    >>> replace_limits(["--config", "a.yaml", "--time", "10m", "--trainer.max_steps=9"])
    ['--config', 'a.yaml', '--time', '10m', '--trainer.max_epochs=-1', '--trainer.max_steps=9']
    >>> replace_limits(["--time", "null"])
    ['--time', 'null']
    """
    names = [arg.partition("=")[0] for arg in args]
    at = None  # Behind the last option or file that sets a time.
    for index, (name, arg) in enumerate(zip(names, args, strict=True)):
        after = index + (1 if "=" in arg else 2)
        value: Any = arg.partition("=")[2] or "".join(args[index + 1 : after])
        if name in ("--config", "-c"):
            content = read_yaml(Path(value))
            if not isinstance(content, dict) or "time" not in content:
                continue
            value = content["time"]
        elif name != "--time":
            continue
        at = None if value in (None, "null") else after
    if at is None:
        return args
    limits = [f"--trainer.{name}=-1" for name in ("max_epochs", "max_steps") if f"--trainer.{name}" not in names]
    return [*args[:at], *limits, *args[at:]]


def merge_disable(args: list[str]) -> list[str]:
    """Return arguments with one `--disable` in YAML in place of those that may be repeated and spelled `A,B`.

    >>> merge_disable(["--disable=best, last", "--run", "DIR", "--disable", "[lr]"])
    ['--run', 'DIR', '--disable=["best", "last", "lr"]']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--disable", action="append")
    given, rest = parser.parse_known_args(args)
    if given.disable is None:
        return args
    names: list[Any] = []
    for text in given.disable:
        try:
            names += yaml.safe_load(f"[{text.strip(' []')}]")
        except yaml.YAMLError as error:
            raise UsageError(f"--disable={text} is no list of names: write A,B or [A,B]") from error
    return [*rest, f"--disable={json.dumps([str(name) for name in names if name])}"]


def join_metrics(args: list[str]) -> list[str]:
    """Return arguments with one option for each metric, at the end, in place of its class path and its arguments.

    jsonargparse 4.53 takes `kappa.class_path` for the name of a metric.

    >>> join_metrics(["--model.metrics.k.class_path=Kappa", "--model.metrics.k.init_args.classes", "9", "--run=a"])
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


def without_time(args: list[str]) -> tuple[list[str], str | None]:
    """Return arguments without `--time`, which limits the sweep and not a run, and its value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--time")
    try:
        given, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UsageError(f"sweep: {error}") from error
    return rest, given.time
