"""Stop when the monitored metric no longer improves."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch import Tensor

from firstlight.callbacks.measured import Measured, refuse_missing
from firstlight.errors import check_saved


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's early stopping, with more patience. Its state restores what was seen, not how it was configured.

    Lightning 2.6.6 restores `patience` from the checkpoint, so that a resumed run ignores a new value.
    `load_state_dict` can go when `EarlyStopping.state_dict` no longer holds `patience`.

    Args:
        monitor: Name of the metric.
        patience: Validations without an improvement after which the run stops. Lightning's default, three, is within
            the noise of a small validation split.
        **options: Arguments of Lightning's class, for example `mode` or `min_delta`.
    """

    def __init__(self, monitor: str, patience: int = 10, **options: Any) -> None:
        super().__init__(monitor, patience=patience, **options)
        self._measured = Measured()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit of this object has seen; a checkpoint restores its own fit afterwards."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._measured = Measured()
            self.wait_count = self.stopped_epoch = 0
            self.best_score = torch.tensor(torch.inf if self.monitor_op == torch.lt else -torch.inf)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run at once if its patience was used up before, which Lightning 2.6.6 forgets."""
        if self.wait_count and self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the values of earlier epochs are old."""
        self._measured.start_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, unless the run ends before its first validation, where Lightning 2.6.6 raises."""
        validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed > 0
        is_defined = self.monitor not in getattr(pl_module, "undefined", ())
        if is_defined and (validated or self.monitor in trainer.callback_metrics or not trainer.enable_validation):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, unless the module says that the monitored metric is undefined for this validation."""
        self._measured.end_validation(trainer)
        if self.monitor not in getattr(pl_module, "undefined", ()):
            super().on_validation_end(trainer, pl_module)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        """Decide, if the metric was measured since. Lightning 2.6.6 would compare its last value again."""
        if not self._measured.is_old(trainer, self.monitor):
            super()._run_early_stopping_check(trainer)

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        """Refuse a monitor that was not logged. Lightning 2.6.6 raises a RuntimeError."""
        if self.strict:
            refuse_missing(self, logs)
        return super()._validate_condition_metric(logs)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen."""
        return {**super().state_dict(), "known": self._measured.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and the number of validations since, and keep the present `patience`."""
        check_saved("EarlyStopping", state_dict, wait_count=int, stopped_epoch=int, best_score=Tensor)
        check_saved("EarlyStopping", {"known": [], **state_dict}, known=list[str])
        super().load_state_dict({**state_dict, "patience": self.patience})
        self._measured = Measured(state_dict.get("known", ()))
