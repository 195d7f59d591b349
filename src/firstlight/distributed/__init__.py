"""What the processes of a run tell each other: gathered objects and the rank watchdog."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from firstlight.distributed.watchdog import RankWatchdog

__all__ = ["RankWatchdog", "all_gather_objects"]


def all_gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    """Return the `value` of every process, by rank. All processes must call it at the same point."""
    gathered = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered
