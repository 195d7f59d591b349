"""Stop when the monitored metric no longer improves."""

from typing import Any

from lightning.pytorch import callbacks

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was seen."""
        super().load_state_dict({**state_dict, "patience": self.patience})
