"""Tasks: LightningModules that join a network with its loss, optimiser, schedule and metrics."""

from firstlight.tasks.base import Task
from firstlight.tasks.classification import Classification
from firstlight.tasks.language_model import LanguageModel

__all__ = ["Classification", "LanguageModel", "Task"]
