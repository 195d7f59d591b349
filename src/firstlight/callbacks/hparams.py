"""Hyper-parameters and best metrics for TensorBoard's HParams page."""

from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from firstlight.callbacks.checkpoints import BestCheckpoint
from firstlight.checkpoints.io import read_checkpoint_metrics


class HParams(Callback):
    """Write hyper-parameters of module and data with the `val/*` of the best checkpoint when training ends.

    The metrics are named `best/val/*`: TensorBoard would add a point to the curve of a plain `val/*`. The page shows
    the first five names, so the monitored one is also `best/monitor`, and `best_at/epoch` and `best_at/step` are last.

    Args:
        best: The callback that writes the best checkpoint.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write to each TensorBoard logger if there is a best checkpoint."""
        if not self.best.best_model_path:
            return
        if isinstance(self.best, BestCheckpoint):
            self.best.write_waiting(trainer)
        try:
            metrics = read_checkpoint_metrics(self.best.best_model_path)
        except UnpicklingError:
            metrics = {}  # A foreign module's checkpoint may hold objects, and loading these could run code.
        if self.best.best_model_score is not None:
            score = float(self.best.best_model_score)
            metrics = {"monitor": score, str(self.best.monitor): score, **metrics}
        values = {f"best{'_at' * (name in ('epoch', 'step'))}/{name}": value for name, value in metrics.items()}
        data = getattr(trainer, "datamodule", None)
        parameters = flatten({**pl_module.hparams, **({} if data is None else {"data": data.hparams})})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(parameters, metrics=values, step=trainer.global_step)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return the leaves of a configuration by path, as TensorBoard shows them, without those that are `None`.

    >>> flatten({"network": {"class_path": "MLP", "init_args": {"hidden": [64], "norm": None}}, "_instantiator": "x"})
    {'network': 'MLP', 'network/hidden': '[64]'}
    """
    flat: dict[str, str | int | float | bool] = {}
    for name, value in nested.items():
        path = f"{prefix}/{name}".lstrip("/")
        if name.startswith("_") or value is None:
            continue
        if name == "class_path":
            flat[prefix] = value
        elif isinstance(value, Mapping):
            flat |= flatten(value, prefix if name == "init_args" else path)
        else:
            flat[path] = value if isinstance(value, str | int | float) else str(value)
    return flat
