"""Read the dates in a column of text."""

import re
from collections.abc import Collection
from datetime import UTC, datetime

from firstlight.data.cells import same
from firstlight.errors import UsageError

ISO = "ISO 8601"
DATE_PARTS = 5
"""Numbers that a date becomes, see `TableEncoder`."""
_DAYS = (
    "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d.%m.%y", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%d-%m-%Y",
    "%m-%d-%Y", "%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%b %d %Y", "%d%b%Y",
)  # fmt: skip
_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", "0?[1-9]|1[0-2]", r"0[1-9]|[12]\d|3[01]"
_UNORDERED = (
    rf"(?:{_MONTH})\.{_YEAR}",
    rf"(?:0[1-9]|1[0-2]){_YEAR}",
    rf"(?:{_DAY})(?:0[1-9]|1[0-2]){_YEAR}",
    rf"(?:0[1-9]|1[0-2])(?:{_DAY}){_YEAR}",
)
_TIMES = ("", " %H:%M:%S", " %H:%M", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S")


def date_formats(values: Collection[str]) -> list[str]:
    """Return the formats in which every value is a date: `ISO`, or formats of `strptime`.

    >>> date_formats(["2024-01-31", "2024-02-01 12:00"]), date_formats(["31/01/2024"]), date_formats(["1/2/2024"])
    (['ISO 8601'], ['%d/%m/%Y'], ['%d/%m/%Y', '%m/%d/%Y'])
    """
    if all(_reads(value, ISO) for value in values):
        return [ISO]
    first = next(iter(values), "")
    likely = [day + time for day in _DAYS for time in _TIMES if _reads(first, day + time)]
    return [each for each in likely if all(_reads(value, each) for value in values)]


def seconds(value: str, style: str) -> float:
    """Return a date as seconds since 1970; a date without a time zone is in UTC.

    Raises:
        ValueError: If the value is not a date of this format.
    """
    text = same(value)  # Pandas writes 20240131.0 in a column with gaps.
    date = datetime.fromisoformat(text) if style == ISO else datetime.strptime(text, style)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def unordered_months(values: Collection[str]) -> str:
    """Return one of the values if all are numbers that people read as dates and that do not sort by time, else `""`.

    >>> [unordered_months(each) for each in (["01.2023", "12.2022"], ["2023.9", "2023.10"], ["31122023"])]
    ['01.2023', '2023.9', '31122023']
    >>> [unordered_months(each) for each in (["2023.09", "2023.10"], ["20231231"], ["2023.5", "2023.75"])]
    ['', '', '']
    """
    texts = [*map(str, values)]
    for pattern in _UNORDERED:
        if all(re.fullmatch(pattern, each) for each in texts):
            return texts[0]
    years = all(re.fullmatch(rf"{_YEAR}\.({_MONTH})", each) for each in texts)
    return next((each for each in texts if years and len(each) == len("2023.9")), "")


def one_format(values: Collection[str], where: str) -> str:
    """Return the format of all values, or raise a UsageError that begins with `where`."""
    found = date_formats(values)
    if len(found) == 1:
        return found[0]
    if not found:
        wrong = next((value for value in values if not date_formats([value])), None)
        reason = f"{wrong} is not a date" if wrong else "its dates have several formats"
        raise UsageError(f"{where}: {reason}: write dates like 2024-01-31")
    raise UsageError(f"{where}: {next(iter(values))} may be {' or '.join(found)}: write dates like 2024-01-31")


def _reads(value: str, style: str) -> bool:
    if style == ISO and (text := same(value)).isdecimal() and len(text) != 8:
        return False  # `fromisoformat` reads 20240131112 as a date and an hour.
    try:
        seconds(value, style)
    except (ValueError, OverflowError):
        return False
    return True
