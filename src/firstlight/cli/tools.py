"""The verbs that train nothing: `compare`, `new`, `report`, `configs`, `schema` and `completion`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from firstlight.cli import packaged
from firstlight.errors import UsageError


class ToolParser(argparse.ArgumentParser):
    """The parser of a verb that trains nothing. Wrong use is a `UsageError`, which ends with the first `usage`."""

    def __init__(self, verb: str, usage: str, description: str = "") -> None:
        super().__init__(f"firstlight {verb}", usage, description, exit_on_error=False, allow_abbrev=False)
        self.verb, self.first_usage = verb, usage.splitlines()[0].partition("   ")[0]

    def options(self, args: Sequence[str], needed: str, what: str) -> argparse.Namespace:
        """Return the options; `needed` is the one that must be given, and `what` says what it is."""
        try:
            found, unknown = self.parse_known_args(args)
        except argparse.ArgumentError as error:
            raise UsageError(f"{self.verb}: {error}") from error
        if unknown or not getattr(found, needed):
            fault = f"does not take {unknown[0]}" if unknown else f"needs {what}"
            raise UsageError(f"{self.verb} {fault}: {self.first_usage}")
        return found


def compare(args: list[str]) -> None:
    """Compare runs."""
    from firstlight.cli.compare import compare as print_comparison

    print_comparison(args)


def new(args: list[str]) -> None:
    """Look at data, and write an experiment into a new folder."""
    from firstlight.cli.new import new as write

    write(args)


def report(args: Sequence[str]) -> None:
    """Write the report of a run into its directory."""
    found = report_parser().options(args, "run", "a run")
    from firstlight.run import directory
    from firstlight.run.report import write

    print(f"report {write(directory.find(found.run.expanduser()), found.format)}")


def report_parser() -> ToolParser:
    """Return the parser of `report`."""
    parser = ToolParser("report", "firstlight report --run DIR [--format html|md]")
    parser.add_argument("--run", type=Path, metavar="DIR", help="Folder of the run, or runs/EXPERIMENT/latest.")
    parser.add_argument("--format", choices=("html", "md"), default="html", help="One page, or Markdown with charts.")
    return parser


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
