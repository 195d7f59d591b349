"""What a parser's error means, in one line."""

import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path

import yaml

from firstlight.errors import did_you_mean

__all__ = ["explain"]

_NOISE = (
    "Parser key",
    "Problem with given class_path",
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
    "- Expected a path but",
)


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
        return f"there is no option {option}" + did_you_mean(option, options)
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown(found[1], where, _class_given(message, classes), options)
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        return f"{prefix}{found[1]} has no {found[2]}" + did_you_mean(found[2], dir(import_module(found[1])))
    if "Problems parsing config" in message and (broken := _broken(configs)):
        return broken
    if found := re.search(r"arguments are required: (.+)", message):
        return f"nothing says what {found[1].replace(', ', ' and ')} are: give a --config, or --run with a run's folder"
    if found := re.search(r"File does not exist: '([^']+)'", message):
        path = Path(found[1])
        near = [str(file) for file in path.parent.glob("*")] if path.parent.is_dir() else []
        return f"there is no file {path}" + did_you_mean(str(path), near)
    return prefix + _innermost(message)


def _class_given(message: str, classes: list[str]) -> str:
    """Return the class whose option is wrong: an optimiser is named in the value, after the others."""
    value = re.search(r"is not accepted\. Got value: Namespace\(class_path='([^']+)'", message)
    return value[1] if value else (classes[-1] if classes else "")


def _unknown(option: str, where: str, class_path: str, options: Iterable[str]) -> str:
    full = f"{where}.{option}" if where else option
    if not class_path:
        return f"there is no option {full}" + did_you_mean(f"--{full}", options).replace("--", "")
    module, _, name = class_path.rpartition(".")
    known = list(signature(getattr(import_module(module), name)).parameters)
    return f"{full} is no option of {class_path}, which takes {', '.join(known)}" + did_you_mean(option, known)


def _broken(configs: Sequence[Path]) -> str:
    for path in configs:
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{path}{place}: {error.problem}"
    return ""


def _innermost(message: str) -> str:
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    given = re.search(r"^\s*Given value: (?!NestedArg|Namespace)(.+)$", message, re.MULTILINE)
    text = "; ".join(dict.fromkeys(kept)) or " ".join(message.split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"\. Got value: (.+?)(?=;|$)", r", got \1", text)
    text = text.replace("Expected", "expected")
    return f"{text}, got {given[1].strip()}" if given and "got " not in text else text
