"""Keep what a verb changes in the process, and the needless warnings of Lightning, inside the verb."""

import gc
import logging
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from firstlight.errors import is_library

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


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Ignore the known warnings in this context, and restore what it changes in the process.

    These are the warning filters, the levels of Lightning's loggers, the random states on the CPU, torch's flags for
    deterministic algorithms and cuDNN benchmarks, its default dtype and its precision of float32 products, the start
    method of multiprocessing, which asking for it would fix, and the environment. Lightning 2.6.6 sets
    `PL_GLOBAL_SEED`, and for several processes `LOCAL_RANK` and others, which the next run would obey.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, environment = [logger.level for logger in loggers], dict(os.environ)
    is_deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    start_method = multiprocessing.get_start_method(allow_none=True)
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
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
            # None is allowed with `force`, and means that nobody has chosen.
            multiprocessing.set_start_method(start_method, force=True)
            torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
            torch.backends.cudnn.benchmark = benchmark
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for name in [name for name in os.environ if name not in environment]:
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def isolated() -> Iterator[None]:
    """Leave nothing of a run to the next one, which has the bits that it has alone.

    The user's modules are imported again, because they may hold what the run has changed. Compiled code is dropped:
    torch compiles a function a few times only.
    """
    known = set(sys.modules)
    with without_side_effects():
        try:
            yield
        finally:
            for name in set(sys.modules) - known:
                if (file := getattr(sys.modules[name], "__file__", None)) and not is_library(file):
                    del sys.modules[name]
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            gc.collect()
