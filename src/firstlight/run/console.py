"""The lines that a run prints."""

from collections.abc import Mapping

__all__ = ["data", "fitted", "listed", "nothing", "plan"]


def listed(values: Mapping[str, float]) -> str:
    """Return names and values in one line.

    >>> listed({"step": 720, "val/loss": 0.57012634})
    'step 720, val/loss 0.570126'
    """
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def data(sizes: Mapping[str, int], dropped: int) -> str:
    """Return the samples of each split, and how many were left out.

    >>> data({"train": 1257, "val": 270}, dropped=2)
    'data   1,257 train, 270 val samples, 2 dropped'
    """
    text = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    return f"data   {text} samples" + (f", {dropped:,} dropped" if dropped else "")


def plan(parameters: int, total_steps: float, warmup_steps: int) -> str:
    """Return what a run is going to do.

    >>> plan(50826, 2400, 120)
    'plan   50,826 parameters, 2,400 optimiser steps, 120 of them warm-up'
    """
    steps = f"{total_steps:,} optimiser step{'s' * (total_steps != 1)}"
    return f"plan   {parameters:,} parameters, {steps}, {warmup_steps:,} of them warm-up"


def nothing(steps: int, stopped: bool) -> str:
    """Return that a run is at its end; `stopped` tells that it was stopped early.

    >>> nothing(2400, stopped=False)
    'fit    nothing to do: all 2,400 steps are done; a larger --trainer.max_epochs goes on'
    >>> nothing(1840, stopped=True)
    'fit    nothing to do: stopped early after 1,840 steps; a larger --early_stopping.patience goes on'
    """
    if stopped:
        return f"fit    nothing to do: stopped early after {steps:,} steps; a larger --early_stopping.patience goes on"
    return f"fit    nothing to do: all {steps:,} steps are done; a larger --trainer.max_epochs goes on"


def fitted(epochs: int, steps: int, planned: float, stopped: bool) -> str:
    """Return what a run has done; `stopped` tells that something asked it to end.

    >>> fitted(28, 1120, 2400, stopped=True)
    'fit    28 epochs, stopped early, 1,120 of 2,400 steps'
    """
    done = f"{steps:,} step{'s' * (steps != 1)}"
    how = f"stopped early, {steps:,} of {planned:,} steps" if stopped and steps < planned else done
    return f"fit    {epochs} epoch{'s' * (epochs != 1)}, {how}"
