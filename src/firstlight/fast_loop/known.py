"""Whether the functions of Lightning that the fast loop replaces are the ones that it was written for."""

import inspect
from functools import cache
from hashlib import sha256
from pkgutil import resolve_name
from typing import Any

import lightning

KNOWN = {
    "loops.training_epoch_loop:_TrainingEpochLoop.advance": "c7555c016027bd73",
    "loops.training_epoch_loop:_TrainingEpochLoop.on_advance_end": "2d1ddaa4e45ef5c6",
    "loops.training_epoch_loop:_TrainingEpochLoop._should_accumulate": "5482f0c6d473fd66",
    "loops.training_epoch_loop:_TrainingEpochLoop._update_learning_rates": "26ac8752d7a358d5",
    "loops.training_epoch_loop:_TrainingEpochLoop.update_lr_schedulers": "7ea198b469a428e7",
    "loops.training_epoch_loop:_TrainingEpochLoop.global_step": "bf52466f94cc0a9d",
    "loops.evaluation_loop:_EvaluationLoop._evaluation_step": "c5ccce05fcc8f755",
    "loops.optimization.automatic:_AutomaticOptimization.run": "385b43732ecc8af3",
    "loops.optimization.automatic:_AutomaticOptimization._optimizer_step": "e196b2fa15d19ee6",
    "loops.optimization.automatic:_AutomaticOptimization._on_before_zero_grad": "b7f44d3a31d4debb",
    "loops.optimization.automatic:_AutomaticOptimization._optimizer_zero_grad": "abd5876aaf91ee7d",
    "loops.optimization.automatic:_AutomaticOptimization._training_step": "72e8f9529eacba73",
    "loops.optimization.automatic:Closure": "bbca72c1722b045b",
    "core.module:LightningModule._call_batch_hook": "7ffd8dfc41f841f2",
    "core.module:LightningModule.optimizer_step": "f07278673bfab100",
    "core.module:LightningModule.lr_scheduler_step": "7cd01c527733468c",
    "strategies.strategy:Strategy.backward": "627cfe60660857e3",
    "strategies.strategy:Strategy.optimizer_step": "ff24a5097b2683a7",
    "plugins.precision.precision:Precision.pre_backward": "f94c53cfe4fc28b2",
    "plugins.precision.precision:Precision.post_backward": "26b545c12fad4e75",
    "plugins.precision.precision:Precision._wrap_closure": "2d25ccda9ac5fcdc",
    "plugins.precision.precision:Precision._after_closure": "395e946246fa5dc0",
    "trainer.connectors.logger_connector.logger_connector:_LoggerConnector.on_batch_start": "5022a98e255d31b5",
    "trainer.call:_call_callback_hooks": "c413fb9a6a9ce1a3",
}
"""Digest of the source of each replaced function in Lightning 2.6.4 to 2.6.6."""


def find_changed_function() -> str | None:
    """Return, in one clause, the first replaced function whose source has changed, or None."""
    for name, known in KNOWN.items():
        if _digest(resolve_name(f"lightning.pytorch.{name}")) != known:
            place = name.rsplit(":", 1)[1]
            return f"Lightning {lightning.__version__} has another {place} than the fast loop was written for"
    return None


@cache
def _digest(function: Any) -> str:
    """Return the digest of a function's source and of the names of its wrappers."""
    function = function.fget if isinstance(function, property) else function
    source, wrappers = inspect.getsource(inspect.unwrap(function)), ""
    while hasattr(function, "__wrapped__"):
        wrappers += f"\n{function.__module__} {function.__code__.co_qualname}"
        function = function.__wrapped__
    return sha256((source + wrappers).encode()).hexdigest()[:16]
