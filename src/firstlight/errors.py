"""What is said without a traceback: wrong use, and a run that cannot go on."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The caller asked for something that cannot be right.

    The message is one line, also where it quotes several: what was found, where, and what would be right. The command
    line prints it and exits with code 2.

    >>> print(UsageError("a cell of two" + chr(10) + "lines"))
    a cell of two lines
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))


class TrainingError(Exception):
    """A run cannot go on: neither wrong use nor a bug.

    The message is at most five lines: what happened, where, and what may help. The command line prints it and exits
    with code 1.
    """


@contextmanager
def about(source: str) -> Iterator[None]:
    """Say before the message of a `UsageError` what it is about.

    >>> with about("data.csv"):
    ...     raise UsageError("there is no row")
    Traceback (most recent call last):
    firstlight.errors.UsageError: data.csv: there is no row
    """
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean NAME?"` for the known name closest to `word`, or `""` when none is close.

    >>> did_you_mean("val/los", ["val/loss", "val/accuracy"])
    '; did you mean val/loss?'
    >>> did_you_mean("x", ["val/loss"])
    ''
    """
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word, names, n=1)
    close = close or [name for name in names if word and name.startswith(word)][:1]
    close = close or [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def root_cause(error: BaseException) -> BaseException:
    """Return what a chain of causes began with: wrong use, or the exception at its bottom."""
    return error if isinstance(error, UsageError) or error.__cause__ is None else root_cause(error.__cause__)
