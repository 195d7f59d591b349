"""Lightning's loops over batches without their overhead: the same hooks in the same order, the same counters."""

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
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from firstlight.fast_loop.hooks import FastPath, is_own


class FastEpochLoop(_TrainingEpochLoop):
    """`_TrainingEpochLoop` with a faster step."""

    _path: FastPath

    def advance(self, data_fetcher: Any) -> None:
        """Train on the next batch; `StopIteration` ends the epoch."""
        path, progress, trainer = self._path, self.batch_progress, self._path.trainer
        if self._restarting or not path.is_allowed(type(data_fetcher) is _PrefetchDataFetcher):
            super().advance(data_fetcher)
            return
        if not path.handles_signals and trainer.world_size > 1:
            self._broadcast_sigterm_tensor()  # It waits for all processes.
        batch, batch_idx = next(data_fetcher)[0], progress.current.ready
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
        path.end_batch(self)
        progress.increment_completed()
        every = trainer.log_every_n_steps
        if (every and (self._batches_that_stepped + 1) % every == 0) or trainer.should_stop or trainer.fast_dev_run:
            trainer._logger_connector.update_train_step_metrics()

    @property
    def _is_training_done(self) -> bool:
        return self._num_ready_batches_reached() or (self.max_steps != -1 and super()._is_training_done)

    def _should_accumulate(self) -> bool:
        return self._path.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()

    def _step_schedules(self) -> None:
        configs = self._path.strategy.lr_scheduler_configs
        is_stepped = [c.interval == "step" and c.frequency == 1 and not c.reduce_on_plateau for c in configs]
        if is_stepped != [True] or not is_own(self._path.module, "lr_scheduler_step"):
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        elif not self._should_accumulate():
            self.scheduler_progress.increment_ready()
            self._path.call_as("lr_scheduler_step", configs[0].scheduler.step)
            self.scheduler_progress.increment_completed()

    def _optimize(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Make an optimiser step, or accumulate; return the outputs of the step for the hooks."""
        path, trainer, module = self._path, self._path.trainer, self._path.module
        optimizer, window = path.strategy._optimizers[0], trainer.accumulate_grad_batches
        progress = self.automatic_optimization.optim_progress.optimizer
        result: ClosureResult | None = None

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
            is_simple = window == 1 and isinstance(found, Tensor)  # Without a division by 1 and its gradient.
            result = ClosureResult(found) if is_simple else ClosureResult.from_training_step_output(found, window)
            if batch_idx % window == 0:
                progress.zero_grad.increment_ready()
                path.call_hook("on_before_zero_grad", optimizer)
                progress.zero_grad.increment_started()
                zero_grad = module.optimizer_zero_grad
                path.call_as("optimizer_zero_grad", zero_grad, trainer.current_epoch, batch_idx, optimizer)
                progress.zero_grad.increment_completed()
            if result.closure_loss is None:
                Closure.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this ...")
            else:
                path.call_as("backward", backward, result.closure_loss)
            return result.loss

        def closure_and_clip() -> Tensor | None:
            with torch.enable_grad():
                loss = closure()
            path.call_hook("on_before_optimizer_step", optimizer)
            value, is_default = trainer.gradient_clip_val, is_own(module, "clip_gradients")
            if value is not None or not is_default or not is_own(module, "configure_gradient_clipping"):
                clip = path.strategy._precision_plugin._clip_gradients
                clip(module, optimizer, value, gradient_clip_algorithm=trainer.gradient_clip_algorithm)
            return loss

        if self._should_accumulate():
            with _block_parallel_sync_behavior(path.strategy), torch.enable_grad():
                closure()
        else:
            progress.step.increment_ready()
            path.call_as("optimizer_step", _find_step(optimizer), closure=closure_and_clip)
            progress.step.increment_completed()
        if result is None:
            raise MisconfigurationException(f"{type(optimizer).__name__}.step did not call its closure, which trains")
        return {} if result.loss is None else result.asdict()


def _find_step(optimizer: Any) -> Any:
    """Return `optimizer.step`; without a profiler and hooks, it skips torch's label, a third of its time in `tiny`."""
    step, own = type(optimizer).step, vars(optimizer).get("step")
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    is_labelled = getattr(step, "hooked", False) and (own is None or hasattr(own, "_wrapped_by_lr_sched"))
    if not is_labelled or hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled():
        return optimizer.step
    optimizer._opt_called = True  # torch's schedulers ask for it.
    return step.__wrapped__.__get__(optimizer)


class FastEvaluationLoop(_EvaluationLoop):
    """`_EvaluationLoop` with a faster step, for the validations of a fit."""

    _path: FastPath

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
        has_logged = path.end_batch(self)
        progress.increment_completed()
        if not trainer.sanity_checking:
            self._has_run = True
            if has_logged:
                trainer._logger_connector.update_eval_step_metrics(self._seen_batches_per_dataloader[dataloader_idx])
            self._seen_batches_per_dataloader[dataloader_idx] += 1
        if not progress.is_last_batch and trainer.received_sigterm:
            raise SIGTERMException
