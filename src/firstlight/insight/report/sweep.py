"""The sections of the report of a sweep."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from firstlight.insight.report import charts
from firstlight.insight.report.sections import Section, number

_MOST_AXES = 8


@dataclass(frozen=True)
class Trial:
    """A trial that has ended.

    Args:
        number: Its number, from 0.
        state: `"complete"`, `"pruned"` or `"failed"`.
        value: Best value of the monitored metric; NaN without one.
        values: What it has set, by option.
        steps: Optimiser steps.
        seconds: How long it took.
        run: Name of its run directory; `""` if it was refused.
        error: Why it failed; `""` if it did not.
    """

    number: int
    state: str
    value: float
    values: Mapping[str, Any]
    steps: int
    seconds: float
    run: str = ""
    error: str = ""


@dataclass(frozen=True)
class SweepFacts:
    """What the page of a sweep says beside its trials.

    Args:
        name: Name of the sweep.
        monitor: Metric that decides what is better.
        mode: Whether lower or higher values are better.
        verdicts: What the comparison with the starting configuration shows; empty without one.
        command: Command that trains the best configuration.
        best: Text of `best.yaml`.
    """

    name: str
    monitor: str
    mode: Literal["min", "max"]
    verdicts: Sequence[str]
    command: str
    best: str


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted name, or all of it where that is the name of several.

    >>> list(short_names(["a.lr", "b.lr", "data.batch_size"]).values())
    ['a.lr', 'b.lr', 'batch_size']
    """
    last = {name: name.rpartition(".")[2] for name in names}
    return {name: short if [*last.values()].count(short) == 1 else name for name, short in last.items()}


def sweep_sections(
    trials: Sequence[Trial], importance: Mapping[str, float], monitor: str, mode: Literal["min", "max"]
) -> list[Section]:
    """Return history, importance, parallel coordinates, cost and table of a sweep."""
    finite = [each for each in trials if math.isfinite(each.value)]
    complete = [each for each in finite if each.state == "complete"]
    sign = 1 if mode == "min" else -1
    order = sorted(complete, key=lambda each: sign * each.value)
    found = [_history(finite, complete, monitor, sign)] if complete else []
    if importance:
        text = "How much each option explains of the difference between good and other trials (PED-ANOVA)."
        short = short_names(importance)
        weights = {short[name]: each for name, each in sorted(importance.items(), key=lambda item: -item[1])}
        rows = [[name, f"{100 * weight:.0f} %"] for name, weight in weights.items()]
        found.append(Section("What matters", text, charts.bars(weights, "importance"), ["option", "importance"], rows))
    if len(complete) > 1 and (section := _parallel(finite, order[0], monitor)):
        found.append(section)
    counts = {state: sum(each.state == state for each in trials) for state in ("complete", "pruned", "failed")}
    kinds = ", ".join(f"{count} {state}" for state, count in counts.items())
    steps, seconds = sum(each.steps for each in trials), sum(each.seconds for each in trials)
    cost = f"{len(trials)} trials ({kinds}) with {steps:,} optimiser steps and {seconds:,.0f} seconds."
    names = list(dict.fromkeys(name for each in trials for name in each.values))
    others = sorted((each for each in trials if each not in order), key=lambda each: each.number)
    table = [
        [
            *(str(each.number), each.state, number(each.value) if math.isfinite(each.value) else "-"),
            *(_shown(each.values.get(name)) for name in names),
            *(f"{each.steps:,}", f"{each.seconds:.1f}", each.error or each.run),
        ]
        for each in [*order, *others]
    ]
    found.append(
        Section(
            "Trials",
            cost,
            "",
            ["trial", "state", monitor, *short_names(names).values(), "steps", "seconds", "run"],
            table,
        )
    )
    return found


def _history(finite: Sequence[Trial], complete: Sequence[Trial], monitor: str, sign: int) -> Section:
    def points(some: Sequence[Trial]) -> charts.Line:
        return np.array([each.number for each in some]), np.array([each.value for each in some])

    numbers, values = points(complete)
    best = sign * np.minimum.accumulate(sign * values)
    pruned = [each for each in finite if each.state == "pruned"]
    text = f"{monitor} of each trial. A pruned trial has ended before its plan, because others were better by then."
    chart = charts.history({"complete": (numbers, values), "pruned": points(pruned)}, (numbers, best), "trial", monitor)
    return Section("History", text, chart)


def _parallel(trials: Sequence[Trial], best: Trial, monitor: str) -> Section | None:
    """Return the parallel coordinates of options that are numbers."""
    columns: dict[str, tuple[charts.Numbers, bool]] = {}
    for name in dict.fromkeys(name for each in trials for name in each.values):
        given = [each.values.get(name) for each in trials]
        known = [each for each in given if isinstance(each, int | float) and not isinstance(each, bool)]
        if len(known) < 2 or len(set(known)) < 2 or len(columns) == _MOST_AXES:
            continue
        numbers = np.array([each if each in known else np.nan for each in given], np.float64)
        columns[name] = numbers, min(known) > 0 and max(known) / min(known) > 20
    if not columns:
        return None
    short = short_names(columns)
    columns = {short[name]: each for name, each in columns.items()}
    text = "Each line is a trial. The best one is thick."
    values = np.array([each.value for each in trials])
    return Section("Parallel coordinates", text, charts.parallel(columns, values, trials.index(best), monitor))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
