"""The longer lines that a run prints. Each function returns its text."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.data.quality.finding import Finding

_MAX_CLASSES = 3  # Classes with a line of their own.
_MAX_FINDINGS = 5
_MAX_SEEN = 3


def resumed(run: Path, step: int, logged: int) -> str:
    """Return where a run resumes: `step` optimiser steps are in the checkpoint, `logged` in `metrics.csv`.

    >>> resumed(Path("runs/a"), 1200, 1240)
    'resume runs/a at step 1,200; the logged steps up to 1,240 are repeated'
    """
    repeated = f"; the logged steps up to {logged:,} are repeated" if logged > step else ""
    return f"resume {run} at step {step:,}{repeated}"


def data(sizes: Mapping[str, int], dropped: int, split_by: str = "") -> str:
    """Return the number of samples in each split, how many were dropped, and what decided the split.

    >>> data({"train": 1257, "val": 270}, dropped=2)
    'data   1,257 train, 270 val samples, 2 dropped'
    """
    text = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    text += " samples" + (f", {dropped:,} dropped" if dropped else "")
    return f"data   {text}" + (f"; {split_by}" if split_by else "")


def findings(found: Sequence[Finding]) -> list[str]:
    """Return a line for each of the first five findings, and one that counts the others.

    >>> findings([Finding("constant", "info", "column a has one value", {}, "leave it out")])
    ['data   column a has one value: leave it out']
    """
    lines = [f"data   {finding}" for finding in found[:_MAX_FINDINGS]]
    others = len(found) - len(lines)
    more = f"data   {others} more finding{'s' * (others != 1)}: see results.json, or firstlight check"
    return [*lines, more] if others else lines


def seen(found: Sequence[Finding], told: Collection[str] = ()) -> list[str]:
    """Return lines for the findings of a run at its end: the first three that were not told before, and the others.

    Args:
        found: The findings, the likeliest cause first.
        told: Names of those whose text stands above already.

    >>> flat = Finding("plateau", "info", "val/loss is flat since epoch 7", {}, "stop there", epoch=6)
    >>> seen([flat])
    ['seen   info plateau: val/loss is flat since epoch 7: stop there']
    >>> seen([flat], {"plateau"})
    ['seen   still true at the end: plateau (epoch 7)']
    """
    old, new = ([each for each in found if (each.name in told) == is_told] for is_told in (True, False))
    lines = [f"seen   {finding.line}" for finding in new[:_MAX_SEEN]]
    if len(new) > _MAX_SEEN:
        lines.append(f"seen   {len(new) - _MAX_SEEN} more: see findings in results.json")
    if old:
        names = ", ".join(each.name + (f" (epoch {each.epoch + 1})" if each.epoch is not None else "") for each in old)
        order = ", the likeliest cause first" if len(old) > 1 else ""
        lines.insert(0 if found[0] in old else len(lines), f"seen   still true at the end{order}: {names}")
    return lines


def plan(parameters: int, total_steps: float, warmup_steps: int | None, caveat: str = "") -> str:
    """Return the number of trainable parameters, the length of the run, and what keeps the schedule from its end.

    `None` warm-up steps: the module is not a task, and its steps are those of its own loop.

    >>> plan(50826, 2400, 120)
    'plan   50,826 parameters, 2,400 optimiser steps, 120 of them warm-up'
    >>> plan(50826, 2400, None)
    'plan   50,826 parameters, 2,400 steps'
    >>> plan(50826, float("inf"), 0)
    'plan   50,826 parameters, no limit of optimiser steps'
    """
    unit, warmup = ("step", "") if warmup_steps is None else ("optimiser step", f", {warmup_steps:,} of them warm-up")
    steps = f"{total_steps:,} {unit}{'s' * (total_steps != 1)}{warmup}"
    if total_steps == math.inf:
        steps = f"no limit of {unit}s" + (f", the first {warmup_steps:,} are warm-up" if warmup_steps else "")
    return f"plan   {parameters:,} parameters, {steps}{caveat}"


def timed_plan(parameters: int, time: str, limit: float) -> str:
    """Return the number of trainable parameters, and that a time decides the number of steps, at most `limit`.

    >>> timed_plan(50826, "10m", float("inf"))
    'plan   50,826 parameters, as many steps as fit into 10m; the clock decides, so a resumed run is not exact'
    """
    most = f", at most {limit:,}" if math.isfinite(limit) else ""
    steps = f"as many steps as fit into {time}{most}"
    return f"plan   {parameters:,} parameters, {steps}; the clock decides, so a resumed run is not exact"


def fitted(epochs: int, steps: int, planned: float, cause: str = "") -> str:
    """Return the epochs and steps that a run has done, and the `cause` if something stopped it before its plan.

    >>> fitted(28, 1120, 2400, "stopped early")
    'fit    28 epochs, stopped early, 1,120 of 2,400 steps'
    >>> fitted(28, 1120, float("inf"), "stopped early")
    'fit    28 epochs, stopped early, 1,120 steps'
    """
    done = f"{steps:,} step{'s' * (steps != 1)}"
    known = done if planned == math.inf else f"{steps:,} of {planned:,} steps"
    how = f"{cause}, {known}" if cause and steps < planned else done
    return f"fit    {epochs} epoch{'s' * (epochs != 1)}, {how}"


def nothing_to_do(steps: int, cause: str, advice: str) -> str:
    """Return the line for a resumed run that has nothing left to train.

    Args:
        steps: Steps done.
        cause: What stopped the run, or `""` if it did all its steps.
        advice: How to train on.

    >>> nothing_to_do(2400, "", "increase --trainer.max_epochs")
    'fit    nothing to do: all 2,400 steps are done; increase --trainer.max_epochs to continue'
    """
    done = f"{cause} after {steps:,} steps" if cause else f"all {steps:,} steps are done"
    return f"fit    nothing to do: {done}; {advice} to continue"


def best(metrics: Mapping[str, float], none: str) -> str:
    """Return when the best checkpoint was written, and its metrics; without metrics, why there is `none`.

    >>> best({"epoch": 3, "step": 120, "val/loss": 0.57012634}, none="")
    'best   epoch 3, step 120, val/loss 0.570126'
    """
    return f"best   {listed(metrics) or f'none: {none}'}"


def refit(samples: int, steps: int, follows_fit: bool) -> str:
    """Return what a refit trains on, for how long, and why.

    >>> refit(1527, 144, follows_fit=True)
    'refit  1,527 training and validation samples, 144 steps: the epochs and learning rates up to the best checkpoint'
    >>> refit(1527, 80, follows_fit=False)
    'refit  1,527 training and validation samples, 80 steps: as many as the best checkpoint, with a schedule of its own'
    """
    same = "the epochs and learning rates up to the best checkpoint"
    how = same if follows_fit else "as many as the best checkpoint, with a schedule of its own"
    return f"refit  {samples:,} training and validation samples, {steps:,} steps: {how}"


def classes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines for classes that are rare or badly found, the worst first; `found` by class, see `per_class`.

    Rare is a class with less than 10 % of the samples and less than half of an equal share. Badly found is a class with
    a recall below 0.5. Without samples, a class has no recall.

    >>> print(*classes({
    ...     "stay": {"samples": 90, "precision": 0.9, "recall": 1.0},
    ...     "leave": {"samples": 10, "precision": None, "recall": 0.0},
    ... }))
    class  leave: recall 0, never predicted, 10 of 100 samples
    """
    total = sum(each["samples"] for each in found.values())
    few = min(0.1, 0.5 / max(len(found), 1)) * total
    seen = {name: each for name, each in found.items() if each["samples"]}
    shown = {name: each for name, each in seen.items() if each["samples"] < few or each["recall"] < 0.5}
    worst = sorted(shown, key=lambda name: shown[name]["recall"])
    lines = []
    for name in worst[:_MAX_CLASSES]:
        each = shown[name]
        precise = "never predicted" if each["precision"] is None else f"precision {each['precision']:.3g}"
        lines.append(f"class  {name}: recall {each['recall']:.3g}, {precise}, {each['samples']:,} of {total:,} samples")
    if (more := len(worst) - _MAX_CLASSES) > 0:
        lines.append(f"class  {more:,} more that are rare or have a recall below 0.5: see per_class in results.json")
    return lines


def interrupted(step: int, checkpoints: Collection[str], resume: str | None) -> str:
    """Return where a fit was interrupted, and the command that resumes it or else the checkpoints that exist.

    >>> interrupted(1200, ["last.ckpt"], "firstlight fit --run runs/a")
    'interrupted at step 1,200; resume with: firstlight fit --run runs/a'
    >>> interrupted(1200, ["best.ckpt"], None)
    'interrupted at step 1,200; checkpoints: best.ckpt'
    """
    then = f"resume with: {resume}" if resume else f"checkpoints: {', '.join(checkpoints) or 'none'}"
    return f"interrupted at step {step:,}; {then}"


def listed(metrics: Mapping[str, float]) -> str:
    """Return the names and values of metrics in one line.

    >>> listed({"step": 1_440_000, "val/loss": 0.57012634})
    'step 1,440,000, val/loss 0.570126'
    """
    return ", ".join(f"{name} {value:{',' if isinstance(value, int) else '.6g'}}" for name, value in metrics.items())
