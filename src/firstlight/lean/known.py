"""What of Lightning is replaced, and how to tell that it is what the replacements were written for."""

import inspect
from functools import cache
from hashlib import sha256
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops import progress, utilities
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization import automatic, closure
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.progress import _OptimizationProgress
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from lightning.pytorch.utilities import signature_utils
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _MaxSizeCycle, _ModeIterator

__all__ = ["HOOKS", "STEP", "are_known", "source_of"]

HOOKS: dict[tuple[Any, str], str] = {
    (call, "_call_callback_hooks"): "c413fb9a6a9ce1a3",
    (call, "_call_lightning_datamodule_hook"): "2c4500edeedd95c0",
    (call, "_call_lightning_module_hook"): "558a87d04c4680e1",
    (call, "_call_strategy_hook"): "ff429e3ac60d2a80",
    (signature_utils, "is_param_in_hook_signature"): "6bd4f22c778d7ccc",
    (_DataHookSelector, "get_instance"): "3abe90f0b162ec28",
    (Trainer, "_active_loop"): "d1a5c828d67439ea",
    (_ResultMetric, "to"): "f45ccd7696961427",
}
"""Digest of the source of each function of Lightning 2.6.4 to 2.6.6 around a hook that is replaced."""

STEP: dict[tuple[Any, str], str] = {
    (_TrainingEpochLoop, "advance"): "c7555c016027bd73",
    (_TrainingEpochLoop, "on_advance_end"): "2d1ddaa4e45ef5c6",
    (_TrainingEpochLoop, "_build_kwargs"): "4a80f7e4608b7539",
    (_TrainingEpochLoop, "update_lr_schedulers"): "7ea198b469a428e7",
    (_TrainingEpochLoop, "_update_learning_rates"): "26ac8752d7a358d5",
    (_TrainingEpochLoop, "_accumulated_batches_reached"): "4be46e19d4f0c5f9",
    (_TrainingEpochLoop, "_num_ready_batches_reached"): "d51c52199e57a7a6",
    (_TrainingEpochLoop, "_should_accumulate"): "5482f0c6d473fd66",
    (_TrainingEpochLoop, "_should_check_val_fx"): "cf0916b12e18a2cc",
    (_TrainingEpochLoop, "_save_loggers_on_train_batch_end"): "bd82b8b33ac22d1c",
    (_EvaluationLoop, "_evaluation_step"): "c5ccce05fcc8f755",
    (_EvaluationLoop, "_build_kwargs"): "514c023cf84ab337",
    (_EvaluationLoop, "_build_step_args_from_hook_kwargs"): "1a8ecd4cef61f489",
    (_LoggerConnector, "update_eval_step_metrics"): "90eeedaeb40e6518",
    (_ResultCollection, "valid_items"): "ba5e622c4d38249d",
    (_ResultCollection, "log"): "f6753cf3f7d487e0",
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor"): "d4e504c3f7d8bcb5",
    (_TrainingEpochLoop, "_is_training_done"): "b6a4cafb8900bfd0",
    (Strategy, "handles_gradient_accumulation"): "847c2b5a72afe6e8",
    (Strategy, "validation_step"): "5f978afd42c63e32",
    (_TrainingEpochLoop, "global_step"): "bf52466f94cc0a9d",
    (Trainer, "global_step"): "c3ca6f19606a0178",
    (_AutomaticOptimization, "run"): "385b43732ecc8af3",
    (_AutomaticOptimization, "_make_closure"): "b4bd45349b04051c",
    (_AutomaticOptimization, "_make_step_fn"): "91e40ee2d539156a",
    (_AutomaticOptimization, "_make_backward_fn"): "638ca477b2752682",
    (_AutomaticOptimization, "_make_zero_grad_fn"): "0f9b56ff1dc1a3ba",
    (_AutomaticOptimization, "_optimizer_step"): "e196b2fa15d19ee6",
    (_AutomaticOptimization, "_on_before_zero_grad"): "b7f44d3a31d4debb",
    (_AutomaticOptimization, "_optimizer_zero_grad"): "abd5876aaf91ee7d",
    (_AutomaticOptimization, "_training_step"): "72e8f9529eacba73",
    (automatic, "Closure"): "bbca72c1722b045b",
    (automatic, "ClosureResult"): "2da8d8114d306252",
    (_LoggerConnector, "on_batch_start"): "5022a98e255d31b5",
    (_LoggerConnector, "on_batch_end"): "87c0a9cd43e97f9d",
    (_LoggerConnector, "update_train_step_metrics"): "44584c0c55de3464",
    (_LoggerConnector, "should_update_logs"): "a60ba9e9cd0c62d9",
    (_ResultCollection, "metrics"): "253a052f55f98a76",
    (_TrainingEpochLoop, "_should_check_val_epoch"): "123f3003daac3054",
    (_FitLoop, "_should_accumulate"): "9c586074d9eca4f4",
    (_OptimizationProgress, "optimizer_steps"): "6707e97a882bd812",
    (closure, "AbstractClosure"): "7458ad251c30e34d",
    (Strategy, "on_train_batch_start"): "093d78836c07829e",
    (Strategy, "post_training_step"): "8f954cd437319d31",
    (Precision, "train_step_context"): "763185f3c178c69b",
    (Precision, "val_step_context"): "7fbdac1ebcd96b2d",
    (Precision, "forward_context"): "be84f4d137d2bca8",
    (Precision, "clip_gradients"): "3ce697562ba1d0ab",
    (Strategy, "batch_to_device"): "e7b211b006fe472b",
    (Strategy, "training_step"): "e0755d72cd8b74f0",
    (Strategy, "backward"): "627cfe60660857e3",
    (Strategy, "optimizer_step"): "ff24a5097b2683a7",
    (DDPStrategy, "optimizer_step"): "e13a0ab80eead5c2",
    (Precision, "convert_input"): "6598ea8026a182a6",
    (Precision, "pre_backward"): "f94c53cfe4fc28b2",
    (Precision, "backward"): "c45a6fcf5963eb17",
    (Precision, "post_backward"): "26b545c12fad4e75",
    (Precision, "optimizer_step"): "868b323ae6271f88",
    (Precision, "_wrap_closure"): "2d25ccda9ac5fcdc",
    (Precision, "_after_closure"): "395e946246fa5dc0",
    (Precision, "_clip_gradients"): "d517f7279607111a",
    (MixedPrecision, "pre_backward"): "8132c2d0f501e968",
    (MixedPrecision, "optimizer_step"): "63b0bee2018bdb88",
    (MixedPrecision, "clip_gradients"): "9847b47800c9a318",
    (MixedPrecision, "autocast_context_manager"): "fefa595404ec32ed",
    (MixedPrecision, "forward_context"): "d02d272567318694",
    (DataHooks, "on_before_batch_transfer"): "dca934ac2035c10d",
    (DataHooks, "transfer_batch_to_device"): "43187fd3cd810e68",
    (DataHooks, "on_after_batch_transfer"): "17afec84bb8da9c2",
    (LightningModule, "_call_batch_hook"): "7ffd8dfc41f841f2",
    (LightningModule, "_on_before_batch_transfer"): "4ccf3831e4531914",
    (LightningModule, "_apply_batch_transfer_handler"): "4e7f8188261416be",
    (LightningModule, "lr_scheduler_step"): "7cd01c527733468c",
    (LightningModule, "optimizer_step"): "f07278673bfab100",
    (LightningModule, "configure_gradient_clipping"): "081ca8d4607df5e6",
    (LightningModule, "clip_gradients"): "4d123da68ed286a9",
    (LightningOptimizer, "step"): "a080b1c57c3ad579",
    (Strategy, "optimizers"): "c1584fb46be53142",
    (Strategy, "pre_backward"): "a7909e83dc1b3c4e",
    (Strategy, "post_backward"): "eb2c9f32ebeec5b3",
    (Trainer, "current_epoch"): "e91bb8541e794fd1",
    (Trainer, "num_training_batches"): "dbe2900bd640e943",
    (_PrefetchDataFetcher, "__next__"): "8611192d7629f911",
    (_DataFetcher, "__next__"): "0d13131ad3567bc9",
    (CombinedLoader, "__next__"): "6208793dc22dddf6",
    (CombinedLoader, "__iter__"): "323695fc31230bf6",
    (_MaxSizeCycle, "__next__"): "b71ceef48cfb5058",
    (_TrainingEpochLoop, "_on_before_fetch"): "d520019acfe2e3e1",
    (_TrainingEpochLoop, "_on_after_fetch"): "ea7aebbc1c19868f",
    (_TrainingEpochLoop, "done"): "ba06fbd80fe37b2e",
    (_TrainingEpochLoop, "_is_validation_done"): "965ea84e3c59e136",
    (utilities, "_is_max_limit_reached"): "477644e73f0193f7",
    (progress, "_Progress"): "0cf9dca64c61827c",
    (progress, "_BatchProgress"): "d583e7c65f43a953",
    (progress, "_SchedulerProgress"): "7834bbe64df7f2ac",
    (progress, "_OptimizerProgress"): "fc376848e69fd7b5",
    (progress, "_ReadyCompletedTracker"): "bd7ee89489fcf385",
    (progress, "_StartedTracker"): "8d81b4349ae1e9f7",
    (progress, "_ProcessedTracker"): "b0dfc55801ae38ca",
    (_Loop, "restarting"): "0e5d3126178508ef",
    (_DataFetcher, "__iter__"): "b27c0ab13937e761",
    (_DataFetcher, "reset"): "ea8c73bc5fe4f6a1",
    (_PrefetchDataFetcher, "__iter__"): "6e52ce1a37dd4962",
    (_MaxSizeCycle, "__iter__"): "00d8a861f0f0587d",
    (_ModeIterator, "__iter__"): "86396e820d0415ba",
}
"""The same of what a batch goes through, for which `Step` stands."""


def are_known(functions: dict[tuple[Any, str], str]) -> bool:
    """Tell whether all of these are, letter for letter, those that were known."""
    return all(source_of(getattr(owner, name, None)) == digest for (owner, name), digest in functions.items())


@cache
def source_of(function: Any) -> str:
    """Return the digest of a function's source; of anything else, and where there is no source, nothing.

    Where it wraps another one, it is that one's source, and the names of what wraps it.
    """
    try:
        function = function.fget if isinstance(function, property) else function
        source, wrappers = inspect.getsource(function), ""
        while hasattr(function, "__wrapped__"):
            wrappers += f"\n{function.__module__} {function.__code__.co_qualname}"
            function = function.__wrapped__
        return sha256((source + wrappers).encode()).hexdigest()[:16]
    except (AttributeError, OSError, TypeError):
        return ""
