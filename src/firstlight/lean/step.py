"""One batch of Lightning's training loop without what wraps it, where nothing is there to be wrapped.

Lightning 2.6.6 hands a batch through its connectors, the strategy, the precision, the optimiser and three closures, and
asks at each step what cannot have changed since the step before. On one device a process, alone or with others that
average their gradients, in full precision or in `torch.autocast` without a scaler, and with a module that steps its
optimiser as all do, they come down to what stands here: the same hooks, with the same arguments, in the same order, and
the same counters. In any other case the batch goes Lightning's own way.
"""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from firstlight.lean.acting import Acting
from firstlight.lean.batches import Batches
from firstlight.lean.names import named
from firstlight.lean.plain import accumulates, scheduler_of

__all__ = ["Step"]


class Step(Batches):
    """`advance`, `on_advance_end` and `done` of a trainer's epoch loop, and a step of its validation.

    Args:
        trainer: Of the fit.
        acting: Which of its callbacks have something to do.
        heeds_signals: Whether a callback sees to it that all processes end on a SIGTERM to one of them.
    """

    def __init__(self, trainer: Trainer, acting: Acting, heeds_signals: bool) -> None:
        super().__init__(trainer, acting)
        self._heeds_signals = heeds_signals
        self._advance, self._on_advance_end = self._loop.advance, self._loop.on_advance_end
        self._evaluation_step = self._loop.val_loop._evaluation_step
        self._is_epoch_done = vars(_TrainingEpochLoop)["done"].fget
        self._logged = True
        self._scheduler: Any = None

    def note_logging(self) -> None:
        """Remember that something was logged, so that there is something to be made of it."""
        self._logged = True

    def global_step(self, trainer: Trainer) -> int:
        """Return the number of optimiser steps done, which callbacks ask for at each step."""
        module = trainer._accelerator_connector.strategy._lightning_module  # Its property costs three calls each time.
        if trainer is self._trainer and self._done is not None and module is self._module:
            return self._done.completed  # type: ignore[no-any-return]  # a counter of Lightning's
        loop = trainer.fit_loop.epoch_loop
        if module is None or module.automatic_optimization:
            return loop.automatic_optimization.optim_progress.optimizer_steps
        return loop.manual_optimization.optim_step_progress.total.completed

    def is_epoch_done(self, loop: _TrainingEpochLoop) -> bool:
        """Tell whether no batch follows in the epoch."""
        trainer = self._trainer
        if loop.trainer is not trainer or loop._restarting or trainer.should_stop:
            return self._is_epoch_done(loop)  # type: ignore[no-any-return]  # a property of Lightning's
        progress, most = loop.batch_progress, loop.max_steps
        is_last = progress.is_last_batch or progress.current.ready == trainer.fit_loop.max_batches
        return is_last or (most != -1 and self.global_step(trainer) >= most)

    def advance(self, fetcher: Any) -> None:
        """Train with the next batch.

        Raises:
            StopIteration: When `on_train_batch_start` of the module ends the epoch.
        """
        trainer, loop = self._trainer, self._loop
        if loop._restarting or not self._is_plain(fetcher):
            self._logged = True
            self._advance(fetcher)
            return
        hook, progress = self._hook, loop.batch_progress
        total, current = progress.total, progress.current
        if loop.val_loop._restarting:
            loop.val_loop.restarting = False
        if self._world_size > 1 and not self._heeds_signals:
            loop._broadcast_sigterm_tensor()  # which waits for all processes
        batch = self._fetch(fetcher)
        batch_idx = current.ready
        progress.is_last_batch = fetcher.done
        batch = self._ready(loop, batch)
        outputs, ends = None, False
        if batch is None:
            loop._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            ends = hook("on_train_batch_start", batch, batch_idx) == -1
            if ends:
                progress.increment_by(0, is_last_batch=True)
            else:
                total.started += 1
                current.started += 1
                outputs = self._run(batch, batch_idx)
        total.processed += 1
        current.processed += 1
        goes_on = trainer.accumulate_grad_batches > 1 and accumulates(trainer, loop)
        self._schedule(goes_on)
        if ends:
            raise StopIteration
        hook("on_train_batch_end", outputs, batch, batch_idx)
        self._gather(loop, self._logged)
        self._logged = False
        total.completed += 1
        current.completed += 1
        if not goes_on:
            every = trainer.log_every_n_steps
            is_due = every and (loop._batches_that_stepped + 1) % every == 0
            if is_due or trainer.should_stop or trainer.fast_dev_run:
                trainer._logger_connector.update_train_step_metrics()

    def on_advance_end(self, fetcher: Any) -> None:
        """Validate where that is due, and count."""
        trainer, loop, every = self._trainer, self._loop, self._trainer.val_check_batch
        done = loop.batch_progress.total if trainer.check_val_every_n_epoch is None else loop.batch_progress.current
        if (
            not self._plain
            or self._scheduler is None
            or loop._skip_next_val
            or loop.batch_progress.is_last_batch
            or trainer.should_stop
            or trainer.received_sigterm
            or trainer._val_check_time_interval is not None
            or not every
            or every == float("inf")
            or done.ready % every == 0
        ):
            self._logged = True  # A validation leaves numbers behind.
            self._on_advance_end(fetcher)
        elif trainer.accumulate_grad_batches == 1 or not accumulates(trainer, loop):
            loop._batches_that_stepped += 1

    def validate(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        """Validate the next batch, once a first one was trained with."""
        trainer, module, loop = self._trainer, self._module, self._loop.val_loop
        if module is not None and len(vars(module)) != self._attributes:
            self._judge(module)
        within = trainer._accelerator_connector.strategy._lightning_module is module
        if not self._plain or not within or dataloader_iter is not None or loop.num_dataloaders > 1:
            self._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        assert module is not None
        hook, progress = self._hook, loop.batch_progress
        batch = self._ready(loop, batch)
        hook("on_validation_batch_start", batch, batch_idx)
        progress.increment_started()
        given = (batch, batch_idx) if self._validation_takes_index else (batch,)
        check = module.validation_step if self._is_bare else self._strategy.validation_step
        with self._strategy.precision_plugin.val_step_context() if self._casts else nullcontext():
            output = named(module, "validation_step", check, *given)
        progress.increment_processed()
        hook("on_validation_batch_end", output, batch, batch_idx)
        logged = any(not each.has_reset for each in loop._results.values())
        self._gather(loop, logged)
        progress.increment_completed()
        if not trainer.sanity_checking:
            seen = loop._seen_batches_per_dataloader
            loop._has_run = True
            if logged:
                trainer._logger_connector.update_eval_step_metrics(seen[dataloader_idx])
            seen[dataloader_idx] += 1
        if not progress.is_last_batch and trainer.received_sigterm:
            raise SIGTERMException

    def _schedule(self, goes_on: bool) -> None:
        """Step the learning rate, unless the batch is followed by another one before the optimiser steps."""
        loop, self._scheduler = self._loop, scheduler_of(self._strategy, self._module)
        if self._scheduler is None:
            loop.update_lr_schedulers("step", update_plateau_schedulers=False)
            if loop._num_ready_batches_reached():
                loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        elif not goes_on:
            total, current = loop.scheduler_progress.total, loop.scheduler_progress.current
            total.ready += 1
            current.ready += 1
            named(self._module, "lr_scheduler_step", self._scheduler.step)
            total.completed += 1
            current.completed += 1

    def _run(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Make one step, or a part of an accumulated one; return what `training_step` did."""
        trainer, loop, hook, module = self._trainer, self._loop, self._hook, self._module
        assert module is not None
        optimizer: Optimizer = self._strategy._optimizers[0]
        progress = loop.automatic_optimization.optim_progress.optimizer
        steps, zeros = progress.step, progress.zero_grad
        outputs: dict[str, Any] | None = None

        def closure() -> Tensor | None:
            nonlocal outputs
            loss, outputs = self._loss(batch, batch_idx)
            if batch_idx % trainer.accumulate_grad_batches == 0:
                zeros.total.ready += 1
                zeros.current.ready += 1
                hook("on_before_zero_grad", optimizer)
                zeros.total.started += 1
                zeros.current.started += 1
                epoch = trainer.fit_loop.epoch_progress.current.completed
                named(module, "optimizer_zero_grad", module.optimizer_zero_grad, epoch, batch_idx, optimizer)
                zeros.total.completed += 1
                zeros.current.completed += 1
            if loss is not None:
                named(module, "backward", self._backward, loss)
            return outputs.get("loss")

        def whole() -> Tensor | None:
            if torch.is_grad_enabled():
                loss = closure()
            else:  # Not every optimiser calls its closure with it.
                with torch.enable_grad():
                    loss = closure()
            hook("on_before_optimizer_step", optimizer)
            if self._clips_itself or trainer.gradient_clip_val is not None:
                call._call_lightning_module_hook(
                    trainer,
                    "configure_gradient_clipping",
                    optimizer,
                    gradient_clip_val=trainer.gradient_clip_val,
                    gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                )
            return loss

        if trainer.accumulate_grad_batches > 1 and accumulates(trainer, loop):
            with _block_parallel_sync_behavior(trainer.strategy), torch.enable_grad():
                closure()
        else:
            steps.total.ready += 1
            steps.current.ready += 1
            named(module, "optimizer_step", optimizer.step, closure=whole)
            steps.total.completed += 1
            steps.current.completed += 1
        if outputs is None:
            raise MisconfigurationException(f"{type(optimizer).__name__}.step did not call its closure, which trains")
        return outputs

    def _loss(self, batch: Any, batch_idx: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the loss, and what hooks are told of it."""
        trainer, module = self._trainer, self._module
        assert module is not None
        given = (batch, batch_idx) if self._takes_index else (batch,)
        train = module.training_step if self._is_bare else self._strategy.training_step
        if self._casts:
            with self._strategy.precision_plugin.train_step_context():
                found = named(module, "training_step", train, *given)
        else:
            found = named(module, "training_step", train, *given)
        if found is None and self._world_size > 1:
            raise RuntimeError(
                "training_step returned None: of several processes none can leave out a step, for which the others wait"
            )
        if trainer.accumulate_grad_batches == 1 and isinstance(found, Tensor):
            return found, {"loss": found.detach().clone()}
        result = ClosureResult.from_training_step_output(found, trainer.accumulate_grad_batches)
        if result.closure_loss is None:
            said = "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            Closure.warning_cache.warn(said)
        return result.closure_loss, {} if result.loss is None else result.asdict()

    def _backward(self, loss: Tensor) -> None:
        strategy, module = self._strategy, self._module
        assert module is not None
        if not self._is_bare:
            strategy.pre_backward(loss)
        self._hook("on_before_backward", loss)
        module.backward(loss)
        self._hook("on_after_backward")
        if not self._is_bare:
            strategy.post_backward(loss)
