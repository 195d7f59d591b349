"""What may end a run before its plan, and what ended it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from firstlight.callbacks.time_limit import TimeLimit

_REASONS = {
    EarlyStoppingReason.STOPPING_THRESHOLD: "stopping_threshold",
    EarlyStoppingReason.DIVERGENCE_THRESHOLD: "divergence_threshold",
    EarlyStoppingReason.NON_FINITE_METRIC: "check_finite",
}
"""Options of EarlyStopping that stop a run for another reason than its patience."""


@dataclass(frozen=True)
class Ending:
    """Why a run has ended, in a few words, and how to train on."""

    cause: str
    advice: str


def caveat(callbacks: Sequence[Callback], own: Sequence[Callback]) -> str:
    """Return what keeps the schedule from its end as a clause, or `""`.

    >>> caveat([Timer("00:01:00:00")], own=[])
    '; trainer.max_time may end the run before the schedule ends'
    """
    for each in callbacks:
        if isinstance(each, Timer) and each.time_remaining() is not None:
            return f"; {_timer(each, own)} may end the run before the schedule ends"
        if isinstance(each, StochasticWeightAveraging):
            return f"; {type(each).__name__} replaces the schedule in the epochs that it averages"
    return ""


def find_ending(trainer: Trainer, callbacks: Sequence[Callback], own: Sequence[Callback]) -> Ending | None:
    """Return what stopped a run before its plan, or `None` if it reached its epochs or steps.

    Args:
        trainer: The trainer after the fit.
        callbacks: Its callbacks.
        own: Those among them that are not default ones.
    """
    if not trainer.should_stop:
        return None
    if any(isinstance(each, TimeLimit) and each.is_over for each in callbacks):
        return Ending("stopped by --time", "increase --time")
    for each in callbacks:
        if isinstance(each, Timer) and (left := each.time_remaining()) is not None and left <= 0:
            option = _timer(each, own)
            return Ending(f"stopped by {option}", f"increase {'--' * option.startswith('trainer')}{option}")
    for each in callbacks:
        if isinstance(each, EarlyStopping):
            prefix = f"{type(each).__name__}." if each in own else "--early_stopping."
            if each.wait_count >= each.patience:
                return Ending("stopped early", f"increase {prefix}patience")
            if option := _REASONS.get(each.stopping_reason, ""):
                return Ending(f"stopped early by {option}", f"change {prefix}{option}")
    return Ending("stopped by a callback or the module", "change it")


def stopped_early(callbacks: Sequence[Callback]) -> bool:
    """Return whether the monitored metric had stopped improving for the whole patience."""
    return any(isinstance(each, EarlyStopping) and each.wait_count >= each.patience for each in callbacks)


def missed_average(trainer: Trainer, callbacks: Sequence[Callback]) -> str:
    """Return that the run ended before an average of its weights was set, in one line, or `""`."""
    for each in callbacks:
        if isinstance(each, StochasticWeightAveraging) and 0 < trainer.current_epoch <= each.swa_end:
            return (
                f"average  none: the run ended after epoch {trainer.current_epoch:,}, and {type(each).__name__} sets "
                f"its average after epoch {each.swa_end + 1:,}; all checkpoints hold weights that are not averaged"
            )
    return ""


def limit(trainer: Trainer) -> str:
    """Return the option to increase for a run that has done all planned steps."""
    is_by_steps = 0 <= trainer.max_steps <= trainer.global_step
    return "--trainer.max_steps" if is_by_steps else "--trainer.max_epochs"


def _timer(timer: Timer, own: Sequence[Callback]) -> str:
    """Return the option or the class that sets the time: the trainer makes a Timer for `max_time`."""
    return type(timer).__name__ if timer in own else "trainer.max_time"


def no_best(trainer: Trainer, monitor: str) -> str:
    """Return why a run that has ended has no best checkpoint."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
        return "fast_dev_run writes no checkpoint"
    if trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed:
        return f"{monitor} was a number in no validation"
    return "the run ended before its first validation"
