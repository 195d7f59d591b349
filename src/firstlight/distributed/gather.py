"""What the processes of a run tell each other."""

from typing import Any

import torch
from lightning.pytorch import Trainer

__all__ = ["all_gather_objects"]


def all_gather_objects(trainer: Trainer, own: Any) -> list[Any]:
    """Return what every process has, by rank; all of them call it at the same place."""
    found = [own] * trainer.world_size
    if len(found) > 1:
        torch.distributed.all_gather_object(found, own)
    return found
