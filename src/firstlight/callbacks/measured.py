"""Which metrics are as new as the last validation: Lightning's `callback_metrics` also keep those of earlier ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from firstlight.errors import UsageError, did_you_mean
from firstlight.loggers import logged_names


class Measured:
    """Knows which metrics the last validation or this epoch has logged.

    Names that nothing has logged with `self.log` are not judged.

    Args:
        known: Names that a resumed run had logged before.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = set(known)
        self._validated: set[str] = set()

    @property
    def known(self) -> list[str]:
        """All names that were logged so far, sorted."""
        return sorted(self._known)

    def end_validation(self, trainer: Trainer) -> None:
        """Note what this validation has logged; call it in `on_validation_end`. The sanity check does not count."""
        if not trainer.sanity_checking:
            self._validated = self._logged(trainer.fit_loop.epoch_loop.val_loop._results)

    def start_epoch(self) -> None:
        """Forget the last validation; call it in `on_train_epoch_start`."""
        self._validated = set()

    def is_old(self, trainer: Trainer, name: str) -> bool:
        """Return whether the value of a metric in `callback_metrics` is older than the last validation."""
        now = self._validated | self._logged(trainer.fit_loop.epoch_loop._results)
        return name in self._known and name not in now

    def _logged(self, results: Any) -> set[str]:
        self._known |= logged_names(results, everything=True)
        return logged_names(results)


def refuse_missing(callback: Any, metrics: Mapping[str, Any]) -> None:
    """Raise a UsageError if the metric that a callback monitors is not there."""
    if callback.monitor not in metrics:
        raise UsageError(
            f"{type(callback).__name__} monitors {callback.monitor}, but the run logs {', '.join(metrics) or 'nothing'}"
            + did_you_mean(callback.monitor, metrics)
        )
