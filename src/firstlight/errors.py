"""What a command tells its user: errors without a traceback, and lines, or JSON objects, on standard output."""

import difflib
import json
import math
import operator
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, Literal, TextIO, get_args, get_origin

_OUTER_LINES = (
    "Parser key",
    "Problem with given class_path",
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Type typing.Callable",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Expected a dot import path",
    "Unexpected import path format",
)
"""Beginnings of the lines of a jsonargparse 4.53 error that only lead to the cause. `tests/cli` tests the wording."""

_LIBRARIES = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, str(Path(__file__).parent))
"""Folders of modules that are not the user's."""

Mode = Literal["lines", "quiet", "json", "silent"]


class UsageError(Exception):
    """Wrong use: an option, file or part that cannot be right.

    The message is one line: what was found, where, and what would be right. A line break and the spaces around it
    become one space. The command line prints the message and exits with code 2.

    >>> print(UsageError("a cell of two" + chr(10) + "    lines"))
    a cell of two lines
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(filter(None, map(str.strip, message.splitlines()))))


class TrainingError(Exception):
    """A run cannot continue, although its use and the code are right; for example, a process was killed.

    The message has at most five lines: what happened, where, and what may help. The command line prints it and exits
    with code 1.
    """


@contextmanager
def about(source: str) -> Iterator[None]:
    """Put `source` before the message of a `UsageError`.

    >>> with about("data.csv"):
    ...     raise UsageError("there is no row")
    Traceback (most recent call last):
    firstlight.errors.UsageError: data.csv: there is no row
    """
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def check_range(owner: str, interval: str, **values: float | Sequence[float]) -> None:
    """Refuse values outside an interval.

    Args:
        owner: Name of the class or function that was given the values, for the message.
        interval: Written as in mathematics: `"[0, 1)"` contains 0 and not 1, `"(0, inf)"` contains neither end.
        **values: A number or a sequence of numbers by name.

    Raises:
        UsageError: With the first value outside the interval. NaN is outside every interval.

    >>> check_range("MLP", "[0, 1)", dropout=0.5)
    >>> check_range("MLP", "[1, inf)", hidden=[64, 0])
    Traceback (most recent call last):
    firstlight.errors.UsageError: MLP was given hidden=[64, 0]: each must be at least 1
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    is_above = operator.ge if interval[0] == "[" else operator.gt
    is_below = operator.le if interval[-1] == "]" else operator.lt
    rule = f"in {interval}"
    if high == math.inf:
        rule = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    for name, value in values.items():
        each = value if isinstance(value, Sequence) else [value]
        if not all(is_above(number, low) and is_below(number, high) for number in each):
            raise UsageError(
                f"{owner} was given {name}={value}: {'each' if isinstance(value, Sequence) else 'it'} must be {rule}"
            )


def check_saved(owner: str, state: object, **kinds: type | UnionType | GenericAlias) -> None:
    """Refuse the saved state of `owner` if it is not a mapping whose entries have these types.

    A bool is not an int, an int has at most 64 bits, and `list[str]` or `dict[str, int]` name the types of all values.

    >>> check_saved("the loader", {"epoch": 1}, epoch=int)
    >>> check_saved("the loader", {"epoch": "x"}, epoch=int)
    Traceback (most recent call last):
    firstlight.errors.UsageError: the checkpoint is damaged: epoch of the loader is a str
    """
    found = state if isinstance(state, Mapping) else {}
    for name, kind in kinds.items():
        value = found.get(name)
        if not _is_a(value, kind):
            wanted = f" and no {kind}" if isinstance(kind, GenericAlias) else ""
            raise UsageError(f"the checkpoint is damaged: {name} of {owner} is a {type(value).__name__}{wanted}")


def _is_a(value: object, kind: Any) -> bool:
    if isinstance(kind, GenericAlias):
        kinds = get_args(kind)
        if not isinstance(value, get_origin(kind)):
            return False
        if isinstance(value, dict):
            return all(_is_a(key, kinds[0]) and _is_a(each, kinds[1]) for key, each in value.items())
        return all(_is_a(each, kinds[0]) for each in value)  # type: ignore[attr-defined]
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) and not (isinstance(value, int) and not -(2**63) <= value < 2**63)


@contextmanager
def restoring(owner: str) -> Iterator[None]:
    """Raise a `UsageError` for any error while the saved state of `owner` is restored; call no code of the user."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"the checkpoint is damaged: {owner} cannot be restored ({error!r:.100})") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean NAME?"` for the known name closest to `word`, or `""` when none is close.

    >>> did_you_mean("val/los", ["val/loss", "val/accuracy"])
    '; did you mean val/loss?'
    >>> did_you_mean("x", ["val/loss"])
    ''
    """
    near = closest(word, known)
    return f"; did you mean {near}?" if near else ""


def closest(word: str, known: Iterable[str]) -> str:
    """Return the known name closest to `word`, or `""` when none is close."""
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    longer = [name for name in names if word and name.startswith(word)]
    close = longer if len(longer) == 1 else difflib.get_close_matches(word, names, n=1)
    close = close or longer or [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=1)]
    return close[0] if close else ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with columns of equal width.

    >>> aligned([["", "run"], ["seed 0", "a"]])
    ['        run', 'seed 0  a']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def is_library(file: str) -> bool:
    """Return whether a file belongs to a library, to Python or to firstlight, and is not a module of the user."""
    return not Path(file).is_absolute() or file.startswith(_LIBRARIES)  # A frame of a compiled library has no path.


def is_users(error: BaseException) -> bool:
    """Return whether the user's own code raised an exception, and not firstlight or Lightning.

    An exception of Python or another library is that of the code that called it.
    """
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        if not is_library(frame.f_code.co_filename):
            return True
        if str(frame.f_globals.get("__name__")).partition(".")[0] in ("firstlight", "lightning"):
            return False
    return False


def root_cause(error: BaseException) -> BaseException:
    """Return the first `UsageError` in a chain of causes, or the exception that started the chain."""
    return error if isinstance(error, UsageError) or error.__cause__ is None else root_cause(error.__cause__)


def innermost_statement(message: str) -> str:
    """Return the innermost statement of a jsonargparse 4.53 error, whose message nests several explanations."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_OUTER_LINES)]
    text = "; ".join(dict.fromkeys(kept)) or " ".join(message.split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    text = re.sub(r"Expected an? ", "expected ", text)
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"\. Got value: (.+?)(?=;|$)", r", got \1", text)
    given = re.findall(r"^\s*Given value: (?!NestedArg|Namespace|{'class_path')(.+)$", message, re.MULTILINE)
    return f"{text}, got {given[-1].split('. Got value')[0].strip()}" if given and "got " not in text else text


def refuse_other_trainer(owner: str, trainer: Any) -> None:
    """Refuse a trainer of `pytorch_lightning`, whose classes are others: each `isinstance` would be false."""
    if type(trainer).__module__.startswith("pytorch_lightning."):
        raise UsageError(
            f"{owner} was given to a Trainer of pytorch_lightning, but works with the package lightning: "
            "import Trainer, LightningModule and LightningDataModule from lightning.pytorch"
        )


class _Printing:
    """How this process prints, and the stream of the JSON objects."""

    mode: Mode = "lines"
    objects: TextIO | None = None


@contextmanager
def printing(mode: Mode, objects: TextIO | None = None) -> Iterator[None]:
    """Print as `mode` says in this context.

    Args:
        mode: `lines`: all lines. `quiet`: only what went wrong, and the result. `json`: objects instead of lines.
            `silent`: nothing.
        objects: The stream of the JSON objects.
    """
    before = _Printing.mode, _Printing.objects
    _Printing.mode, _Printing.objects = mode, objects if mode == "json" else None
    try:
        yield
    finally:
        _Printing.mode, _Printing.objects = before


def current_mode() -> Mode:
    """Return how this process prints."""
    return _Printing.mode


def printable(text: str) -> str:
    r"""Return a text without control characters, which a file may hold to change what a terminal shows.

    >>> print(printable("loss" + chr(27) + "[2J"))
    loss\x1b[2J
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def say(line: str, always: bool = False) -> None:
    """Print a line for people. With `always`, `--quiet` prints it too: it is what went wrong, or the result."""
    if _Printing.mode == "lines" or (always and _Printing.mode == "quiet"):
        print(printable(line), flush=True)


def emit(event: str, **values: Any) -> None:
    """With `--json`, print an object with `event` and these plain values. Numbers that are not finite become null.

    >>> import sys
    >>> with printing("json", sys.stdout):
    ...     emit("epoch", epoch=3, metrics={"val/loss": 0.25, "val/auroc": math.nan})
    {"event": "epoch", "epoch": 3, "metrics": {"val/loss": 0.25, "val/auroc": null}}
    """
    if _Printing.objects is not None:
        # One write, because several processes may write at the same time.
        _Printing.objects.write(json.dumps({"event": event, **_finite(values)}, default=str) + "\n")
        _Printing.objects.flush()


def _finite(value: Any) -> Any:
    """Return plain values with None in place of the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
