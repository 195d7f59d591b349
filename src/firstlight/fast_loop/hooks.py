"""Which batches take the fast path, and how hooks and steps are called there.

Lightning 2.6.6 enters a context of its profiler around each hook of each callback, 84 in a step, although nothing is
profiled and most hooks are empty. It sets `_current_fx_name`, which `log` reads, through `Module.__setattr__`.
"""

from contextlib import nullcontext
from functools import lru_cache
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.parallel import DistributedDataParallel

_HOOKS = {name: (attrgetter(name), empty) for name, empty in vars(Callback).items() if name.startswith("on_")}
"""How to get each hook, and the empty hook of `Callback` at import. Whatever replaces that one is called."""


class NullProfiler(PassThroughProfiler):
    """Lightning's default profiler, which records nothing, with one shared context."""

    def profile(self, action_name: str, context: Any = nullcontext()) -> Any:  # noqa: B008, D102
        return context


class LoggedValue(_ResultMetric):
    """A logged value. Lightning's `to` copies its description, a third of the time of `log`, even if nothing moves."""

    def to(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        return self if self.is_tensor and args == (self.value.device,) else super().to(*args, **options)


class LoggedValues(_ResultCollection):  # noqa: D101
    def __setitem__(self, key: str, value: Any) -> None:
        value.__class__ = LoggedValue
        super().__setitem__(key, value)


class FastPath:
    """Decides whether a batch takes the fast path, and calls the hooks and steps of the batch there."""

    def __init__(self, trainer: Any, handles_signals: bool, reason: str | None) -> None:
        self.trainer, self.handles_signals, self.is_open, self._reason = trainer, handles_signals, not reason, reason
        self._takes_index = lru_cache(lambda step: is_param_in_hook_signature(step, "batch_idx", min_args=2))

    @property
    def reason(self) -> str | None:
        """Why batches take Lightning's own path, or last took it, in one clause; complete from `on_train_start` on."""
        if self.is_open:
            self.is_allowed()
        return self._reason

    def is_allowed(self, takes_batches: bool = True) -> bool:
        """Return whether the next batch may take the fast path. Each batch asks again."""
        self.strategy = self.trainer._accelerator_connector.strategy
        self.module = self.strategy._lightning_module
        reason = self._find_obstacle() if takes_batches else "training_step takes the iterator of batches"
        self._reason = reason or self._reason
        return reason is None

    def _find_obstacle(self) -> str | None:
        strategy, module, precision = self.strategy, self.module, self.strategy._precision_plugin
        kind, model = type(strategy), strategy._model
        if kind is not SingleDeviceStrategy and (kind is not DDPStrategy or strategy._model_averager is not None):
            return f"strategy {kind.__name__}"
        if type(precision) is not Precision and (type(precision) is not MixedPrecision or precision.scaler is not None):
            return f"precision {precision.precision}"
        if self.trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward:
            return "a callback skips backward"
        if module is None:
            return None  # No fit has begun.
        if not module.automatic_optimization:
            return "manual optimization"
        if not is_own(module, "optimizer_step"):
            return "the module overrides optimizer_step"
        if model is not module and (type(model) is not DistributedDataParallel or model.module is not module):
            return f"the module is wrapped by {type(model).__name__}"
        if strategy._optimizers and isinstance(strategy._optimizers[0], LightningOptimizer):
            return "configure_optimizers returns a LightningOptimizer"
        return None

    def call_hook(self, name: str, *args: Any) -> Any:
        """Call a hook of the callbacks and then of the module; return the result of the module's hook."""
        trainer, module, (get, empty) = self.trainer, self.module, _HOOKS[name]
        state = vars(module)
        before, state["_current_fx_name"] = state["_current_fx_name"], name
        for callback in trainer.callbacks:
            hook = get(callback)
            if getattr(hook, "__func__", None) is not empty and callable(hook):
                hook(trainer, module, *args)
        own = get(module)
        result = own(*args) if callable(own) else None
        state["_current_fx_name"] = before
        return result

    def call_as(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function as the module's hook `name`."""
        state = vars(self.module)
        before, state["_current_fx_name"] = state["_current_fx_name"], name
        result = function(*args, **kwargs)
        state["_current_fx_name"] = before
        return result

    def start_batch(self, loop: Any, batch: Any) -> Any:
        """Return the batch that a step takes, on its device, and count it."""
        data, device = self.trainer.datamodule, self.strategy.root_device
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            default, hook = getattr(DataHooks, name), getattr(data, name, None)
            if hook is None or getattr(hook, "__func__", None) is default:  # A hook of the data module goes first.
                hook = getattr(self.module, name)
            args = [device] if name == "transfer_batch_to_device" else []
            moves = args and (type(batch) is not tuple or {getattr(part, "device", None) for part in batch} != {device})
            if moves or getattr(hook, "__func__", None) is not default:
                batch = self.call_as(name, hook, batch, *args, 0)
        loop.batch_progress.increment_ready()
        connector, results = self.trainer._logger_connector, loop._results
        connector._first_loop_iter = connector._first_loop_iter is None
        if not connector._first_loop_iter:
            connector._current_fx = None  # `log` sets it.
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        return batch

    def end_batch(self, loop: Any) -> bool:
        """Release the batch; return whether something may have been logged in it."""
        has_logged = self.trainer._logger_connector._current_fx is not None
        if has_logged:
            self.trainer._logger_connector.on_batch_end()
        loop._results.batch = loop._results.batch_size = None
        return has_logged

    def call_step(self, name: str, batch: Any, batch_idx: int) -> Any:
        """Return the result of `training_step` or `validation_step`."""
        step, strategy = getattr(self.module, name), self.strategy
        args = (batch, batch_idx) if self._takes_index(getattr(step, "__func__", step)) else (batch,)
        if strategy._model is not self.module or type(strategy._precision_plugin) is not Precision:
            step = getattr(strategy, name)  # It calls the wrapper of the module, within `torch.autocast`.
        return self.call_as(name, step, *args)


def is_own(module: LightningModule, name: str) -> bool:
    """Return whether a module has LightningModule's own method."""
    return getattr(getattr(module, name), "__func__", None) is getattr(LightningModule, name)
