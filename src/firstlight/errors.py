"""Errors that end the command line without a traceback, and helpers for their messages."""

import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import UnionType


class UsageError(Exception):
    """Wrong use: an option, file or part that cannot be right.

    The message is one line: what was found, where, and what would be right. Line breaks, and the indentation after
    them, become one space.
    The command line prints the message and exits with code 2.

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


def check_saved(owner: str, state: object, **kinds: type | UnionType) -> None:
    """Refuse the saved state of `owner` if it is not a mapping whose entries have these types; a bool is no int.

    >>> check_saved("the loader", {"epoch": 1}, epoch=int)
    >>> check_saved("the loader", {"epoch": "x"}, epoch=int)
    Traceback (most recent call last):
    firstlight.errors.UsageError: the checkpoint is damaged: epoch of the loader is a str
    """
    found = state if isinstance(state, Mapping) else {}
    for name, kind in kinds.items():
        value = found.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"the checkpoint is damaged: {name} of {owner} is a {type(value).__name__}")


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


def root_cause(error: BaseException) -> BaseException:
    """Return the first `UsageError` in a chain of causes, or the exception that started the chain."""
    return error if isinstance(error, UsageError) or error.__cause__ is None else root_cause(error.__cause__)
