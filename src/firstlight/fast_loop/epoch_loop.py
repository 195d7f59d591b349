"""Lightning's loops over batches without their overhead.

Lightning 2.6.6 passes a batch through connectors, strategy, precision and a wrapped optimiser, and asks at each step
for what seldom changes. If only the module and the callbacks act on a step, the code here does the same: the same hooks
with the same arguments in the same order, and the same counters. Any other batch takes Lightning's own path.
"""

from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from firstlight.fast_loop.hooks import FastPath, is_own


class FastEpochLoop(_TrainingEpochLoop):
    """`_TrainingEpochLoop` with a faster step. It shares the `__dict__` of Lightning's loop, and so all counters."""

    __slots__ = ("_handles_signals", "_has_logged", "_is_fast", "_path")

    def __init__(self, loop: _TrainingEpochLoop, path: FastPath, handles_signals: bool) -> None:
        self.__dict__ = loop.__dict__
        self._path, self._handles_signals, self._is_fast, self._has_logged = path, handles_signals, False, True
        log = self._results.log

        def log_and_note(*args: Any, **kwargs: Any) -> None:
            self._has_logged = True
            log(*args, **kwargs)

        self._results.log = log_and_note

    @property
    def global_step(self) -> int:
        """The number of optimiser steps done; callbacks ask for it several times a step."""
        if self._is_fast and self._path.strategy._lightning_module is self._path.module:  # Another may follow.
            return self.automatic_optimization.optim_progress.optimizer.step.total.completed
        return super().global_step

    def advance(self, data_fetcher: Any) -> None:
        """Train on the next batch; `StopIteration` ends the epoch."""
        path, progress, trainer = self._path, self.batch_progress, self._path.trainer
        self._is_fast = path.is_allowed(type(data_fetcher) is _PrefetchDataFetcher) and not self._restarting
        if not self._is_fast:
            self._has_logged = True
            super().advance(data_fetcher)
            return
        if self.val_loop._restarting:
            self.val_loop.restarting = False
        if not self._handles_signals and trainer.world_size > 1:
            self._broadcast_sigterm_tensor()  # It waits for all processes.
        batch, _, _ = next(data_fetcher)
        batch_idx = progress.current.ready
        progress.is_last_batch = data_fetcher.done
        batch = path.start_batch(self, batch)
        outputs, ends = None, False
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        elif ends := path.call_hook("on_train_batch_start", batch, batch_idx) == -1:
            progress.increment_by(0, is_last_batch=True)
        else:
            progress.increment_started()
            outputs = self._optimize(batch, batch_idx)
        progress.increment_processed()
        self._step_schedules()
        if ends:
            raise StopIteration
        path.call_hook("on_train_batch_end", outputs, batch, batch_idx)
        if self._has_logged:
            trainer._logger_connector.on_batch_end()
        self._has_logged, self._results.batch, self._results.batch_size = False, None, None
        progress.increment_completed()
        every = trainer.log_every_n_steps
        if (every and (self._batches_that_stepped + 1) % every == 0) or trainer.should_stop or trainer.fast_dev_run:
            trainer._logger_connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate if it is time, and count the step."""
        trainer, progress = self._path.trainer, self.batch_progress
        every = trainer.val_check_batch  # None if validation depends on time or never runs.
        done = progress.total.ready if trainer.check_val_every_n_epoch is None else progress.current.ready
        may_validate = progress.is_last_batch or not every or every == float("inf") or done % every == 0
        is_ending = self._skip_next_val or trainer.should_stop or trainer.received_sigterm
        if not self._is_fast or is_ending or may_validate or self._find_schedule() is None:
            self._has_logged = True  # A validation leaves values behind.
            super().on_advance_end(data_fetcher)
        elif not self._should_accumulate():
            self._batches_that_stepped += 1

    def _should_accumulate(self) -> bool:
        return self._path.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()

    def _find_schedule(self) -> Any:
        """Return the scheduler if there is only one and it is stepped with the optimiser, else None."""
        configs = self._path.strategy.lr_scheduler_configs
        if len(configs) != 1 or not is_own(self._path.module, "lr_scheduler_step"):
            return None
        config = configs[0]
        is_stepped = config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
        return config.scheduler if is_stepped else None

    def _step_schedules(self) -> None:
        if (scheduler := self._find_schedule()) is None:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        elif not self._should_accumulate():
            self.scheduler_progress.increment_ready()
            self._path.call_as("lr_scheduler_step", scheduler.step)
            self.scheduler_progress.increment_completed()

    def _optimize(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Make an optimiser step, or accumulate; return the outputs of the step for the hooks."""
        path, trainer, module = self._path, self._path.trainer, self._path.module
        optimizer, window = path.strategy._optimizers[0], trainer.accumulate_grad_batches
        progress = self.automatic_optimization.optim_progress.optimizer
        result: ClosureResult | None = None

        def zero_grad() -> None:
            progress.zero_grad.increment_ready()
            path.call_hook("on_before_zero_grad", optimizer)
            progress.zero_grad.increment_started()
            epoch = trainer.current_epoch
            path.call_as("optimizer_zero_grad", module.optimizer_zero_grad, epoch, batch_idx, optimizer)
            progress.zero_grad.increment_completed()

        def backward(loss: Tensor) -> None:
            path.strategy.pre_backward(loss)
            path.call_hook("on_before_backward", loss)
            module.backward(loss)
            path.call_hook("on_after_backward")
            path.strategy.post_backward(loss)

        def closure() -> Tensor | None:
            nonlocal result
            found = path.call_step("training_step", batch, batch_idx)
            if found is None and trainer.world_size > 1:
                raise RuntimeError("training_step returned None: with several processes, no process may skip a step")
            result = ClosureResult.from_training_step_output(found, window)
            if result.closure_loss is None:
                Closure.warning_cache.warn(
                    "`training_step` returned `None`. If this was on purpose, ignore this warning..."
                )
            if batch_idx % window == 0:
                zero_grad()
            if result.closure_loss is not None:
                path.call_as("backward", backward, result.closure_loss)
            return result.loss

        def closure_and_clip() -> Tensor | None:
            with torch.enable_grad():
                loss = closure()
            path.call_hook("on_before_optimizer_step", optimizer)
            value, is_default = trainer.gradient_clip_val, is_own(module, "clip_gradients")
            if value is not None or not is_default or not is_own(module, "configure_gradient_clipping"):
                clip = partial(module.configure_gradient_clipping, gradient_clip_val=value)
                how = trainer.gradient_clip_algorithm
                path.call_as("configure_gradient_clipping", clip, optimizer, gradient_clip_algorithm=how)
            return loss

        if self._should_accumulate():
            with _block_parallel_sync_behavior(path.strategy), torch.enable_grad():
                closure()
        else:
            progress.step.increment_ready()
            path.call_as("optimizer_step", optimizer.step, closure=closure_and_clip)
            progress.step.increment_completed()
        if result is None:
            raise MisconfigurationException(f"{type(optimizer).__name__}.step did not call its closure, which trains")
        return {} if result.loss is None else result.asdict()


class FastEvaluationLoop(_EvaluationLoop):
    """`_EvaluationLoop` with a faster step, for the validations of a fit; it shares Lightning's `__dict__` as well."""

    __slots__ = ("_path",)

    def __init__(self, loop: _EvaluationLoop, path: FastPath) -> None:
        self.__dict__ = loop.__dict__
        self._path = path

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        path, progress, trainer = self._path, self.batch_progress, self._path.trainer
        if not path.is_allowed() or dataloader_iter is not None or self.num_dataloaders > 1:
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        batch = path.start_batch(self, batch)
        path.call_hook("on_validation_batch_start", batch, batch_idx)
        progress.increment_started()
        output = path.call_step("validation_step", batch, batch_idx)
        progress.increment_processed()
        path.call_hook("on_validation_batch_end", output, batch, batch_idx)
        has_logged = any(not metric.has_reset for metric in self._results.values())
        if has_logged:
            trainer._logger_connector.on_batch_end()
        self._results.batch = self._results.batch_size = None
        progress.increment_completed()
        if not trainer.sanity_checking:
            self._has_run = True
            if has_logged:
                trainer._logger_connector.update_eval_step_metrics(self._seen_batches_per_dataloader[dataloader_idx])
            self._seen_batches_per_dataloader[dataloader_idx] += 1
        if not progress.is_last_batch and trainer.received_sigterm:
            raise SIGTERMException
