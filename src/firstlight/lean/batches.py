"""What a batch is asked and told, whether it is trained with or validated."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from firstlight.lean.names import has_work, named
from firstlight.lean.plain import clips_itself, is_mixed, is_plain, preparations

__all__ = ["Batches"]


class Batches:
    """What is known of the batches of a fit, from one epoch to the next, or to a change of the module.

    Args:
        trainer: Of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._module: LightningModule | None = None
        self._plain = False
        self._attributes = 0
        self._done: Any = None

    def _is_plain(self) -> bool:
        """Tell whether a batch is; asked anew with each epoch, and where the module has changed."""
        loop = self._trainer.fit_loop.epoch_loop
        module = self._trainer._accelerator_connector.strategy._lightning_module  # Its property costs three calls.
        assert module is not None
        if module is not self._module or loop.batch_progress.current.ready < 1 or self._is_changed():
            self._judge(module)
        return self._plain and not loop.automatic_optimization._skip_backward

    def _is_changed(self) -> bool:
        """Tell whether the module has got or lost an attribute, which may be a hook."""
        return len(vars(self._module)) != self._attributes

    def _judge(self, module: LightningModule) -> None:
        trainer = self._trainer
        self._module, self._plain, self._attributes = module, is_plain(trainer, module), len(vars(module))
        self._hooks: dict[str, Callable[..., Any] | None] = {}
        counted = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        self._done = counted if module.automatic_optimization else None
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._validation_takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        self._prepare = preparations(trainer)
        self._strategy, self._world_size = trainer.strategy, trainer.world_size
        # A strategy that wraps the module enters the contexts of its precision itself.
        self._casts = self._strategy.model is module and is_mixed(trainer)
        self._clips_itself = clips_itself(module)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a hook of the module, where it does anything."""
        if name in vars(self._module):  # It may be put in place, or taken away, within a batch.
            found = getattr(self._module, name)
            return named(self._module, name, found, *arguments) if has_work(found) else None
        if name not in self._hooks:
            found = getattr(self._module, name)
            self._hooks[name] = found if has_work(found) else None
        function = self._hooks[name]
        return None if function is None else named(self._module, name, function, *arguments)

    def _ready(self, loop: Any, batch: Any) -> Any:
        """Return a batch as its step takes it, and count it."""
        for name, prepare, arguments in self._prepare:
            batch = named(self._module, name, prepare, batch, *arguments)
        loop.batch_progress.increment_ready()
        connector, results = self._trainer._logger_connector, loop._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        return batch

    def _gather(self, loop: Any, logged: bool) -> None:
        """Make numbers of what a batch logged."""
        if logged:
            self._trainer._logger_connector.on_batch_end()
        else:
            loop._results.batch = loop._results.batch_size = None
