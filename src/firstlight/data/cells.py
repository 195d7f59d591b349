"""What a cell of a file means: nothing, a name of a class or category, or a number in another notation."""

import functools
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.errors import UsageError

_log = logging.getLogger(__name__)

MISSING = frozenset(
    ["", "?", "NA", "na", "N/A", "n/a", "NaN", "nan", "NAN", "-nan", "null", "NULL", "None", "<NA>", "#N/A", "#NA"]
)
"""Texts that mean a missing value, in numbers, categories and labels; spaces and quotes around them do not count."""

_MAX_ALIKE = 5
"""Pairs of names that look alike, of a column, that a line names."""
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_AFTER_DATE = r"(?:[T ]\d.*)?"
_SIGN = "[-+]?"
_AMOUNT = rf"{_SIGN}\d[\d.,' ]*"
CURRENCY = "[$€£¥₹₽]|USD|EUR|GBP|JPY|CHF|CAD|AUD|CNY|INR"
_UNITS = "kg|g|mg|km|m|cm|mm|ft|in|lbs?|oz|h|min|s|ms|°|°C|°F|k|K|M|bn"
_OR_NAMED = "or name the column in Table's decimal_marks"
_NOTATIONS = {
    rf"\d{{4}}[-/.]\d\d?[-/.]\d\d?{_AFTER_DATE}|\d\d?[-/.]\d\d?[-/.]\d\d(?:\d\d)?{_AFTER_DATE}"
    rf"|(?:\d\d?[-. ]+)?(?i:{_MONTHS})[a-z]*[-,. ]+\d.*"
    r"|\d{4}[-/](?:0[1-9]|1[0-2])": "a date: write a number, for example the days since a first day",
    r"\d\d?:\d\d(?::\d\d(?:\.\d+)?)?(?: ?[AaPp][Mm])?": "a time: write a number, for example seconds",
    rf"{_AMOUNT}%": f"a percentage: write the number alone, {_OR_NAMED}",
    rf"{_SIGN}(?:{CURRENCY}) ?{_AMOUNT}|{_AMOUNT}(?:{CURRENCY})": "an amount of money: "
    f"write the number alone, {_OR_NAMED}",
    rf"{_SIGN}[1-9]\d{{0,2}},\d{{3}}": "a number with a thousands separator or a decimal comma: "
    f"write 1234 or 1.234, {_OR_NAMED}",
    rf"{_SIGN}[1-9]\d{{0,2}}(?:([,' _])\d{{3}})(?:\1\d{{3}})*(?:\.\d*)?|{_SIGN}\d{{1,3}}(?:\.\d{{3}}){{2,}}"
    r"|[-+]?\d+(?:_\d+)+(?:\.\d*)?": f"a number with thousands separators: write it without them, {_OR_NAMED}",
    rf"{_SIGN}\d{{1,3}}(?:[. ']\d{{3}})+,\d+|{_SIGN}\d*,\d+": "a number with a decimal comma: "
    f"write a decimal point, {_OR_NAMED}",
    r"[\u2212\u2013]\d+\.?\d*|\(\d[\d.,]*\)|\d+\.?\d*-": "a negative number in another notation: write it as -12.5",
    r"(?i:true|false|yes|no)": "a word: write 1 or 0, or name a column of inputs in categorical",
    rf"{_SIGN}\d+\.?\d* ?(?:{_UNITS})": "a number with a unit: write the number alone",
}


def is_missing(value: Any) -> bool:
    """Return whether a value is None, NaN or one of the texts that mean a missing value."""
    if isinstance(value, str):
        return value in MISSING or tidy(value) in MISSING
    return value is None or (isinstance(value, float) and value != value)


def same(name: str) -> str:
    """Return a text that is equal for all spellings of a name: with other spaces, or 0, 0.0 and +0 for a number.

    >>> same(" New  York "), same("2.50"), same("+1.0"), same("007")
    ('New York', '2.5', '1', '007')
    """
    text = tidy(name)
    if re.fullmatch(rf"{_SIGN}\d+(\.\d*)?", text):
        text = text.removeprefix("+")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        text = text.removeprefix("-") if text == "-0" else text
    return text


def distinct(values: NDArray[Any]) -> list[str]:
    """Return the sorted names in a column without missing values, one spelling each, the shortest."""
    names: dict[str, str] = {}
    for name in sorted(
        {tidy(value) for value in {*values} if not is_missing(value)}, key=lambda each: (len(each), each)
    ):
        names.setdefault(same(name), name)
    return sorted(names.values())


def codes(values: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
    """Return for each value the index of its name. Values that are missing or have no name stay as they are."""
    indices: dict[str, Any] = {same(name): index for index, name in enumerate(names)}
    found = {value: indices.get(same(value), value) for value in {*values}}
    return np.array([found[value] for value in values], object)


def encode_labels(
    labels: NDArray[Any], known: Sequence[str], path: str, column: str, lines: Sequence[int]
) -> tuple[NDArray[Any], list[str]]:
    """Return for each label the index of its class, missing labels as they are, and the class names.

    Args:
        labels: A column of a file.
        known: Class names of a checkpoint; empty: those in the column.
        path: Path of the file, for messages.
        column: Name of the column, for messages.
        lines: Line of each label, for messages.

    Raises:
        UsageError: If the checkpoint does not know a label.
    """
    names = list(known) or distinct(labels)
    if not known:
        warn_doubtful(names, f"{path}: column {column}")
    encoded = codes(labels, names)
    for line, label in zip(lines, encoded, strict=True):
        if isinstance(label, str) and not is_missing(label):
            found = f"{path}: line {line} column {column} is {label}"
            raise UsageError(f"{found}, but the checkpoint was trained on the classes {', '.join(names)}")
    return encoded, names


def warn_doubtful(names: Sequence[str], where: str) -> None:
    """Warn about names that look like another one, or like a missing value."""
    warn_alike(names, where)
    for name in names:
        if name.casefold() in {"missing", *map(str.casefold, MISSING)}:
            _log.warning(f"{where} has the value {name}: leave the cell empty if it means a missing value")


def warn_alike(names: Sequence[str], where: str) -> None:
    """Warn about names that look like another one."""
    seen: dict[str, str] = {}
    alike = []
    for name in names:
        other = seen.setdefault(_key(name), name)
        if other != name:
            alike.append(f"{other} and {name}")
    if alike:
        more = f", and {len(alike) - _MAX_ALIKE:,} more pairs" if len(alike) > _MAX_ALIKE else ""
        _log.warning(f"{where} has {', '.join(alike[:_MAX_ALIKE])}{more}, which count as different values")


def _key(name: str) -> str:
    """Return what names that look alike have in common.

    >>> _key("P-01"), _key("p1"), _key("1.05"), _key("1-05")
    ('p1', 'p1', '1.05', '1-5')
    """
    text = unicodedata.normalize("NFKC", same(name)).casefold().lstrip("0").strip("\"'")
    text = re.sub(r"(?<=[^\W\d_])[-_ .](?=\d)", "", text)
    return re.sub(r"(?<![\d.,])0+(?=\d)", "", text)


@functools.lru_cache(maxsize=4096)
def notation(value: str) -> str:
    """Return what a text is that is a number or a date for people only, and what to write instead; `""` for others.

    >>> notation("12:30")
    'a time: write a number, for example seconds'
    >>> notation("apple"), notation("1.5")
    ('', '')
    """
    text = tidy(value).replace("\u2019", "'")  # Swiss thousands separator
    return next((means for pattern, means in _NOTATIONS.items() if re.fullmatch(pattern, text)), "")


def tidy(text: str) -> str:
    """Return a text with single spaces, without the quotes that a reader keeps after a space, as in `1, "a"`."""
    text = unicodedata.normalize("NFC", " ".join(text.translate(_INVISIBLE).split()))
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text
