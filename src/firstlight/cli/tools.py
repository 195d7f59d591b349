"""The verbs that help to write an experiment or a command: `new`, `configs`, `schema` and `completion`."""

import json
from collections.abc import Sequence

from firstlight.cli import packaged
from firstlight.errors import UsageError


def new(args: list[str]) -> None:
    """Look at data, and write an experiment into a new folder."""
    from firstlight.cli.new import new as write

    write(args)


def configs(args: Sequence[str]) -> None:
    """Print the configurations that come with firstlight."""
    _refuse(args, "configs")
    print(f"firstlight run --config {packaged.PREFIX}NAME, where NAME is one of these (test metrics over 5 seeds):\n")
    print(packaged.listed())


def schema(args: Sequence[str]) -> None:
    """Print the JSON schema of a configuration file."""
    _refuse(args, "schema")
    from firstlight.cli.schema import config_schema

    print(json.dumps(config_schema(), indent=2))


def completion(args: Sequence[str]) -> None:
    """Print the script that completes commands in a shell."""
    from firstlight.cli.schema import completion_script

    shell, *rest = args or ["bash"]
    _refuse(rest, "completion SHELL")
    print(completion_script(shell))


def _refuse(args: Sequence[str], usage: str) -> None:
    if args and args[0] in ("--help", "-h"):
        print(f"usage: firstlight {usage}")
        raise SystemExit(0)
    if args:
        raise UsageError(f"unknown option {args[0]}: usage: firstlight {usage}")
