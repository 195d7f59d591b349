"""`firstlight compare`: print how runs differ, in one of five formats."""

import csv
import html
import io
import json
import math
from collections.abc import Callable, Sequence

from firstlight.cli.tools import ToolParser
from firstlight.errors import aligned, printable
from firstlight.insight.compare import Difference, Interval
from firstlight.run.comparison import LETTERS, Comparison, compare_runs

_HELP = """firstlight compare RUN RUN [RUN ...]                  runs, on the same test samples
       firstlight compare runs/EXPERIMENT runs/EXPERIMENT    all runs of experiments, with one configuration as a side
       firstlight compare 'runs/digits_*/2026-11-30*'        a pattern

The first one is A, and each of the others is compared with it."""

Table = list[list[str]]
"""Rows of cells; the first one is the heading."""


def compare(args: list[str]) -> None:
    """Print what differs between runs, their metrics, the differences, and a verdict."""
    found = compare_parser().options(args, "runs", "runs")
    print(printable(FORMATS[found.format](compare_runs(found.runs, found.metric, found.split))))


def compare_parser() -> ToolParser:
    """Return the parser of `compare`."""
    description = "Compare runs: what differs, metrics and differences with 95 % intervals, and a verdict."
    parser = ToolParser("compare", _HELP, description)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Run, experiment folder, or pattern with *.")
    main = "accuracy, r2, bits_per_byte, nn_accuracy or loss"
    parser.add_argument("--metric", help=f"Metric of the verdict; default: {main}.")
    parser.add_argument("--split", choices=("test", "val"), help="Compared samples; default: test, val for folds.")
    parser.add_argument("--format", choices=FORMATS, default="table", help="Default: table.")
    return parser


def as_table(comparison: Comparison) -> str:
    """Return a comparison for a terminal."""
    blocks = ["\n".join([title, *aligned(table)]) for title, table in _tables(comparison).items()]
    return "\n\n".join([*blocks, "\n".join(_sentences(comparison))])


def as_markdown(comparison: Comparison) -> str:
    """Return a comparison as Markdown."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    blocks = []
    for title, (heading, *rows) in _tables(comparison).items():
        lines = [row(heading), f"|{'---|' * len(heading)}", *map(row, rows)]
        blocks.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join([*blocks, "\n".join(f"- {each}" for each in _sentences(comparison))])


def as_html(comparison: Comparison) -> str:
    """Return a comparison as a page that needs no other file."""

    def row(cells: Sequence[str], tag: str = "td") -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>firstlight compare</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><style>',
        ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:70rem;",
        "padding:0 1rem}div{overflow-x:auto}table{border-collapse:collapse}caption{text-align:left;font-weight:bold}",
        "th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8886}</style></head><body>",
        "<h1>firstlight compare</h1>",
        *(f"<p>{html.escape(each)}</p>" for each in _sentences(comparison)),
    ]
    for title, (heading, *rows) in _tables(comparison).items():
        body = "".join(map(row, rows))
        parts.append(f"<div><table><caption>{html.escape(title)}</caption>{row(heading, 'th')}{body}</table></div>")
    return "\n".join([*parts, "</body></html>"])


def as_csv(comparison: Comparison) -> str:
    """Return the metrics and differences as CSV, a line for each side and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("difference", "difference_low", "difference_high", "p", "shown")
    writer.writerow(["side", "label", "runs", "metric", "value", "low", "high", *columns])
    for name, intervals in comparison.metrics.items():
        for place, (side, each) in enumerate(zip(comparison.sides, intervals, strict=True)):
            values = [LETTERS[place], side.label, len(side.runs), name, each.value, each.low, each.high]
            if place:
                found = comparison.differences[name][place - 1]
                values += [found.value, found.low, found.high, found.p, found.is_shown]
            writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return text.getvalue().rstrip("\n")


def as_json(comparison: Comparison) -> str:
    """Return a comparison as one JSON object."""

    def plain(found: Interval) -> dict[str, object]:
        return {name: None if value != value else value for name, value in vars(found).items()}

    content = {
        "split": comparison.split,
        "metric": comparison.metric,
        "sides": {
            letter: {"label": side.label, "kind": side.kind, "runs": [str(run.path) for run in side.runs]}
            for letter, side in zip(LETTERS, comparison.sides, strict=False)
        },
        "options": {name: _lettered(values) for name, values in comparison.options.items()},
        "metrics": {name: _lettered(map(plain, each)) for name, each in comparison.metrics.items()},
        "differences": {name: _lettered(map(plain, each), 1) for name, each in comparison.differences.items()},
        "verdicts": _lettered(comparison.verdicts, 1),
        "notes": comparison.notes,
    }
    return json.dumps(content, indent=2)


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": as_table,
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "html": as_html,
}


def _lettered(values: object, start: int = 0) -> dict[str, object]:
    return dict(zip(LETTERS[start:], values, strict=False))  # type: ignore[call-overload]  # any iterable


def _tables(comparison: Comparison) -> dict[str, Table]:
    """Return the tables of a comparison by title."""
    letters = list(LETTERS[: len(comparison.sides)])
    kinds = {"run": "run", "seeds": "runs with other seeds", "folds": "folds"}
    sides = [
        [letter, side.label, f"{len(side.runs)} {kinds[side.kind]}"]
        for letter, side in zip(letters, comparison.sides, strict=True)
    ]
    tables = {"compared": [["", "runs", "number"], *sides]}
    if comparison.options:
        rows = [[name, *map(_shortened, values)] for name, values in comparison.options.items()]
        tables["options that differ"] = [["option", *letters], *rows]
    metrics = [[name, *map(_interval, each)] for name, each in comparison.metrics.items()]
    tables[f"{comparison.split} metrics, with 95 % intervals"] = [["metric", *letters], *metrics]
    pairs = [f"{letter} - A" for letter in letters[1:]]
    tables["differences (* is not 0)"] = [
        ["metric", *pairs],
        *([name, *map(_difference, each)] for name, each in comparison.differences.items()),
    ]
    return tables


def _sentences(comparison: Comparison) -> list[str]:
    return [*(f"verdict: {each}" for each in comparison.verdicts), *(f"note: {each}" for each in comparison.notes)]


def _interval(found: Interval) -> str:
    ends = "" if math.isnan(found.low) else f" ({_number(found.low)} to {_number(found.high)})"
    return _number(found.value) + ends


def _difference(found: Difference) -> str:
    return _interval(found) + (" *" if found.is_shown else "")


def _number(value: float) -> str:
    """Return a number with four decimals, or with four significant digits if it is large or small.

    >>> _number(0.98765), _number(1234.5), _number(0.00001234)
    ('0.9877', '1234', '1.234e-05')
    """
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or not value else f"{value:.4g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
