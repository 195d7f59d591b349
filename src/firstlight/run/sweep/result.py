"""Lines and report of a sweep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from firstlight.errors import say
from firstlight.insight.report import SweepFacts, Trial, short_names, sweep_page
from firstlight.run import directory
from firstlight.run.sweep.space import Parameter, Space
from firstlight.run.sweep.study import Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_SHOWN = 5


def trial_line(number: int, state: str, monitor: str, notes: Mapping[str, Any]) -> str:
    """Return what is printed of a trial that has ended.

    >>> notes = {"value": 0.5, "steps": 40, "seconds": 1.0, "values": {"model.optimizer.lr": 0.00123456}}
    >>> trial_line(7, "complete", "val/loss", notes)
    'trial  7: val/loss 0.5, 40 steps, 1.0 s; lr 0.001235'
    """
    short = short_names(notes["values"])
    values = ", ".join(f"{short[name]} {shown(value)}" for name, value in notes["values"].items())
    if "error" in notes:
        return f"trial  {number}: {'failed' if state == 'failed' else 'diverged'}: {notes['error']}; {values}"
    how = "pruned, " if state == "pruned" else ""
    cost = f"{notes['steps']:,} steps, {notes['seconds']} s"
    return f"trial  {number}: {how}{monitor} {notes['value']:.6g}, {cost}; {values}"


def shown(value: Any) -> str:
    """Return a value of an option in few characters.

    >>> shown(0.00123456), shown([64, 32]), shown("torch.optim.SGD")
    ('0.001235', '[64, 32]', 'SGD')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)


def say_space(space: Space, own: Mapping[str, Any], folder: Path, trials: int | None) -> None:
    """Print what is searched."""
    for name, each in space.items():
        say(f"space  {name}: {_range(each)}, now {shown(own.get(name))}")
    say(f"sweep  {folder}: {'until the time is over' if trials is None else f'{trials} trials'}")


def _range(parameter: Parameter) -> str:
    if parameter.choices:
        text = "one of " + ", ".join(map(shown, parameter.choices))
    else:
        text = f"{parameter.low:g} to {parameter.high:g}{' (log)' if parameter.log else ''}"
    if parameter.length is not None:
        text = f"{parameter.length[0]} to {parameter.length[1]} values, each {text}"
    when = [f"{name} is {' or '.join(map(shown, values))}" for name, values in parameter.when.items()]
    return text + (f" when {' and '.join(when)}" if when else "")


def write_best(study: Study, folder: Path) -> Path:
    """Write `best.yaml`, the configuration of the best trial, and return its path."""
    assert study.best is not None
    config = directory.load_config(Path(study.best.user_attrs["run"]))
    for name in ("experiment", "runs"):
        config.pop(name, None)
    notes = f"# Trial {study.best.number} of {folder}\n"
    directory.write_text(folder / "best.yaml", notes + yaml.safe_dump(config, sort_keys=False))
    return folder / "best.yaml"


def say_result(study: Study, monitor: str, folder: Path) -> None:
    """Print the best trials, what matters, and what it has cost."""
    for trial in _best(study)[:_SHOWN]:
        say(f"best   {trial_line(trial.number, 'complete', monitor, trial.user_attrs).removeprefix('trial  ')}")
    if weights := study.importance():
        say("matter " + ", ".join(f"{short_names(weights)[name]} {100 * each:.0f} %" for name, each in weights.items()))
    trials = study.trials
    counts = {state: sum(each.state.name == state for each in trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
    steps = sum(each.user_attrs.get("steps", 0) for each in trials)
    seconds = sum(each.user_attrs.get("seconds", 0.0) for each in trials)
    kinds = f"{counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed"
    say(f"cost   {len(trials)} trials ({kinds}), {steps:,} optimiser steps, {seconds:,.0f} s")
    say(f"use    firstlight run --config {folder / 'best.yaml'}", always=True)


def _best(study: Study) -> "list[FrozenTrial]":
    """Return the complete trials, the best first."""
    complete = [each for each in study.trials if each.state.name == "COMPLETE" and each.value is not None]
    sign = 1 if study.mode == "min" else -1
    return sorted(complete, key=lambda each: sign * (each.value if each.value is not None else math.inf))


def write_report(study: Study, monitor: str, folder: Path, verdicts: Sequence[str]) -> Path:
    """Write `report.html` of a sweep, and return its path."""
    trials = []
    for each in study.trials:
        if each.state.is_finished():
            notes = each.user_attrs
            value = notes.get("value")
            trials.append(
                Trial(
                    number=each.number,
                    state={"COMPLETE": "complete", "PRUNED": "pruned"}.get(each.state.name, "failed"),
                    value=math.nan if value is None else value,
                    values=notes.get("values", {}),
                    steps=notes.get("steps", 0),
                    seconds=notes.get("seconds", 0.0),
                    run=Path(notes.get("run", "")).name,
                    error=notes.get("error", ""),
                )
            )
    best = folder / "best.yaml"
    command, text = f"firstlight run --config {best}", best.read_text(encoding="utf-8")
    facts = SweepFacts(folder.name, monitor, study.mode, verdicts, command, text)
    directory.write_text(folder / "report.html", sweep_page(trials, study.importance(), facts))
    return folder / "report.html"
