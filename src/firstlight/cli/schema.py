"""The JSON schema of configuration files, and the completion of commands in a shell. Both come from the parser."""

import argparse
from typing import Any

from jsonargparse import Namespace
from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema
from lightning.pytorch.cli import LightningArgumentParser

from firstlight.callbacks.defaults import DEFAULTS
from firstlight.cli import TOOLS, VERBS
from firstlight.cli.class_help import SEARCH_PATHS, public_classes
from firstlight.cli.compare import compare_parser
from firstlight.cli.new import new_parser
from firstlight.cli.parser import CLI
from firstlight.cli.tools import report_parser
from firstlight.errors import UsageError, did_you_mean


class _ParserOnly(CLI):
    """The parser of a verb, which parses and builds nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = Namespace(seed_everything=False)  # type: ignore[no-untyped-call]

    def instantiate_classes(self) -> None:
        pass


class _Schema(ParserJsonschema):
    """jsonargparse 4.53's schema, which describes the public classes of an option and not all imported subclasses.

    There are hundreds of those, some of which it cannot describe. Any other class path is valid, with any arguments.
    """

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        known = {
            path: kind
            for option in SEARCH_PATHS
            for path, kind in public_classes(option).items()
            if isinstance(class_type, type) and issubclass(kind, class_type)
        }
        other = self.unknown_class_path_schema()
        other["properties"]["class_path"]["not"] = {"enum": list(known)}
        described = [self.class_path_schema(path, action) for path in known]
        result: dict[str, Any] = anyof_schema([{"type": "string"}, *described, other])
        return result


def config_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a configuration file: options, types, defaults, docs, and classes.

    No option is required, because a file may be an overlay.
    """
    schema: dict[str, Any] = _Schema().generate(_ParserOnly("fit", []).parser)  # type: ignore[no-untyped-call]
    _drop_required(schema)
    return {"title": "A configuration of firstlight", **schema}


def _drop_required(node: Any) -> None:
    """Require nothing in a schema: an overlay sets a part of the options, and arguments may follow from the data."""
    for value in node.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _drop_required(each)
    if isinstance(node.get("required"), list):
        del node["required"]


def completion_script(shell: str) -> str:
    """Return the script of a shell that completes verbs, options, and the class names of firstlight.

    Raises:
        UsageError: When the shell is unknown, or the package shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise UsageError("completion needs the package shtab: pip install 'firstlight[completion]'") from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(
            f"unknown shell {shell}; available: {', '.join(shtab.SUPPORTED_SHELLS)}"
            + did_you_mean(shell, shtab.SUPPORTED_SHELLS)
        )
    options = _ParserOnly("fit", []).parser._option_string_actions
    root = argparse.ArgumentParser("firstlight", add_help=False)
    root.add_argument("--version", action="store_true")
    verbs = root.add_subparsers()
    for verb, line in VERBS.items():
        parser = verbs.add_parser(verb, help=line, add_help=False)
        for name, action in options.items():
            if name.startswith("--"):
                text = str(action.help).partition(".")[0].replace("%", "%%")  # For argparse's format.
                takes: dict[str, Any] = {"action": "store_true"} if action.nargs == 0 else {"nargs": action.nargs}
                parser.add_argument(name, help=text, **takes)
        for option in SEARCH_PATHS:
            name = f"--{option}" if option in ("model", "data") else f"--model.{option}"
            choices = [path.rpartition(".")[2] for path in public_classes(option)]
            _option(parser, name).choices = choices
        _option(parser, "--config").complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
        _option(parser, "--disable").choices = list(DEFAULTS)
    parsers = {"compare": compare_parser, "new": new_parser, "report": report_parser}
    paths = {"runs": shtab.DIRECTORY, "run": shtab.DIRECTORY, "dir": shtab.DIRECTORY, "data": shtab.FILE}
    for tool, line in TOOLS.items():
        parser = verbs.add_parser(tool, help=line, add_help=False, parents=[parsers[tool]()] if tool in parsers else [])
        for action in parser._actions:
            if action.dest in paths:
                action.complete = paths[action.dest]  # type: ignore[attr-defined]  # shtab reads it
        if tool == "completion":
            parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return str(shtab.complete(root, shell))


def _option(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    return parser._option_string_actions.get(name) or parser.add_argument(name)
