"""What a batch is asked and told, whether it is trained with or validated."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from firstlight.lean.acting import Acting
from firstlight.lean.names import has_work
from firstlight.lean.plain import clips_itself, comes_alone, is_mixed, is_plain, preparations

__all__ = ["Batches"]


class Batches:
    """What is known of the batches of a fit, from one epoch to the next, or to a change of the module.

    Args:
        trainer: Of the fit.
        acting: Which of its callbacks have something to do.
    """

    def __init__(self, trainer: Trainer, acting: Acting) -> None:
        self._trainer: Any = trainer  # Its attributes are set outside the class.
        self._acting = acting
        self._loop: Any = trainer.fit_loop.epoch_loop
        self._module: LightningModule | None = None
        self._plain = False
        self._attributes = 0
        self._fetcher: Any = None
        self._done: Any = None

    def _is_plain(self, fetcher: Any) -> bool:
        """Tell whether a batch is; asked anew with each epoch, and where the module has got or lost an attribute."""
        loop = self._loop
        module = self._trainer._accelerator_connector.strategy._lightning_module  # Its property costs three calls.
        assert module is not None
        is_first = fetcher is not self._fetcher or loop.batch_progress.current.ready < 1
        if is_first or module is not self._module or len(vars(module)) != self._attributes:  # One may be a hook.
            self._judge(module)
            self._fetcher, self._is_usual = fetcher, type(fetcher) is _PrefetchDataFetcher
            self._comes_alone = self._is_usual and comes_alone(fetcher)
        return self._plain and self._is_usual and not loop.automatic_optimization._skip_backward

    def _judge(self, module: LightningModule) -> None:
        trainer = self._trainer
        self._module, self._plain, self._attributes = module, is_plain(trainer, module), len(vars(module))
        self._hooks: dict[str, Callable[..., Any] | None] = {}
        counted = self._loop.automatic_optimization.optim_progress.optimizer.step.total
        self._done = counted if module.automatic_optimization else None
        self._takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._validation_takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
        self._prepare = preparations(trainer)
        self._strategy, self._world_size = trainer.strategy, trainer.world_size
        self._is_bare = self._strategy.model is module
        # A strategy that wraps the module enters the contexts of its precision itself.
        self._casts = self._is_bare and is_mixed(trainer)
        self._clips_itself = clips_itself(module)

    def _hook(self, name: str, *arguments: Any) -> Any:
        """Call a hook of the callbacks and then of the module, of those that do anything; return what the last did."""
        trainer, module, acting = self._trainer, self._module, self._acting
        callbacks: list[Any] = trainer.callbacks
        active = acting.hooks.get(name) if acting.callbacks == callbacks else None
        if active is None:
            active = acting.find(name)
        many = len(callbacks)
        attributes: dict[str, Any] = vars(module)
        before = attributes["_current_fx_name"]
        attributes["_current_fx_name"] = name
        for each in active:
            getattr(each, name)(trainer, module, *arguments)
        for each in callbacks[many:]:  # A hook may bring a callback along, whose turn is now.
            getattr(each, name)(trainer, module, *arguments)
        if name in attributes:  # It may be put in place, or taken away, within a batch.
            found: Any = attributes[name]
            own = found if has_work(found) else None
        else:
            own = self._hooks[name] if name in self._hooks else self._find(name)
        result = None if own is None else own(*arguments)
        attributes["_current_fx_name"] = before
        return result

    def _find(self, name: str) -> Callable[..., Any] | None:
        found = getattr(self._module, name)
        self._hooks[name] = own = found if has_work(found) else None
        return own

    def _fetch(self, fetcher: Any) -> Any:
        """Return the next batch, and tell whether it is the last."""
        if fetcher.done or not self._comes_alone:
            return next(fetcher)[0]
        numbered = fetcher.iterator._iterator
        batch = next(numbered.iterators[0])  # Where there is none, though more were promised, the epoch ends.
        numbered._idx += 1
        fetcher.fetched += 1
        fetcher.done = fetcher.fetched >= fetcher.length
        return batch

    def _ready(self, loop: Any, batch: Any) -> Any:
        """Return a batch as its step takes it, and count it."""
        attributes: dict[str, Any] = vars(self._module)
        before = attributes["_current_fx_name"]
        for name, prepare, arguments in self._prepare:
            attributes["_current_fx_name"] = name
            batch = prepare(batch, *arguments)
        attributes["_current_fx_name"] = before
        progress = loop.batch_progress
        progress.total.ready += 1
        progress.current.ready += 1
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
