"""Help on classes: the classes that an option can name, and the options of one class.

jsonargparse 4.53 lists every imported subclass instead, hundreds of them from torch.
"""

import inspect
import re
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from firstlight.errors import UsageError, closest

SEARCH_PATHS = {
    "network": ("firstlight.networks",),
    "loss": ("firstlight.losses", "torch.nn"),
    "optimizer": ("torch.optim", "firstlight.optim"),
    "schedule": ("firstlight.schedules",),
    "data": ("firstlight.data",),
    "model": ("firstlight.tasks",),
}
"""Modules with the public classes of an option, by the last key of the option."""

_NOT_CONFIGURABLE = {"Task", "Samples", "Optimizer", "RandomShift"}
"""Public classes that a configuration cannot name, besides abstract ones."""


class ShortHelp(DefaultHelpFormatter):
    """Help without the list of all imported subclasses, and with `null` as YAML and the command line write it."""

    def _get_help_string(self, action: Action) -> str:
        text = re.sub(r", known subclasses: .*(?=\)$)", "", super()._get_help_string(action))
        return re.sub(r"(`*)\bNone\b\1", "null", text)


def public_classes(option: str) -> dict[str, type]:
    """Return the public classes of an option, such as `model.network`, by their import paths."""
    classes = {}
    for path in SEARCH_PATHS.get(option.rpartition(".")[2], ()):
        module = import_module(path)
        for name in getattr(module, "__all__", dir(module)):
            kind = getattr(module, name)
            is_selected = name.endswith("Loss") if path == "torch.nn" else name not in _NOT_CONFIGURABLE
            if is_selected and isinstance(kind, type) and not inspect.isabstract(kind):
                classes[f"{path}.{name}"] = kind
    return classes


def full_names(args: Sequence[str]) -> list[str]:
    """Return arguments with import paths in place of short class names, for example in `--model.network MLP`.

    jsonargparse 4.53 refuses a short name when two imported classes have it.
    """
    full = list(args)
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option.startswith("--") and not equals and place + 1 < len(args):
            value = args[place + 1]
        short = {path.rpartition(".")[2]: path for path in public_classes(option[2:].removesuffix(".help"))}
        if option.startswith("--") and value in short:
            if equals:
                full[place] = f"{option}={short[value]}"
            else:
                full[place + 1] = short[value]
    return full


def near_class(option: str, name: str) -> str:
    """Return a hint for an unknown class name: the closest public class, or how to list the classes."""
    paths = {path.rpartition(".")[2]: path for path in public_classes(option)}
    if near := closest(name.rpartition(".")[2], paths):
        return f"; did you mean {paths[near]}?"
    return f"; --{option}.help lists the available classes" if paths else ""


def class_help(args: Sequence[str]) -> str | None:
    """Return the text for `--OPTION.help` or `--OPTION.help CLASS`, or `None` if the arguments have neither."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option[2:].removesuffix(".help")
        if option != f"--{name}.help" or not (known := public_classes(name)):
            continue
        if not equals and place + 1 < len(args) and not args[place + 1].startswith("-"):
            value = args[place + 1]
        return _options(name, value) if value else _listed(name, known)
    return None


def _listed(option: str, known: dict[str, type]) -> str:
    width = max(map(len, known))
    rest = 118 - width  # A line has at most 120 characters.
    lines = "\n".join(
        f"{path:<{width}}  {textwrap.shorten(_first_sentence(kind), rest, placeholder=' ...')}"
        for path, kind in known.items()
    )
    return (
        f"--{option} CLASS, where CLASS is one of these or your own, for example my_project.MyClass:\n\n"
        f"{lines}\n\n--{option}.help CLASS shows its options."
    )


def _first_sentence(kind: type) -> str:
    paragraph = (inspect.getdoc(kind) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", paragraph)[0]


def _options(option: str, path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name, None) if module else None
    except ImportError as error:
        raise UsageError(f"{option}: cannot import {module}: {error}") from error
    if not isinstance(kind, type):
        raise UsageError(f"{option}: unknown class {path}{near_class(option, path)}")
    parser = ArgumentParser(
        usage=SUPPRESS, description=f"{path}: {_first_sentence(kind)}", formatter_class=ShortHelp, add_help=False
    )
    parser.add_class_arguments(kind, option, as_group=False, skip={"params"} if option.endswith("optimizer") else None)
    return parser.format_help()
