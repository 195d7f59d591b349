"""Read numbers that are written for people: 1,234.50, 1.234,50, 12% and $1,200."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from typing import Literal

from firstlight.data.cells import CURRENCY, is_missing, tidy
from firstlight.data.columns import is_number

Mark = Literal[".", ","]

_POINT_CURRENCIES = frozenset("$£¥₹") | {"USD", "GBP", "JPY", "CAD", "AUD", "CNY", "INR"}
"""Signs of amounts that are written with a decimal point and fewer than three decimals."""
_MINUS = "[-\u2212\u2013]"
_AMOUNT = re.compile(
    rf"(?P<sign>[+]|{_MINUS})?(?P<before>{CURRENCY})? ?(?P<minus>{_MINUS})?"
    rf"(?P<number>[\d.,].*?) ?(?P<after>%|{CURRENCY})?"
)
_SEPARATORS = {".": "[,' _]", ",": "[.' _]"}
"""What separates thousands, by decimal mark."""
_NUMBERS = {
    mark: re.compile(
        rf"[1-9]\d{{0,2}}({separator})\d{{3}}(\1\d{{3}})*([{mark}]\d*)?|(\d+[{mark}]?\d*|[{mark}]\d+)([eE][-+]?\d+)?"
    )
    for mark, separator in _SEPARATORS.items()
}
_DECIMAL = re.compile(r"[-+]?\d*\.(\d\d?|\d{4,})")
"""A number as a computer writes it, whose decimal point separates no thousands."""
_MIN_GROUPED = 10
"""Values like 1,234 that are thousands if 950 is in the column and no value is like 1,2 or 1200."""


def read_amount(value: str, mark: Mark) -> tuple[str, str] | None:
    """Return a number as a computer writes it, and its percent or currency sign; None if the value is none.

    >>> read_amount("$1,200.50", "."), read_amount("1.200,50 €", ","), read_amount("1,200", ",")
    (('1200.50', '$'), ('1200.50', '€'), ('1.200', ''))
    """
    found = _AMOUNT.fullmatch(tidy(value).replace("\u2019", "'"))  # The Swiss thousands separator.
    if not found or not _NUMBERS[mark].fullmatch(found["number"]) or (found["before"] and found["after"]):
        return None
    if found["sign"] and (found["minus"] or (found["sign"] == "+" and " " in found["number"])):  # +1 555 123 456
        return None
    minus = "-" if found["minus"] or found["sign"] not in (None, "+") else ""
    digits = re.sub(_SEPARATORS[mark], "", found["number"]).replace(mark, ".")
    return minus + digits, found["before"] or found["after"] or ""


def decimal_marks(values: Collection[str]) -> list[Mark]:
    """Return the decimal marks with which all values are numbers with the same sign; two if none is certain.

    >>> decimal_marks(["1,234,567", "1,234"]), decimal_marks(["0,25", "1,125"]), decimal_marks(["1,234", "5,678"])
    (['.'], [','], ['.', ','])
    """
    readings: dict[Mark, list[tuple[str, str]]] = {}
    marks: tuple[Mark, Mark] = (".", ",")
    for mark in marks:
        found = [each for each in takewhile(bool, (read_amount(value, mark) for value in values)) if each]
        if len(found) == len(values) and len({sign for _, sign in found}) == 1:
            readings[mark] = found
    if len(readings) < 2 or readings["."] == readings[","]:
        return [*readings][:1]
    sign = readings["."][0][1]
    if sign in _POINT_CURRENCIES:
        return ["."]
    grouped = {mark for value in values for mark in ".," if mark in value}
    plain = [value for value in values if not {*value} & {*".,"}]
    count = len(values) - len(plain)
    if sign != "%" and len(grouped) == 1 and count >= _MIN_GROUPED and plain:
        if all(len(re.sub(r"\D", "", value)) < 4 for value in plain):
            return ["." if grouped == {","} else ","]
    return [*readings]


def find_decimal_marks(table: Mapping[str, Iterable[str]]) -> dict[str, Mark]:
    """Return the decimal mark of each column that holds numbers for people.

    A column in which 1,234 may be 1234 or 1.234 follows the other columns of the table, if all of them that have
    decimals have the same mark. Otherwise it is left out.
    """
    found: dict[str, Mark] = {}
    uncertain = []
    seen: set[Mark] = set()
    for name, values in table.items():
        present = {value for value in values if not is_missing(value)}
        if all(map(is_number, present)):
            if any(map(_DECIMAL.fullmatch, present)):
                seen.add(".")
            continue
        marks = decimal_marks(present)
        if len(marks) == 1:
            found[name] = marks[0]
            seen |= {marks[0] for value in present if marks[0] in value}
        elif marks:
            uncertain.append(name)
    if len(seen) == 1:
        found |= dict.fromkeys(uncertain, seen.pop())
    return found
