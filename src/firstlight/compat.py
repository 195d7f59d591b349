"""What other libraries say that tells a user nothing, and what they refuse that works."""

import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

__all__ = ["let_fused_optimisers_clip", "silence_known_warnings"]

_KNOWN = (
    # Lightning 2.6.6 counts batches of an epoch; tasks and callbacks here log by the steps of the whole run.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # The first of the default checkpoint callbacks is the best one, which is what Lightning takes.
    r"`\.\w+\(ckpt_path=\"best\"\)` is called with Trainer configured with multiple `ModelCheckpoint`",
    # Lightning 2.6.6 asks for worker processes whatever the data is; indexing a tensor in memory is faster without.
    r"The '\w+_dataloader' does not have many workers",
    # Lightning 2.6.6 calls what torch 2.13 deprecates; it can go when `lightning.pytorch.utilities._pytree` is mended.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def silence_known_warnings() -> None:
    """Ignore them from here on. Tasks and data modules call this, because they are what brings the warnings on."""
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message)


def let_fused_optimisers_clip(trainer: Trainer) -> Trainer:
    """Return a trainer that clips in bfloat16 what a fused optimiser steps.

    Lightning 2.6.6 refuses that, as if a scaler were there, whose work fused optimisers do themselves.
    """
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        precision.clip_gradients = Precision.clip_gradients.__get__(precision)  # type: ignore[method-assign]
    return trainer
