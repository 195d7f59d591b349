"""One step of Lightning's training loop without what wraps it, where nothing is there to be wrapped.

Lightning 2.6.6 hands a step through the loop, the strategy, the precision and the optimiser, in three closures, since
each may be another one's. On one device, in full precision and with a module that steps its optimiser as all do, they
come down to what stands here: the same hooks, with the same arguments, in the same order. In any other case the step is
Lightning's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.optimization import automatic
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["INLINED", "Step"]

INLINED: dict[tuple[Any, str], str] = {
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
    (Strategy, "training_step"): "e0755d72cd8b74f0",
    (Strategy, "backward"): "627cfe60660857e3",
    (Strategy, "optimizer_step"): "ff24a5097b2683a7",
    (Precision, "pre_backward"): "f94c53cfe4fc28b2",
    (Precision, "backward"): "c45a6fcf5963eb17",
    (Precision, "post_backward"): "26b545c12fad4e75",
    (Precision, "optimizer_step"): "868b323ae6271f88",
    (Precision, "_wrap_closure"): "2d25ccda9ac5fcdc",
    (Precision, "_after_closure"): "395e946246fa5dc0",
    (Precision, "_clip_gradients"): "d517f7279607111a",
    (LightningModule, "optimizer_step"): "f07278673bfab100",
    (LightningOptimizer, "step"): "a080b1c57c3ad579",
}
"""What a step of 2.6.6 goes through, and the digest of its source."""


class Step:
    """`_AutomaticOptimization.run` for the fit of one trainer.

    Args:
        trainer: Of the fit.
        named: Calls a function of the module under the name of a hook.
    """

    def __init__(self, trainer: Trainer, named: Callable[..., Any]) -> None:
        self._trainer, self._named = trainer, named
        self._original = _AutomaticOptimization.run
        self._judged: LightningModule | None = None
        self._plain = False

    def run(self, loop: _AutomaticOptimization, optimizer: Optimizer, batch_idx: int, kwargs: dict[str, Any]) -> Any:
        """Make one step, or a part of an accumulated one; return what `training_step` did."""
        trainer = self._trainer
        module = trainer.lightning_module
        if module is not self._judged:
            self._judged, self._plain = module, is_plain(trainer, module)
        if loop.trainer is not trainer or not self._plain or loop._skip_backward:
            return self._original(loop, optimizer, batch_idx, kwargs)  # type: ignore[arg-type]  # an OrderedDict
        named, hook, module_hook = self._named, call._call_callback_hooks, call._call_lightning_module_hook
        parts: int = trainer.accumulate_grad_batches
        progress = loop.optim_progress.optimizer
        outputs: dict[str, Any] = {}

        def closure() -> Tensor | None:
            nonlocal outputs
            with torch.enable_grad():  # Not every optimiser calls its closure with it.
                given = named(module, "training_step", module.training_step, *kwargs.values())
                if parts == 1 and isinstance(given, Tensor):
                    loss, outputs = given, {"loss": given.detach()}
                else:
                    result = ClosureResult.from_training_step_output(given, parts)
                    loss, outputs = result.closure_loss, {} if result.loss is None else result.asdict()  # type: ignore[assignment]
                    if loss is None:
                        Closure.warning_cache.warn(
                            "`training_step` returned `None`. If this was on purpose, ignore this warning..."
                        )
                if batch_idx % parts == 0:
                    progress.zero_grad.increment_ready()
                    hook(trainer, "on_before_zero_grad", optimizer)
                    module_hook(trainer, "on_before_zero_grad", optimizer)
                    progress.zero_grad.increment_started()
                    module_hook(trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer)
                    progress.zero_grad.increment_completed()
                if loss is not None:
                    named(module, "backward", backward, loss)
            return outputs.get("loss")

        def backward(loss: Tensor) -> None:
            hook(trainer, "on_before_backward", loss)
            module_hook(trainer, "on_before_backward", loss)
            module.backward(loss)
            hook(trainer, "on_after_backward")
            module_hook(trainer, "on_after_backward")

        def whole() -> Tensor | None:
            loss = closure()
            hook(trainer, "on_before_optimizer_step", optimizer)
            module_hook(trainer, "on_before_optimizer_step", optimizer)
            module_hook(
                trainer,
                "configure_gradient_clipping",
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
            return loss

        if trainer.fit_loop._should_accumulate():
            closure()
        else:
            progress.step.increment_ready()
            named(module, "optimizer_step", optimizer.step, closure=whole)
            progress.step.increment_completed()
        return outputs


def is_plain(trainer: Trainer, module: LightningModule) -> bool:
    """Tell whether nothing but the module and its hooks has a say in a step."""
    strategy = trainer.strategy
    return (
        type(strategy) is SingleDeviceStrategy
        and type(strategy.precision_plugin) is Precision
        and strategy.model is module
        and getattr(module.optimizer_step, "__func__", None) is LightningModule.optimizer_step
        and not isinstance(trainer.optimizers[0], LightningOptimizer)
    )
