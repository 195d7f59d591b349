"""Show how far a run is: a bar in a terminal, elsewhere a line an epoch, or JSON objects."""

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from firstlight.callbacks.measured import Measured
from firstlight.callbacks.time_limit import TimeLimit
from firstlight.errors import check_saved, current_mode, emit, printable
from firstlight.loggers import split_of, steps_done

_MAX_SHOWN = 4  # Metrics of a line.
_BAR = "{desc}{percentage:3.0f}%|{bar}| {remaining} left{postfix}"


class Progress(ProgressBar):
    """One bar for the whole fit, with the time left, the newest losses and the best so far; one for each evaluation.

    The bar is drawn every `redraw_every` seconds; other batches only compare two numbers. If standard error is a file
    or a dumb terminal, each epoch has a line instead, and so has a validation within an epoch. `--quiet` shows neither;
    `--json` prints an `epoch` or `validation` object instead of the line.

    Lightning 2.6.6's `TQDMProgressBar` has one bar for each epoch and one for each validation.

    Args:
        redraw_every: Seconds between two drawings.

    Attributes:
        last_step: Optimiser steps after which something stops the fit, if the trainer plans more.
    """

    def __init__(self, redraw_every: float = 0.2) -> None:
        super().__init__()
        self.redraw_every = redraw_every
        self.last_step = math.inf
        self._enabled = True
        self._measured = Measured()
        self._bar: tqdm[Any] = tqdm(disable=True)

    def disable(self) -> None:
        """Draw nothing. Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint restores its own fit afterwards."""
        super().setup(trainer, pl_module, stage)
        self._measured = Measured()

    def state_dict(self) -> dict[str, Any]:
        """Return which metrics were logged so far."""
        return {"known": self._measured.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        check_saved("Progress", state_dict, known=list[str])
        self._measured = Measured(state_dict["known"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the values of earlier epochs are old."""
        self._measured.start_epoch()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar, at the step from which a run resumes."""
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        total = trainer.num_training_batches * epochs if epochs > 0 else math.inf
        last_step = min(self.last_step, trainer.max_steps if trainer.max_steps >= 0 else math.inf)
        total = min(total, last_step * trainer.accumulate_grad_batches)
        self._total, self._first = total, trainer.fit_loop.total_batch_idx + 1
        self._started, self._step, self._has_validated = time.monotonic(), steps_done(trainer), False
        self._open("", total, self._first)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless the validation is part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open("validate ", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open("test ", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open("predict ", sum(trainer.num_predict_batches))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count a batch."""
        if self._bar.update():  # It was drawn; the next drawing shows what is known now.
            self._describe(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count a batch, unless the validation is part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._bar.update()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._bar.update()

    on_predict_batch_end = on_test_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, or tell of a validation within an epoch."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._bar.close()
        elif not trainer.sanity_checking:
            self._has_validated = True
            self._measured.end_validation(trainer)
            if not trainer.is_last_batch:
                self._tell(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the epoch."""
        self._tell(trainer, "epoch")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar, so that what follows starts on a line of its own."""
        self._bar.close()

    on_test_end = on_predict_end = on_exception = on_train_end

    def _open(self, name: str, total: float, done: int = 0) -> None:
        self._bar.close()
        is_known = math.isfinite(total) and total > 0
        self._bar = tqdm(
            desc=name,
            total=total if is_known else None,
            initial=done,
            mininterval=self.redraw_every,
            delay=self.redraw_every,  # Lines that describe the run come first.
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            bar_format=_BAR if is_known else None,
            disable=not (self._enabled and current_mode() == "lines" and _can_redraw()),
        )
        self._bar.set_description_str(name, refresh=False)  # tqdm puts a colon behind a description.

    def _describe(self, trainer: Trainer) -> None:
        """Set the text beside the bar."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = best_so_far(trainer, metrics)
        shown = [*best] or [name for name in metrics if name.startswith("val/")][:1]
        texts = [f"epoch {_of(trainer.current_epoch + 1, self._planned_epochs(trainer))}"]
        texts += [f"{name} {metrics[name]:.3g}" for name in ("train/loss", *shown) if name in metrics]
        texts += [f"best {value:.3g}" for value in best.values()]
        self._bar.set_postfix_str(", ".join(texts), refresh=False)

    def _tell(self, trainer: Trainer, event: str) -> None:
        """Print the line or object of an epoch or validation, without metrics that are older."""
        found = trainer.callback_metrics  # On all processes: Lightning may compute a mean over them.
        before, self._step = self._step, steps_done(trainer)
        has_validated, self._has_validated = self._has_validated, False
        if not self._enabled or current_mode() == "quiet":
            return
        if not self._bar.disable:
            self._describe(trainer)
            return
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        has_logged = every > 0 and self._step // every > before // every
        # Lightning keeps the values of earlier epochs.
        old = tuple(split for split, is_new in (("train", has_logged), ("val", has_validated)) if not is_new)
        new = [name for name in found if split_of(name) not in old and not self._measured.is_old(trainer, name)]
        metrics = {name: float(found[name]) for name in new if found[name].numel() == 1}
        best = best_so_far(trainer, metrics)
        batches = trainer.fit_loop.total_batch_idx + 1
        left = self._seconds_left(trainer, batches)
        epochs = self._planned_epochs(trainer)
        emit(
            event,
            epoch=trainer.current_epoch + 1,
            epochs=epochs,
            step=self._step,
            metrics=metrics,
            best=best,
            seconds_left=None if left is None else round(left, 1),
        )
        if current_mode() == "lines":
            text = progress_line(trainer.current_epoch + 1, epochs, self._step, metrics, best, left)
            print(printable(f"{event[:5]:<6} {text}"), file=sys.stderr, flush=True)

    def _seconds_left(self, trainer: Trainer, batches: int) -> float | None:
        """Return how many seconds the fit still takes at most, or None if nobody can know."""
        lefts = [each.seconds_left for each in trainer.callbacks if isinstance(each, TimeLimit)]  # type: ignore[attr-defined]
        lefts += [left for each in trainer.callbacks if isinstance(each, Timer) and (left := each.time_remaining())]  # type: ignore[attr-defined]
        if math.isfinite(self._total) and batches > self._first:
            speed = (time.monotonic() - self._started) / (batches - self._first)
            lefts.append(speed * max(self._total - batches, 0))
        return min(lefts, default=None) if not trainer.should_stop else 0.0

    def _planned_epochs(self, trainer: Trainer) -> int | None:
        if math.isfinite(self.last_step):
            return math.ceil(self._total / trainer.num_training_batches)
        epochs = trainer.max_epochs
        return None if epochs is None or epochs < 0 else epochs


def best_so_far(trainer: Trainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the monitored metric of the best checkpoint by its name, or of the newest validation if that is better."""
    for each in trainer.checkpoint_callbacks:
        if isinstance(each, ModelCheckpoint) and each.monitor:
            known = [] if each.best_model_score is None else [float(each.best_model_score)]
            known += [metrics[each.monitor]] if each.monitor in metrics else []
            known = [value for value in known if not math.isnan(value)]
            return {each.monitor: (min if each.mode == "min" else max)(known)} if known else {}
    return {}


def progress_line(
    epoch: int,
    epochs: int | None,
    step: int,
    metrics: Mapping[str, float],
    best: Mapping[str, float],
    left: float | None,
) -> str:
    """Return the line of an epoch.

    Args:
        epoch: Number of the epoch, from 1.
        epochs: Planned epochs, if known.
        step: Optimiser steps done.
        metrics: All metrics; the line shows `train/loss`, the first four `val/*` and the monitored one.
        best: The best value of the monitored metric so far, by its name.
        left: Seconds that are left, if known.

    >>> progress_line(3, 60, 1200, {"val/loss": 0.25, "train/loss": 0.5}, {"val/loss": 0.125}, 75)
    '3/60, step 1,200, train/loss 0.5, val/loss 0.25, best val/loss 0.125, 01:15 left'
    """
    shown = {name: value for name, value in metrics.items() if name == "train/loss"}
    shown |= metrics_of_line(metrics, next(iter(best), ""))
    texts = [_of(epoch, epochs), f"step {step:,}", *(f"{name} {value:.4g}" for name, value in shown.items())]
    texts += [f"best {name} {value:.4g}" for name, value in best.items()]
    return ", ".join([*texts, *([] if left is None else [f"{tqdm.format_interval(left)} left"])])


def metrics_of_line(metrics: Mapping[str, float], monitor: str = "") -> dict[str, float]:
    """Return the first four `val/*` among the metrics, and the monitored one.

    >>> metrics_of_line({"lr": 0.1, **{f"val/{name}": 0.0 for name in "abcdef"}}, "val/f").keys()
    dict_keys(['val/a', 'val/b', 'val/c', 'val/d', 'val/f'])
    """
    first = [name for name in metrics if name.startswith("val/")][:_MAX_SHOWN]
    return {name: value for name, value in metrics.items() if name in first or name == monitor}


def _of(epoch: int, epochs: int | None) -> str:
    return f"{epoch:,}" if epochs is None else f"{epoch:,}/{epochs:,}"


def _can_redraw() -> bool:
    """Return whether standard error is a terminal that can go back to the start of a line."""
    return getattr(sys.stderr, "isatty", bool)() and os.environ.get("TERM") != "dumb"  # A stream may lack `isatty`.
