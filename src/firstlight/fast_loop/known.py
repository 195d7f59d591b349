"""Whether the functions of Lightning that the fast loop replaces are the ones that it was written for."""

import inspect
from functools import cache
from hashlib import sha256
from pkgutil import resolve_name
from typing import Any

import lightning

KNOWN = """
core.module:LightningModule. _call_batch_hook optimizer_step lr_scheduler_step
loops.evaluation_loop:_EvaluationLoop. _evaluation_step
loops.optimization.automatic: Closure
loops.optimization.automatic:_AutomaticOptimization. run _on_before_zero_grad _optimizer_step _optimizer_zero_grad
loops.optimization.automatic:_AutomaticOptimization. _training_step
loops.training_epoch_loop:_TrainingEpochLoop. advance _should_accumulate _update_learning_rates update_lr_schedulers
loops.training_epoch_loop:_TrainingEpochLoop. _is_training_done
plugins.precision.precision:Precision. pre_backward post_backward _wrap_closure _after_closure
strategies.strategy:Strategy. backward optimizer_step
trainer.call: _call_callback_hooks
trainer.connectors.logger_connector.logger_connector:_LoggerConnector. on_batch_start on_batch_end
"""
DIGEST = "c4865826cf15af6efa5d1a72610e09ab231df581bc975bc56e6147240f8079a2"  # Lightning 2.6.4 to 2.6.6.


def find_change() -> str | None:
    """Return, in one clause, that a replaced function is another one than in the known versions, or None."""
    lines = [line.split() for line in KNOWN.strip().splitlines()]
    found = [resolve_name(f"lightning.pytorch.{place}{name}") for place, *names in lines for name in names]
    functions = tuple(getattr(each, "fget", each) for each in found)  # A property's own one.
    is_known = _digest(functions) == DIGEST
    return None if is_known else f"Lightning {lightning.__version__} has other functions than the fast loop replaces"


@cache
def _digest(functions: tuple[Any, ...]) -> str:
    """Return the digest of the sources of functions. A wrapped function has none."""
    sources = [None if hasattr(each, "__wrapped__") else inspect.getsource(each) for each in functions]
    return sha256(repr(sources).encode()).hexdigest()
