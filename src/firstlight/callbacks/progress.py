"""A progress bar, or plain lines if standard error is not a terminal."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from tqdm import tqdm

_MAX_SHOWN = 4  # Metrics of a line.


class Progress(ProgressBar):
    """One bar for the whole fit, in batches, with the newest `val/*`; one bar for each evaluation.

    The bar is drawn every `redraw_every` seconds; other batches only compare two numbers. If standard error is not a
    terminal, a line follows a validation instead, at most one every `line_every` seconds.

    Lightning 2.6.6's `TQDMProgressBar` has one bar for each epoch and one for each validation.

    Args:
        redraw_every: Seconds between two drawings, in a terminal.
        line_every: Seconds between two lines, elsewhere.
    """

    def __init__(self, redraw_every: float = 0.2, line_every: float = 10.0) -> None:
        super().__init__()
        self.redraw_every = redraw_every
        self.line_every = line_every
        self._enabled = True
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._next_line = 0.0

    def disable(self) -> None:
        """Draw nothing. Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar, at the step from which a run resumes."""
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        total = trainer.num_training_batches * epochs if epochs > 0 else math.inf
        if trainer.max_steps >= 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        self._open("fit", total, trainer.fit_loop.total_batch_idx + 1)
        self._next_line = time.monotonic() + self.line_every

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless the validation is part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._open("validate", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open("test", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open("predict", sum(trainer.num_predict_batches))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._bar.update()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count a batch, unless the validation is part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._bar.update()

    on_test_batch_end = on_predict_batch_end = on_train_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the newest `val/*` of a fit, or close the bar."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._bar.close()
            return
        monitor = getattr(pl_module, "monitor", "")
        text = progress_line(trainer.current_epoch + 1, trainer.callback_metrics, monitor)
        self._bar.set_postfix_str(text, refresh=False)
        if self._enabled and self._bar.disable and time.monotonic() >= self._next_line and not trainer.sanity_checking:
            self._next_line = time.monotonic() + self.line_every
            print(f"step {trainer.global_step}, {text}", file=sys.stderr, flush=True)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar, so that what follows starts on a line of its own."""
        self._bar.close()

    on_test_end = on_predict_end = on_exception = on_train_end

    def _open(self, name: str, total: float, done: int = 0) -> None:
        self._bar.close()
        self._bar = tqdm(
            desc=name,
            total=total if math.isfinite(total) and total else None,
            initial=done,
            mininterval=self.redraw_every,
            delay=self.redraw_every,  # Lines that describe the run come first.
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=not (self._enabled and getattr(sys.stderr, "isatty", bool)()),  # A stream may lack it.
        )


def progress_line(epoch: int, metrics: dict[str, Tensor], monitor: str = "") -> str:
    """Return the epoch and the `metrics_of_line` in one line.

    >>> import torch
    >>> progress_line(3, {"val/loss": torch.tensor(0.25), "train/loss": torch.tensor(0.5)})
    'epoch 3, val/loss 0.25'
    """
    shown = metrics_of_line({name: float(value) for name, value in metrics.items()}, monitor)
    return ", ".join([f"epoch {epoch}", *(f"{name} {value:.4g}" for name, value in shown.items())])


def metrics_of_line(metrics: Mapping[str, float], monitor: str = "") -> dict[str, float]:
    """Return the first four `val/*` among the metrics, and the monitored one.

    >>> metrics_of_line({"lr": 0.1, **{f"val/{name}": 0.0 for name in "abcdef"}}, "val/f").keys()
    dict_keys(['val/a', 'val/b', 'val/c', 'val/d', 'val/f'])
    """
    names = [name for name in metrics if name.startswith("val/")]
    return {name: metrics[name] for index, name in enumerate(names) if index < _MAX_SHOWN or name == monitor}
