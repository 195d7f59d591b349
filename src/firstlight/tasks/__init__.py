"""Tasks: LightningModules that join a network with its loss, optimiser, schedule and metrics."""

from firstlight.tasks.base import Task
from firstlight.tasks.classification import Classification

__all__ = ["Classification", "Task"]
