"""What firstlight sees in data and in recorded series, in words and with figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["fault", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about.

    Args:
        name: What kind of finding it is.
        severity: `"fault"`: the run learns nothing, or its scores are probably wrong. `"warning"`: scores are probably
            worse, or less sure, than they look. `"info"`: good to know.
        text: What was found, with its figures.
        evidence: The figures, by name; plain numbers.
        advice: What to do.
        epoch: Epoch, from 0, in which it was first true; None for findings in data.
        step: Optimiser step, from 0, in which it was first true.
    """

    name: str
    severity: Severity
    text: str
    evidence: Mapping[str, float]
    advice: str
    epoch: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        """Return text and advice in one line.

        >>> print(Finding("constant", "info", "column a has one value", {"columns": 1}, "leave it out"))
        column a has one value: leave it out
        """
        return f"{self.text}: {self.advice}"

    @property
    def line(self) -> str:
        """The finding as a run prints it.

        >>> print(Finding("constant", "info", "column a has one value", {"columns": 1}, "leave it out").line)
        info constant: column a has one value: leave it out
        """
        return f"{self.severity} {self.name}: {self}"

    def plain(self) -> dict[str, Any]:
        """Return the finding as plain values, for `results.json`."""
        return {**asdict(self), "evidence": dict(self.evidence)}


def most_severe_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings by severity; equal ones keep their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names in one text, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
