"""What a parser's error means, in one line."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import yaml

from firstlight.cli.class_help import near_class
from firstlight.compat import innermost_statement
from firstlight.errors import did_you_mean

__all__ = ["explain"]

_NULLS = {
    "argument of type 'NoneType' is not iterable": "class_path",
    "'NoneType' object has no attribute 'keys'": "init_args",
}
"""What jsonargparse 4.53 says of a null where a class or its options are due."""


def explain(message: str, options: Iterable[str], configs: Sequence[Path]) -> str:
    """Return what was found, where, and what would be right.

    jsonargparse 4.53 nests one explanation in another over ten lines; what matters are the path of keys down to the
    fault, the class that was being built there, and the innermost statement.

    Args:
        message: The text of the error.
        options: All options that the parser knows, such as `--trainer.max_epochs`.
        configs: The configuration files that were given.
    """
    where = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    prefix = f"{where}: " if where else ""
    classes = re.findall(r"class_path '([^']+)'", message)
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        option = found[1].split("=")[0]
        if not option.startswith("-"):
            return f"there is no option {option}" + (": is it a --config?" if Path(option).suffix == ".yaml" else "")
        if where:
            return _unknown(option.removeprefix("--"), where, _class_given(message, classes), options)
        return f"there is no option {option}" + _near(option, _named(configs), options)
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown(found[1], where, _class_given(message, classes), options)
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        return f"{prefix}{found[1]} has no {found[2]}" + did_you_mean(found[2], dir(sys.modules.get(found[1])))
    if found := re.search(r"No module named '([^']+)'", message):
        name = found[1].split(".")[0]
        hint = f"; run it from the folder that holds {name}.py" if name == found[1] else ""
        for needed in requires("firstlight") or []:
            if extra := re.match(rf"{name}\b.*extra == ['\"](\w+)['\"]", needed):
                hint = f", which firstlight's extra {extra[1]} brings: pip install -e '.[{extra[1]}]'"
        return f"{prefix}there is no module {found[1]}{hint}"
    # It is the content of a file, where one is named.
    found = re.search(r"Unexpected import path format: (.+)", message)
    if found and not re.search(r"Expected an? <class '(?!NoneType)", message):
        hint = "; did you mean --data.path?" if where == "data" else ""
        return f"{prefix}{found[1][:60]} names no class{hint}"
    if found := re.search(r"Path is not a file: '([^']+)'", message):
        return f"{prefix}{found[1]} is no file"
    if found := re.search(r"but ([A-Z]\w*) either not accessible or invalid", message):
        keys = _keys(where, message)
        return f"{keys}there is no class {found[1]}{near_class(keys.removesuffix(': '), found[1])}"
    if "Problems parsing config" in message and (broken := _broken(configs)):
        return broken
    if "Unexpected config" in message:
        for path in configs:
            if path.expanduser().is_file() and not isinstance(_content(path), Mapping):
                return f"{path} holds no options by name"
    if found := re.search(r"arguments are required: (.+)", message):
        if where:
            return f"{where}: {classes[-1] if classes else 'it'} needs {found[1]}"
        return f"nothing says what {found[1].replace(', ', ' and ')} are: give a --config, or --run with a run's folder"
    if found := re.search(r"File does not exist: '([^']+)'", message):
        path = Path(found[1])
        # Without what all of them end with, which would make any two alike.
        near = did_you_mean(path.stem, [file.stem for file in path.parent.glob("*.yaml")])
        return f"there is no file {path}" + near.replace("?", ".yaml?")
    for fault, key in _NULLS.items():
        if fault in message:
            return f"{prefix}{key} is null: give it a value, or leave it out"
    # jsonargparse 4.53 makes a text of a null that is typed for a part of a part.
    typed = re.search(r"NoneType'>\s+Given value type: <class 'str'>\s+Given value: None\s", message)
    return prefix + innermost_statement(message) + ("; null can be said in a YAML file" if typed else "")


def _keys(where: str, message: str) -> str:
    """Return the path of keys, which the last of them may not be in."""
    last = re.findall(r"NestedArg\(key='([^']+)'", message)[-1:]
    path = where if not last or where.endswith(last[0]) else f"{where}.{last[0]}"
    return f"{path}: " if path else ""


def _class_given(message: str, classes: list[str]) -> str:
    """Return the class whose option is wrong: an optimiser is named in the value, after the others."""
    value = re.search(r"is not accepted\. Got value: Namespace\(class_path='([^']+)'", message)
    return value[1] if value else (classes[-1] if classes else "")


def _unknown(option: str, where: str, class_path: str, options: Iterable[str]) -> str:
    full = f"{where}.{option}" if where else option
    if not class_path:
        return f"there is no option {full}" + did_you_mean(f"--{full}", options).replace("--", "")
    module, _, name = class_path.rpartition(".")
    # A message may quote a checkpoint, so it must not be what imports a module.
    built = getattr(sys.modules.get(module), name, object)
    known: dict[str, None] = {}
    for kind in inspect.getmro(built)[:-1]:
        if "__init__" in vars(kind):
            found = inspect.signature(kind).parameters.values()
            named = [each for each in found if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
            known |= dict.fromkeys(each.name for each in named)
            if all(each.kind != each.VAR_KEYWORD for each in found):
                break  # What a base class takes is not handed on.
    if any(kind.__name__ == "Optimizer" for kind in inspect.getmro(built)):
        known.pop("params", None)  # which the task gives
    first = option.partition(".")[0]
    return f"{full} is no option of {class_path}, which takes {', '.join(known)}" + did_you_mean(first, known)


def _near(option: str, named: Iterable[str], options: Iterable[str]) -> str:
    """Return what is like an option, of which beginners type the end or a word; what files name comes first."""
    word = option.lstrip("-")
    whole = {each.lstrip("-"): each for each in (*named, *options)}
    found = [name for name in whole if f".{name}".lower().endswith(f".{word.lower()}")]
    if not found and (near := re.search(r"did you mean (.+)\?", did_you_mean(word, whole))):
        found = [near[1]]
    found = found or [name for name in whole if f"_{word}_" in f"_{name.rpartition('.')[2]}_"]
    return f"; did you mean {whole[found[0]]}?" if found else ""


def _named(configs: Sequence[Path]) -> Iterator[str]:
    """Yield the options that files give, as they are typed."""

    def inside(value: Any, path: str) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            full = path if key in ("class_path", "init_args") else f"{path}.{key}"
            yield from inside(inner, full) if isinstance(inner, Mapping) else [f"--{full[1:]}"]

    for path in configs:
        yield from inside(_content(path), "")


def _content(path: Path) -> Any:
    """Return what a file holds; nothing where it is none, as what was typed may be something else."""
    try:
        return yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _broken(configs: Sequence[Path]) -> str:
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
            return f"{path} is no YAML file: {' '.join(str(error).split())}"
    return ""
