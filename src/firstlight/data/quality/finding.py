"""What firstlight sees in data and in recorded series, in words and with figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["high", "medium", "low"]

_ORDER: tuple[Severity, ...] = ("high", "medium", "low")


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about.

    Args:
        name: What kind of finding it is, in one or two words.
        severity: `"high"`: scores are probably wrong. `"medium"`: scores are probably worse, or less sure, than they
            look. `"low"`: good to know.
        text: What was found, with its figures.
        evidence: The figures, by name; plain numbers.
        advice: What to do.
    """

    name: str
    severity: Severity
    text: str
    evidence: Mapping[str, float]
    advice: str

    def __str__(self) -> str:
        """Return text and advice in one line.

        >>> print(Finding("constant", "low", "column a has one value", {"columns": 1}, "leave it out"))
        column a has one value: leave it out
        """
        return f"{self.text}: {self.advice}"

    def plain(self) -> dict[str, Any]:
        """Return the finding as plain values, for `results.json`."""
        return {**asdict(self), "evidence": dict(self.evidence)}


def most_severe_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings by severity; equal ones keep their order."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))
