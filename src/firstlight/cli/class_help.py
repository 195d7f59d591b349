"""The classes that an option can name: which there are of firstlight's own, and what the options of one are.

jsonargparse 4.53 lists every subclass that happens to be imported, hundreds of torch's.
"""

import inspect
import re
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from firstlight.errors import UsageError, did_you_mean

__all__ = ["ShortHelp", "class_help", "full_names", "near_class"]

_HOMES = {
    "network": ("firstlight.networks",),
    "loss": ("firstlight.losses", "torch.nn"),
    "optimizer": ("torch.optim",),
    "schedule": ("firstlight.schedules",),
    "data": ("firstlight.data",),
    "model": ("firstlight.tasks",),
}
"""By the last key of an option, where its classes are public."""

_NO_PARTS = {"Task", "Samples", "Optimizer"}
"""Public classes that are not named in a configuration, beside the abstract ones."""

_WIDTH = 120
"""Characters of a line."""


class ShortHelp(DefaultHelpFormatter):
    """Help without the list of all subclasses that were imported."""

    def _get_help_string(self, action: Action) -> str:
        return re.sub(r", known subclasses: .*(?=\)$)", "", super()._get_help_string(action))


def public_classes(option: str) -> dict[str, type]:
    """Return the classes of an option, such as `model.network`, by their paths; none of one that has no home."""
    found = {}
    for home in _HOMES.get(option.rpartition(".")[2], ()):
        module = import_module(home)
        for name in getattr(module, "__all__", dir(module)):
            kind = getattr(module, name)
            of_torch = home == "torch.nn" and not name.endswith("Loss")
            if isinstance(kind, type) and not inspect.isabstract(kind) and name not in _NO_PARTS and not of_torch:
                found[f"{home}.{name}"] = kind
    return found


def full_names(args: Sequence[str]) -> list[str]:
    """Return arguments in which the short name of a public class stands as its path, `--model.network MLP` for one.

    jsonargparse 4.53 knows short names, but not of which of two imported classes.
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
    """Return the path of the public class that is meant by a name, or how to see what there is."""
    paths = {path.rpartition(".")[2]: path for path in public_classes(option)}
    near = did_you_mean(name.rpartition(".")[2], paths)
    for short, path in paths.items():
        if near == f"; did you mean {short}?":
            return f"; did you mean {path}?"
    return f"; --{option}.help lists what there is" if paths else ""


def class_help(args: Sequence[str]) -> str | None:
    """Return what `--OPTION.help` or `--OPTION.help CLASS` asks for, if the arguments have one of a public class.

    Raises:
        UsageError: When there is no such class.
    """
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
    rest = _WIDTH - width - 2
    lines = [
        f"{path:<{width}}  {textwrap.shorten(_first_sentence(kind), rest, placeholder=' ...')}"
        for path, kind in known.items()
    ]
    return "\n".join(
        [
            f"--{option} CLASS, where CLASS is one of these or the path of your own, such as my_project.MyClass:",
            "",
            *lines,
            "",
            f"--{option}.help CLASS shows its options.",
        ]
    )


def _first_sentence(kind: type) -> str:
    paragraph = (inspect.getdoc(kind) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", paragraph)[0]


def _options(option: str, path: str) -> str:
    module, _, name = path.rpartition(".")
    if not module:
        raise UsageError(f"{option}: there is no class {path}{near_class(option, path)}")
    try:
        kind = getattr(import_module(module), name, None)
    except ImportError as error:
        raise UsageError(f"{option}: cannot import {module}: {error}") from error
    if not isinstance(kind, type):
        raise UsageError(f"{option}: there is no class {path}{near_class(option, path)}")
    parser = ArgumentParser(
        usage=SUPPRESS, description=f"{path}: {_first_sentence(kind)}", formatter_class=ShortHelp, add_help=False
    )
    parser.add_class_arguments(kind, option, as_group=False, skip={"params"} if option.endswith("optimizer") else None)
    return parser.format_help()
