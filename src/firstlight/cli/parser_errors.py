"""Explain a parser error in one line."""

import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import yaml

from firstlight.cli.class_help import near_class
from firstlight.errors import closest, did_you_mean, innermost_statement, is_library

WORDING = {
    "key": r'Parser key "([^"]+)"',
    "nested key": r"NestedArg\(key='([^']+)'",
    "class": r"class_path '([^']+)'",
    "class of a rejected option": r"is not accepted\. Got value: Namespace\(class_path='([^']+)'",
    "unknown argument": r"unrecognized arguments: (\S+)",
    "unknown option of a class": r"Option '([^']+)' is not accepted",
    "missing attribute": r"module '([^']+)' has no attribute '([^']+)'",
    "missing module": r"No module named '([^']+)'",
    "not an import path": r"Unexpected import path format: (.+)",
    "expected type": r"Expected an? <class '(?!NoneType)",
    "folder instead of a file": r"Path is not a file: '([^']+)'",
    "not a subclass": r"does not correspond to a subclass of (\w+)\s[\s\S]*Given value: (\S+)",
    "unknown class": r"but ([A-Z]\w*) either not accessible or invalid",
    "broken file": r"Problems parsing config",
    "file without options": r"Unexpected config",
    "missing option": r"arguments are required: (.+)",
    "missing file": r"File does not exist: '([^']+)'",
    "null class_path": r"argument of type 'NoneType' is not iterable",
    "null init_args": r"'NoneType' object has no attribute 'keys'",
    "typed null": r"NoneType'>\s+Given value type: <class 'str'>\s+Given value: None\s",
}
"""What `explain` looks for in the errors of jsonargparse 4.53; `tests/cli/test_wording.py` uses real errors."""


def explain(message: str, options: Iterable[str], configs: Sequence[Path]) -> str:
    """Return in one line what was found, where, and what would be right.

    An error of jsonargparse 4.53 nests explanations over ten lines. The useful parts are the path of keys to the
    fault, the class that was being built there, and the innermost statement. `options` are all options of the parser,
    such as `--trainer.max_epochs`.
    """

    def search(kind: str) -> re.Match[str] | None:
        return re.search(WORDING[kind], message)

    where = ".".join(re.findall(WORDING["key"], message))
    prefix = f"{where}: " if where else ""
    classes = re.findall(WORDING["class"], message)
    if found := search("unknown argument"):
        option = found[1].split("=")[0]
        if not option.startswith("-"):
            return f"unknown option {option}" + (": is it a --config?" if Path(option).suffix == ".yaml" else "")
        if where:
            return _unknown_option(option.removeprefix("--"), where, _rejecting_class(message, classes), options)
        return f"unknown option {option}" + _near_option(option, _options_in_files(configs), options)
    if found := search("unknown option of a class"):
        return _unknown_option(found[1], where, _rejecting_class(message, classes), options)
    if found := search("missing attribute"):
        return f"{prefix}{found[1]} has no {found[2]}" + did_you_mean(found[2], dir(sys.modules.get(found[1])))
    if found := search("missing module"):
        return f"{prefix}no module named {found[1]}{_module_hint(found[1])}"
    # The text can be the content of a file, if a file was given.
    if (found := search("not an import path")) and not search("expected type"):
        hint = "; did you mean --data.path?" if where == "data" else ""
        return f"{prefix}{found[1][:60]} is not a class{hint}"
    if found := search("folder instead of a file"):
        return f"{prefix}{found[1]} is not a file"
    if (found := search("not a subclass")) and _is_of_other_package(found[2]):
        return f"{prefix}{found[2]} is a {found[1]} of pytorch_lightning: import it from lightning.pytorch"
    if found := search("unknown class"):
        keys = _nested_keys(where, message)
        return (f"{keys}: " if keys else "") + f"unknown class {found[1]}{near_class(keys, found[1])}"
    if search("broken file") and (broken := _broken_file(configs)):
        return broken
    if search("file without options"):
        for path in configs:
            if path.expanduser().is_file() and not isinstance(read_yaml(path), Mapping):
                return f"{path} holds no named options"
    if found := search("missing option"):
        if where:
            return f"{where}: {classes[-1] if classes else 'it'} needs {found[1]}"
        return f"{found[1].replace(', ', ' and ')} must be given: use --config FILE, or --run DIR"
    if found := search("missing file"):
        path = Path(found[1])
        # Compared without the suffix, which would make any two names similar.
        near = closest(path.stem, [file.stem for file in path.parent.glob("*.yaml")])
        return f"there is no file {path}" + (f"; did you mean {near}.yaml?" if near else "")
    for key in ("class_path", "init_args"):
        if search(f"null {key}"):
            return f"{prefix}{key} is null: give it a value, or leave it out"
    # jsonargparse 4.53 turns a null for an option of a part into text on the command line.
    hint = "; to set it to null, use a YAML file" if search("typed null") else ""
    return prefix + innermost_statement(message) + hint


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, or `None` if it cannot be read: `--config` may hold YAML itself."""
    try:
        return yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def import_fault(error: BaseException) -> str:
    """Return what failed in the user's own module while it was imported, and where; an empty text if nothing did."""
    where = _nested_keys(".".join(re.findall(WORDING["key"], str(error))), str(error))
    cause: BaseException | None = error
    while cause is not None:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(cause.__traceback__)]
        parser = [index for index, (file, _) in enumerate(frames) if Path(file).parent.name == "jsonargparse"]
        text = str(cause)
        if isinstance(cause, SyntaxError):
            frames, text = [*frames, (str(cause.filename), cause.lineno or 0)], cause.msg
        own = [place for place in frames[parser[-1] + 1 :] if not is_library(place[0])] if parser else []
        if own:
            place = f"{Path(own[-1][0]).name}, line {own[-1][1]}"
            return f"{where}: importing it failed in {place}: {type(cause).__name__}: {text}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _is_of_other_package(class_path: str) -> bool:
    """Return whether an imported class is one of `pytorch_lightning`, whose classes `lightning` does not know."""
    module, _, name = class_path.rpartition(".")
    bases = inspect.getmro(getattr(sys.modules.get(module), name, object))
    return any(each.__module__.startswith("pytorch_lightning.") for each in bases)


def _module_hint(module: str) -> str:
    """Return how to make a missing module available: the extra that installs it, or the folder to run in."""
    name = module.split(".")[0]
    try:
        requirements = requires("firstlight") or []
    except PackageNotFoundError:  # It is imported from its source folder, without an installation.
        requirements = []
    for needed in requirements:
        # `notebooks` repeats packages of other extras.
        if extra := re.match(rf"{name}\b.*extra == ['\"](?!notebooks)(\w+)['\"]", needed):
            return f", which is in firstlight's extra {extra[1]}: pip install 'firstlight[{extra[1]}]'"
    return f"; run firstlight in the folder that holds {name}.py" if name == module else ""


def _nested_keys(where: str, message: str) -> str:
    """Return the path of keys, with the last one if `where` lacks it."""
    last = re.findall(WORDING["nested key"], message)[-1:]
    return where if not last or where.endswith(last[0]) else f"{where}.{last[0]}"


def _rejecting_class(message: str, classes: Sequence[str]) -> str:
    """Return the class that rejects an option. If it is an optimiser, the message has it in the rejected value."""
    value = re.search(WORDING["class of a rejected option"], message)
    return value[1] if value else (classes[-1] if classes else "")


def _unknown_option(option: str, where: str, class_path: str, options: Iterable[str]) -> str:
    full = f"{where}.{option}" if where else option
    if not class_path:
        if "." in full:  # Its group is compared with groups, and not with plain options.
            known = list(options)
            options = [each for each in known if any(other.startswith(f"{each.partition('.')[0]}.") for other in known)]
        return f"unknown option {full}" + did_you_mean(f"--{full}", options).replace("--", "")
    module, _, name = class_path.rpartition(".")
    # The message may quote a checkpoint, so the module must not be imported because of it.
    names = _constructor_options(getattr(sys.modules.get(module), name, object))
    hint = did_you_mean(option.partition(".")[0], names)
    return f"{full} is not an option of {class_path}, which takes {', '.join(names)}{hint}"


def _constructor_options(kind: type) -> list[str]:
    """Return the names of the options that a class and, where it passes options on, its base classes take."""
    names: dict[str, None] = {}
    for each in inspect.getmro(kind)[:-1]:
        if "__init__" in vars(each):
            parameters = inspect.signature(each).parameters.values()
            variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            names |= dict.fromkeys(parameter.name for parameter in parameters if parameter.kind not in variable)
            if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
                break  # Options are not passed on to the base class.
    if any(each.__name__ == "Optimizer" for each in inspect.getmro(kind)):
        names.pop("params", None)  # The task passes the parameters.
    return [name for name in names if not name.startswith("_")]


def _near_option(option: str, in_files: Iterable[str], options: Iterable[str]) -> str:
    """Return a hint for an unknown option, which may be the end or a word of a known one; options in files win."""
    word = option.lstrip("-")
    whole = {each.lstrip("-"): each for each in (*in_files, *options)}
    found = [name for name in whole if f".{name}".lower().endswith(f".{word.lower()}")]
    if not found and (near := closest(word, whole)):
        found = [near]
    found = found or [name for name in whole if f"_{word}_" in f"_{name.rpartition('.')[2]}_"]
    return f"; did you mean {whole[found[0]]}?" if found else ""


def _options_in_files(configs: Sequence[Path]) -> Iterator[str]:
    """Yield the options that configuration files set, as on the command line."""

    def inside(value: Any, path: str) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            full = path if key in ("class_path", "init_args") else f"{path}.{key}"
            yield from inside(inner, full) if isinstance(inner, Mapping) else [f"--{full[1:]}"]

    for path in configs:
        yield from inside(read_yaml(path), "")


def _broken_file(configs: Sequence[Path]) -> str:
    """Return which file is not YAML, and the place of the fault; an empty text if all of them are."""
    for path in configs:
        try:
            yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        except OSError:
            continue
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{path}{place}: {error.problem}"
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # A character that YAML does not allow.
            return f"{path} is not a YAML file: {' '.join(str(error).split())}"
    return ""
