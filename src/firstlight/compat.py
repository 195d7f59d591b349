"""What other libraries say that tells a user nothing, and what they refuse that works."""

import re
import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

__all__ = ["innermost_statement", "let_fused_optimisers_clip", "silence_known_warnings"]

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


_NOISE = (
    "Parser key",
    "Problem with given class_path",
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Type typing.Callable",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Expected a dot import path",
    "Unexpected import path format",
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


def innermost_statement(message: str) -> str:
    """Return what an error of jsonargparse 4.53, which nests one explanation in another, says at its core."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    text = "; ".join(dict.fromkeys(kept)) or " ".join(message.split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    text = re.sub(r"Expected an? ", "expected ", text)
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"\. Got value: (.+?)(?=;|$)", r", got \1", text)
    given = re.findall(r"^\s*Given value: (?!NestedArg|Namespace|{'class_path')(.+)$", message, re.MULTILINE)
    return f"{text}, got {given[-1].split('. Got value')[0].strip()}" if given and "got " not in text else text
