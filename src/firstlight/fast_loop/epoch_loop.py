"""Lightning's loops over batches without connectors, strategy, precision and wrapped optimizer in between.

Hooks, their arguments, their order and the counters are Lightning's. A batch in which anything but module and callbacks
has a say goes Lightning's own way.
"""

from functools import partial
from typing import Any

from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from firstlight.fast_loop.hooks import Fit, is_own


class FastEpochLoop(_TrainingEpochLoop):
    """Lightning's `_TrainingEpochLoop` with a faster step; both have one `__dict__`, so that they count together."""

    __slots__ = ("_fit", "_handles_signals", "_has_logged", "_is_fast")

    def __init__(self, loop: _TrainingEpochLoop, fit: Fit, handles_signals: bool) -> None:
        self.__dict__ = loop.__dict__
        self._fit, self._handles_signals, self._is_fast, self._has_logged = fit, handles_signals, False, True
        log = self._results.log

        def noted(*args: Any, **kwargs: Any) -> None:
            self._has_logged = True
            log(*args, **kwargs)

        self._results.log = noted

    def advance(self, data_fetcher: Any) -> None:
        """Train with the next batch; `StopIteration` ends the epoch."""
        fit, progress, trainer = self._fit, self.batch_progress, self._fit.trainer
        self._is_fast = fit.look(type(data_fetcher) is _PrefetchDataFetcher) and not self._restarting
        if not self._is_fast:
            self._has_logged = True
            super().advance(data_fetcher)
            return
        if self.val_loop._restarting:
            self.val_loop.restarting = False
        if not self._handles_signals and trainer.world_size > 1:
            self._broadcast_sigterm_tensor()  # which waits for all processes
        batch, _, _ = next(data_fetcher)
        batch_idx = progress.current.ready
        progress.is_last_batch = data_fetcher.done
        batch = fit.begin(self, batch)
        outputs, ends = None, False
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        elif ends := fit.hook("on_train_batch_start", batch, batch_idx) == -1:
            progress.increment_by(0, is_last_batch=True)
        else:
            progress.increment_started()
            outputs = self._optimize(batch, batch_idx)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if ends:
            raise StopIteration
        fit.hook("on_train_batch_end", outputs, batch, batch_idx)
        if self._has_logged:
            trainer._logger_connector.on_batch_end()
        self._has_logged, self._results.batch, self._results.batch_size = False, None, None
        progress.increment_completed()
        every = trainer.log_every_n_steps
        if (every and (self._batches_that_stepped + 1) % every == 0) or trainer.should_stop or trainer.fast_dev_run:
            trainer._logger_connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate where that is due, and count."""
        trainer, progress = self._fit.trainer, self.batch_progress
        every, epochs = (
            trainer.val_check_batch,
            trainer.check_val_every_n_epoch,
        )  # Without `every`, time decides, or none.
        done = progress.total.ready if epochs is None else progress.current.ready
        may_validate = progress.is_last_batch or not every or every == float("inf") or done % every == 0
        has_news = self._skip_next_val or trainer.should_stop or trainer.received_sigterm
        plateaus = any(config.reduce_on_plateau for config in trainer.strategy.lr_scheduler_configs)
        if not self._is_fast or has_news or may_validate or plateaus:
            self._has_logged = True  # A validation leaves numbers behind.
            super().on_advance_end(data_fetcher)
        elif not self._should_accumulate():
            self._batches_that_stepped += 1

    def _should_accumulate(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()

    def _optimize(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Make one step, or a part of an accumulated one; return what hooks are told of it."""
        fit, trainer, module = self._fit, self._fit.trainer, self._fit.module
        optimizer, parts = fit.strategy._optimizers[0], trainer.accumulate_grad_batches
        progress = self.automatic_optimization.optim_progress.optimizer

        def forward() -> ClosureResult:
            found = fit.step("training_step", batch, batch_idx)
            if found is None and trainer.world_size > 1:
                raise RuntimeError("training_step returned None: of several processes none can leave out a step")
            return ClosureResult.from_training_step_output(found, parts)

        def zero_grad() -> None:
            progress.zero_grad.increment_ready()
            fit.hook("on_before_zero_grad", optimizer)
            progress.zero_grad.increment_started()
            epoch = trainer.current_epoch
            fit.named("optimizer_zero_grad", module.optimizer_zero_grad, epoch, batch_idx, optimizer)
            progress.zero_grad.increment_completed()

        def backward(loss: Tensor) -> None:
            fit.strategy.pre_backward(loss)
            fit.hook("on_before_backward", loss)
            module.backward(loss)
            fit.hook("on_after_backward")
            fit.strategy.post_backward(loss)

        def closure_and_clip() -> Tensor | None:
            loss = closure()
            fit.hook("on_before_optimizer_step", optimizer)
            value, own = trainer.gradient_clip_val, is_own(module, "clip_gradients")
            if value is not None or not own or not is_own(module, "configure_gradient_clipping"):
                clip, how = module.configure_gradient_clipping, trainer.gradient_clip_algorithm
                options = {"gradient_clip_val": value, "gradient_clip_algorithm": how}
                fit.named("configure_gradient_clipping", clip, optimizer, **options)
            return loss

        # As in Lightning, the gradient is taken under the name of the strategy's hook.
        step = partial(fit.named, "backward", backward)
        closure = Closure(forward, step, zero_grad if batch_idx % parts == 0 else None)
        if self._should_accumulate():
            with _block_parallel_sync_behavior(fit.strategy):
                closure()
        else:
            progress.step.increment_ready()
            fit.named("optimizer_step", optimizer.step, closure=closure_and_clip)
            progress.step.increment_completed()
        result = closure.consume_result()
        return {} if result.loss is None else result.asdict()


class FastEvaluationLoop(_EvaluationLoop):
    """Lightning's `_EvaluationLoop` with a faster step, for the validations of a fit; both have one `__dict__`."""

    __slots__ = ("_fit",)

    def __init__(self, loop: _EvaluationLoop, fit: Fit) -> None:
        self.__dict__ = loop.__dict__
        self._fit = fit

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        fit, progress, trainer = self._fit, self.batch_progress, self._fit.trainer
        if not fit.look() or dataloader_iter is not None or self.num_dataloaders > 1:
            super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        batch = fit.begin(self, batch)
        fit.hook("on_validation_batch_start", batch, batch_idx)
        progress.increment_started()
        output = fit.step("validation_step", batch, batch_idx)
        progress.increment_processed()
        fit.hook("on_validation_batch_end", output, batch, batch_idx)
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
