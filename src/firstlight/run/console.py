"""The lines that a run prints. Each function returns its text."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "best",
    "changed",
    "data",
    "evaluated",
    "fitted",
    "interrupted",
    "no_training_logs",
    "nothing_to_do",
    "plan",
    "predicted",
    "resumed",
    "run_directory",
    "slow_loop",
    "tested",
]


def changed(path: str, before: Any, now: Any) -> str:
    """Return an option that differs from the saved configuration.

    >>> changed("trainer.max_epochs", 2, 3)
    'change trainer.max_epochs: 2 -> 3'
    """
    return f"change {path}: {before} -> {now}"


def resumed(run: Path, step: int, logged: int) -> str:
    """Return where a run resumes: `step` optimiser steps are in the checkpoint, `logged` in `metrics.csv`.

    >>> resumed(Path("runs/a"), 1200, 1240)
    'resume runs/a at step 1,200; the logged steps up to 1,240 are repeated'
    """
    repeated = f"; the logged steps up to {logged:,} are repeated" if logged > step else ""
    return f"resume {run} at step {step:,}{repeated}"


def data(sizes: Mapping[str, int], dropped: int) -> str:
    """Return the number of samples in each split, and how many samples were dropped.

    >>> data({"train": 1257, "val": 270}, dropped=2)
    'data   1,257 train, 270 val samples, 2 dropped'
    """
    text = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    return f"data   {text} samples" + (f", {dropped:,} dropped" if dropped else "")


def plan(parameters: int, total_steps: float, warmup_steps: int) -> str:
    """Return the number of trainable parameters and the length of the run.

    >>> plan(50826, 2400, 120)
    'plan   50,826 parameters, 2,400 optimiser steps, 120 of them warm-up'
    """
    steps = f"{total_steps:,} optimiser step{'s' * (total_steps != 1)}"
    return f"plan   {parameters:,} parameters, {steps}, {warmup_steps:,} of them warm-up"


def no_training_logs(every: int, total_steps: float) -> str:
    """Return that no training metric will be logged.

    >>> no_training_logs(500, 80)
    'log    no training metrics: --trainer.log_every_n_steps is 500, the run has 80 steps'
    """
    return f"log    no training metrics: --trainer.log_every_n_steps is {every:,}, the run has {total_steps:,} steps"


def slow_loop(reason: str) -> str:
    """Return that Lightning's own training loop is used.

    >>> slow_loop("a profiler is on")
    'loop   the fast loop is off, so steps take longer: a profiler is on'
    """
    return f"loop   the fast loop is off, so steps take longer: {reason}"


def fitted(epochs: int, steps: int, planned: float, stopped: bool) -> str:
    """Return the epochs and steps that a run has done; `stopped` is true when it was asked to stop early.

    >>> fitted(28, 1120, 2400, stopped=True)
    'fit    28 epochs, stopped early, 1,120 of 2,400 steps'
    """
    done = f"{steps:,} step{'s' * (steps != 1)}"
    how = f"stopped early, {steps:,} of {planned:,} steps" if stopped and steps < planned else done
    return f"fit    {epochs} epoch{'s' * (epochs != 1)}, {how}"


def nothing_to_do(steps: int, stopped: bool) -> str:
    """Return that a resumed run was finished already; `stopped` is true when it had stopped early.

    >>> nothing_to_do(2400, stopped=False)
    'fit    nothing to do: all 2,400 steps are done; increase --trainer.max_epochs to continue'
    >>> nothing_to_do(1840, stopped=True)
    'fit    nothing to do: stopped early after 1,840 steps; increase --early_stopping.patience to continue'
    """
    done = f"stopped early after {steps:,} steps" if stopped else f"all {steps:,} steps are done"
    option = "--early_stopping.patience" if stopped else "--trainer.max_epochs"
    return f"fit    nothing to do: {done}; increase {option} to continue"


def best(metrics: Mapping[str, float]) -> str:
    """Return when the best checkpoint was written, and its metrics; without metrics, that there is none.

    >>> best({"epoch": 3, "step": 120, "val/loss": 0.57012634})
    'best   epoch 3, step 120, val/loss 0.570126'
    """
    return f"best   {_listed(metrics) or 'none: the run ended before its first validation'}"


def tested(metrics: Mapping[str, float]) -> str:
    """Return the test metrics of the best checkpoint."""
    return f"test   {_listed(metrics)} (best checkpoint)"


def evaluated(verb: str, metrics: Mapping[str, float], checkpoint: Path, folder: Path) -> str:
    """Return the metrics of a checkpoint, and the folder that holds them."""
    return f"{verb:<8} {_listed(metrics)} ({checkpoint})\nwrote    {folder}"


def predicted(samples: int, checkpoint: Path, path: Path) -> str:
    """Return the number of predictions, and the file that holds them."""
    return f"predict  {samples:,} samples ({checkpoint})\nwrote    {path}"


def run_directory(run: Path, tensorboard: bool) -> str:
    """Return where the run is; with `tensorboard`, also how to look at it."""
    return f"run    {run}" + (f"\nlook   tensorboard --logdir {run.parent}" if tensorboard else "")


def interrupted(step: int, checkpoints: Collection[str], resume: str | None) -> str:
    """Return where a fit was interrupted, and the command that resumes it or else the checkpoints that exist.

    >>> interrupted(1200, ["last.ckpt"], "firstlight fit --run runs/a")
    'interrupted at step 1,200; resume with: firstlight fit --run runs/a'
    >>> interrupted(1200, ["best.ckpt"], None)
    'interrupted at step 1,200; checkpoints: best.ckpt'
    """
    then = f"resume with: {resume}" if resume else f"checkpoints: {', '.join(checkpoints) or 'none'}"
    return f"interrupted at step {step:,}; {then}"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
