"""When to log from a hook that runs at every optimiser step, and under which step."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

__all__ = ["current_step", "is_due", "log", "should_log", "validation_follows"]


def is_due(step: int, every: int) -> bool:
    """Tell whether the optimiser step with the index `step`, from 0, is logged when each `every`-th is, and none for 0.

    >>> [step for step in range(10) if is_due(step, 5)]
    [4, 9]
    """
    return every > 0 and (step + 1) % every == 0


def should_log(trainer: Trainer) -> bool:
    """Tell whether the optimiser step under way is logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
    # As `is_due(current_step(trainer), every)`, in half the calls: callbacks ask at each step.
    return every > 0 and (trainer.global_step // max(len(trainer.strategy.optimizers), 1) + 1) % every == 0


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether a validation follows this batch before the next, or the epoch ends with it.

    Lightning 2.6.6 never runs the validation that was due when a checkpoint was written between the two.
    """
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if trainer.is_last_batch or not trainer.enable_validation or every is None:
        return trainer.is_last_batch
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % every == 0


def log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give `values` to the loggers, at the step under way; those that can `keep` them write all of a step at once."""
    step = current_step(trainer)
    for logger in trainer.loggers:
        getattr(logger, "keep", logger.log_metrics)(dict(values), step=step)


def current_step(trainer: Trainer) -> int:
    """Return the index of the step under way, which is where Lightning draws `train/*` of that step.

    With several optimisers that each step once a batch, `trainer.global_step` counts all of them.
    """
    return trainer.global_step // max(len(trainer.optimizers), 1)
