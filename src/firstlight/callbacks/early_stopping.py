"""Stop when the monitored metric no longer improves."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks

__all__ = ["EarlyStopping"]


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's early stopping, more patient, whose state holds what it saw and not how it was configured.

    Lightning 2.6.6 restores `patience` from the checkpoint, so that a resumed run ignores a new one. `load_state_dict`
    can go when `EarlyStopping.state_dict` no longer holds `patience`.

    Args:
        monitor: Name of the metric.
        patience: Validations without an improvement after which the run stops. Three, as Lightning has it, is within
            the noise of a small validation split.
        **options: What Lightning's class takes, for example `mode` or `min_delta`.
    """

    def __init__(self, monitor: str, patience: int = 10, **options: Any) -> None:
        super().__init__(monitor, patience=patience, **options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where the run that goes on had lost its patience, which Lightning 2.6.6 forgets."""
        if self.wait_count and self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, unless the run ends within an epoch before anything was validated, which Lightning 2.6.6 refuses."""
        validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed > 0
        if validated or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was seen."""
        super().load_state_dict({**state_dict, "patience": self.patience})
