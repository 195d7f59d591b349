"""What the columns of a table hold: numbers, dates, categories, or nothing to learn from."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from firstlight.data.cells import is_missing, notation, same
from firstlight.data.dates import date_formats

TargetKind = Literal["multiclass", "binary", "multilabel", "regression"]

_MAX_CLASSES = 10
"""Distinct integers of a target that are classes; more are numbers."""
_ROWS_PER_CLASS = 5
_MIN_ROWS = 20
"""Rows from which values that are all different are no accident."""
_REPEATED = 0.5
"""Share of the rows whose text must occur in another row, too, for a column of categories."""
_MAX_WORDS = 3
"""Different words in a column of numbers that may mean a missing value."""
_LIKELY_TARGETS = ("target", "label", "class", "y", "outcome")
IDENTIFIER = re.compile(r"(?i)(.*[_ .-])?(id|ids|index|rownames?|row|key|uuid)|unnamed: \d+")


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Args:
        name: Its name.
        kind: How it is used; `"ignore"`: it is left out.
        reason: Why, in a few words.
        missing: Rows without a value.
        distinct: Different values.
    """

    name: str
    kind: Literal["number", "date", "category", "ignore"]
    reason: str
    missing: int
    distinct: int


def describe_column(name: str, values: Collection[str]) -> Column:
    """Return what a column of a file holds."""
    counts = Counter(same(value) for value in values if not is_missing(value))
    present = counts.total()

    def column(kind: Any, reason: str) -> Column:
        return Column(name, kind, reason, len(values) - present, len(counts))

    if not counts:
        return column("ignore", "it is empty")
    if len(counts) == 1 and present == len(values):
        return column("ignore", f"it has one value, {shortened(next(iter(counts)))}")
    is_all_different = len(counts) == present >= _MIN_ROWS
    if all(map(is_number, counts)):
        numbers = [*map(float, counts)]
        if is_all_different and all(map(float.is_integer, numbers)):
            # Years may follow one another, too, so the first row must be 0 or 1.
            if present == len(values) and numbers[0] in (0, 1) and numbers == [numbers[0] + i for i in range(present)]:
                return column("ignore", "it numbers the rows")
            if IDENTIFIER.fullmatch(name):
                return column("ignore", "another integer in each row, and its name: identifiers")
        if len(counts) > 1 and all(map(_is_long, counts)):
            return column("ignore", "its numbers are too long to be exact: identifiers")
        if all(len(each) == 8 for each in counts) and len(date_formats(counts)) == 1:
            return column("date", "dates like " + next(iter(counts)))
        return column("number", "numbers")
    if len(formats := date_formats(counts)) == 1:
        return column("date", f"dates like {next(iter(counts))}")
    example = shortened(next(iter(counts)))
    if formats:
        return column("ignore", f"its dates are ambiguous: {example} may be {' or '.join(formats)}")
    repeated = sum(count for count in counts.values() if count > 1)
    if len(counts) > 2 and repeated < _REPEATED * present:
        what = "free text" if any(" " in each for each in counts) else "codes"
        kind = "it has another text in each row" if is_all_different else f"{what}, {len(counts):,} different values"
        return column("ignore", word_among_numbers(counts) or number_for_people(counts) or f"{kind}, like {example}")
    return column("category", f"{len(counts):,} categories")


def infer_kind(targets: Mapping[str, Collection[str]]) -> TargetKind:
    """Return what kind of target columns of a file are.

    One column of two values is `"binary"`. Texts are `"multiclass"`, and so are at most 10 different integers, each in
    5 rows on average. Several columns of 0 and 1 are `"multilabel"`. All other numbers are `"regression"`.
    """
    counts = [Counter(same(value) for value in values if not is_missing(value)) for values in targets.values()]
    if len(counts) > 1:
        return "multilabel" if all(each.keys() <= {"0", "1"} for each in counts) else "regression"
    (values,) = counts
    if len(values) == 2:
        return "binary"
    if not all(map(is_number, values)):
        return "multiclass"
    few = len(values) <= min(_MAX_CLASSES, values.total() / _ROWS_PER_CLASS)
    return "multiclass" if few and all(float(each).is_integer() for each in values) else "regression"


def number_for_people(values: Iterable[str]) -> str:
    """Return what the first value is that is a number, a date or an amount for people only, and what to write instead.

    >>> number_for_people(["", "yes", "12:30"]), number_for_people(["yes", "1.5"])
    ('12:30 is a time: write a number, for example seconds', '')
    """
    found = ((value, notation(value)) for value in values)
    return next((f"{value} is {means}" for value, means in found if means and not means.startswith("a word")), "")


def word_among_numbers(values: Collection[str]) -> str:
    """Return the first of a few different words in a column of numbers, and what to write instead; `""` otherwise.

    >>> word_among_numbers(["1,95", "5,35", "k. A."]), word_among_numbers(["1,95", "5,35", "A 7"])
    ('k. A. is no number, but all values with digits are: if it means a missing value, leave its cells empty', '')
    """
    words = [value for value in values if not re.search(r"\d", value)]
    if not 0 < len(words) <= min(_MAX_WORDS, len(values) - 1):
        return ""
    if not all(is_number(value) or notation(value) for value in values if value not in words):
        return ""
    return (
        f"{shortened(words[0])} is no number, but all values with digits are: if it means a missing value, leave its "
        "cells empty"
    )


def likely_targets(table: Collection[str]) -> list[str]:
    """Return the columns whose name says that they are the target."""
    return [name for name in table if name.lower() in _LIKELY_TARGETS]


def is_number(value: str) -> bool:
    """Return whether a text is a finite number as a computer writes it."""
    try:
        return "_" not in value and abs(float(value)) < float("inf")
    except ValueError:
        return False


def shortened(text: str) -> str:
    """Return a text of at most 40 characters."""
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_long(value: str) -> bool:
    return len(value.lstrip("+-")) > 15 and value.lstrip("+-").isdecimal()
