"""Workarounds: needless warnings of Lightning, an option that it refuses, and error messages of jsonargparse."""

import logging
import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from firstlight.errors import UsageError

_KNOWN = (
    # Lightning 2.6.6 counts the batches of an epoch; here, logging counts the steps of the whole run.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Lightning 2.6.6 uses the first checkpoint callback for "best", which is the right one here.
    r"`\.\w+\(ckpt_path=\"best\"\)` is called with Trainer configured with multiple `ModelCheckpoint`",
    # Lightning 2.6.6 recommends worker processes for all data; indexing a tensor in memory is faster without.
    r"The '\w+_dataloader' does not have many workers",
    # Lightning 2.6.6 calls a function that torch 2.13 deprecates. Remove this when Lightning's `_pytree` does not.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)

_OUTER_LINES = (
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
"""Beginnings of the lines of a jsonargparse 4.53 error that only lead to the cause. `tests/cli` tests the wording."""


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Ignore the known warnings in this context, and restore what it changes in the process.

    These are the warning filters, the levels of Lightning's loggers, the random states on the CPU, torch's flags for
    deterministic algorithms and cuDNN benchmarks, and the environment. Lightning 2.6.6 sets `PL_GLOBAL_SEED`, and for
    several processes `LOCAL_RANK` and others, which the next run would obey.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, environment = [logger.level for logger in loggers], dict(os.environ)
    is_deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with warnings.catch_warnings():
        for message in _KNOWN:
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
            torch.backends.cudnn.benchmark = benchmark
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for name in [name for name in os.environ if name not in environment]:
                del os.environ[name]
            os.environ.update(environment)


def let_fused_optimisers_clip(trainer: Trainer) -> Trainer:
    """Let a trainer clip gradients in bfloat16 with a fused optimiser, and return the trainer.

    Lightning 2.6.6 refuses this combination, although it is a problem only with a gradient scaler. Remove this when
    Lightning checks for the scaler.
    """
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        precision.clip_gradients = Precision.clip_gradients.__get__(precision)  # type: ignore[method-assign]
    return trainer


def skip_nvml_check() -> None:
    """Without a GPU, unset a variable of Lightning 2.6.6 that makes torch look for NVIDIA's library at each step.

    The search takes 40 µs of each optimiser step.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def let_loaders_predict(datamodule: LightningDataModule) -> None:
    """Let Lightning 2.6.6 predict from loaders that got their batch size by position, as `DataLoader(samples, 8)`.

    It builds each loader again from the arguments that it recorded, and passes the batch size twice. Without that
    record it reads the arguments from the loader. Remove this when Lightning passes them once.
    """
    own = datamodule.predict_dataloader

    def predict_dataloader() -> Any:
        found = own()
        for loader in tree_leaves(found):
            if type(loader) is DataLoader:
                vars(loader).pop("__pl_saved_args", None)
        return found

    datamodule.predict_dataloader = predict_dataloader  # type: ignore[method-assign]


def innermost_statement(message: str) -> str:
    """Return the innermost statement of a jsonargparse 4.53 error, whose message nests several explanations."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_OUTER_LINES)]
    text = "; ".join(dict.fromkeys(kept)) or " ".join(message.split())
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    text = re.sub(r"Expected an? ", "expected ", text)
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"\. Got value: (.+?)(?=;|$)", r", got \1", text)
    given = re.findall(r"^\s*Given value: (?!NestedArg|Namespace|{'class_path')(.+)$", message, re.MULTILINE)
    return f"{text}, got {given[-1].split('. Got value')[0].strip()}" if given and "got " not in text else text


def refuse_other_trainer(owner: str, trainer: Any) -> None:
    """Refuse a trainer of `pytorch_lightning`, whose classes are others: each `isinstance` would be false."""
    if type(trainer).__module__.startswith("pytorch_lightning."):
        raise UsageError(
            f"{owner} was given to a Trainer of pytorch_lightning, but works with the package lightning: "
            "import Trainer, LightningModule and LightningDataModule from lightning.pytorch"
        )
