"""Tasks: LightningModules that join a network with its loss, optimiser, schedule and metrics."""

from firstlight.tasks.base import Task
from firstlight.tasks.binary import BinaryClassification, MultilabelClassification
from firstlight.tasks.classification import Classification
from firstlight.tasks.embedding import Embedding
from firstlight.tasks.language_model import LanguageModel
from firstlight.tasks.regression import Regression

__all__ = [
    "BinaryClassification",
    "Classification",
    "Embedding",
    "LanguageModel",
    "MultilabelClassification",
    "Regression",
    "Task",
]
