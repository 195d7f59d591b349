"""Random states of all processes in each checkpoint, so that a resumed run draws the same numbers."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from firstlight.distributed import all_gather_objects

__all__ = ["RandomState", "restore", "snapshot"]


class RandomState(Callback):
    """Save the states of Python's, NumPy's and torch's generators, devices included, and restore them on resume.

    A run that resumes with another number of processes draws other numbers.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes; every process calls this at the same point."""
        checkpoint["random_state"] = all_gather_objects(trainer, snapshot())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the checkpoint, if it has any, until training starts."""
        self._loaded = checkpoint.get("random_state", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states: until here, building and checking the model may have drawn numbers."""
        if len(self._loaded) == trainer.world_size:
            restore(self._loaded[trainer.global_rank])
        self._loaded = []


def snapshot() -> dict[str, Any]:
    """Return the states of all generators of this process, as values that load with `weights_only=True`."""
    version, words, *gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        # Tensors, because pickling 2,500 numbers one by one takes most of the time of a small checkpoint.
        "python": (version, torch.tensor(words), *gauss),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),  # type: ignore[union-attr]  # the legacy form
        "torch": torch.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(states: dict[str, Any]) -> None:
    """Set all generators of this process to what `snapshot` returned.

    >>> states = snapshot()
    >>> first = random.random(), np.random.rand(), torch.rand(1)
    >>> restore(states)
    >>> first == (random.random(), np.random.rand(), torch.rand(1))
    True
    """
    version, words, *gauss = states["python"]
    random.setstate((version, tuple(torch.as_tensor(words).tolist()), *gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["devices"] and len(states["devices"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["devices"])
