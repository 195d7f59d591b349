"""When to log from a hook that runs at every optimiser step, and under which step."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

__all__ = ["current_step", "is_due", "log", "should_log"]


def is_due(step: int, every: int) -> bool:
    """Tell whether the optimiser step with the index `step`, from 0, is logged when each `every`-th is, and none for 0.

    >>> [step for step in range(10) if is_due(step, 5)]
    [4, 9]
    """
    return every > 0 and (step + 1) % every == 0


def should_log(trainer: Trainer) -> bool:
    """Tell whether the optimiser step under way is logged."""
    return is_due(current_step(trainer), trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set outside the class


def log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give `values` to the loggers, at the step under way."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=current_step(trainer))


def current_step(trainer: Trainer) -> int:
    """Return the index of the step under way, which is where Lightning draws `train/*` of that step.

    With several optimisers that each step once a batch, `trainer.global_step` counts all of them.
    """
    return trainer.global_step // max(len(trainer.optimizers), 1)
