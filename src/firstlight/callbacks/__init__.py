"""Callbacks that work on any LightningModule, and `defaults`, the ones that every run has."""

from firstlight.callbacks.checkpoints import BestCheckpoint, FinalCheckpoint, LastCheckpoint
from firstlight.callbacks.compile import Compile
from firstlight.callbacks.defaults import defaults
from firstlight.callbacks.early_stopping import EarlyStopping
from firstlight.callbacks.graceful_shutdown import GracefulShutdown
from firstlight.callbacks.gradient_norm import GradientNorm
from firstlight.callbacks.hparams import HParams
from firstlight.callbacks.insight import Insight
from firstlight.callbacks.learning_rate import LearningRate
from firstlight.callbacks.nonfinite import NonFinite
from firstlight.callbacks.other_package import refuse_other_package
from firstlight.callbacks.progress import Progress
from firstlight.callbacks.pruning import Pruning
from firstlight.callbacks.random_state import RandomState
from firstlight.callbacks.time_limit import TimeLimit

__all__ = [
    "BestCheckpoint",
    "Compile",
    "EarlyStopping",
    "FinalCheckpoint",
    "GracefulShutdown",
    "GradientNorm",
    "HParams",
    "Insight",
    "LastCheckpoint",
    "LearningRate",
    "NonFinite",
    "Progress",
    "Pruning",
    "RandomState",
    "TimeLimit",
    "defaults",
]

for _callback in [each for each in list(globals().values()) if isinstance(each, type)]:
    refuse_other_package(_callback)
