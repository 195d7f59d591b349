"""What every task does with the parts it is given."""

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection

from firstlight.compat import silence_known_warnings
from firstlight.errors import UsageError, did_you_mean
from firstlight.optim import parameter_groups, weights
from firstlight.schedules import Schedule
from firstlight.tasks.observed import Observed

__all__ = ["Task"]

_log = logging.getLogger(__name__)

_OBJECT = "<object of "
"""How the note begins that stands in a checkpoint where a part was given as an object."""


class Task(LightningModule):
    """One step for every split, an optimiser without decay on biases and norms, a schedule that counts its steps.

    Logged are `train/*` as means since the last logging, `val/*` and `test/*` as means over the samples of the split.

    Args:
        network: Maps inputs to outputs.
        loss: Maps outputs and targets to a scalar, the mean over the batch.
        optimizer: Makes an optimiser of parameter groups, for example `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        schedule: Factor of the learning rate at each optimiser step.
        metrics: By name, the metrics of `(outputs, targets)`.
        monitor: The metric that decides which checkpoint is best and when to stop: `val/loss` or `val/` and the name
            of a metric. Whether more is better follows from the metric.
        l1: While training, `l1` times the sum of the absolute weights is added to the loss, biases and norms left out;
            at least 0. `train/loss` is logged without it, so that it can be compared with `val/loss`.

    Raises:
        UsageError: When no metric has the name `monitor`, when `l1` is negative or infinite, or when a checkpoint is
            loaded without a part that was given as an object.
    """

    of_whole_splits: ClassVar[frozenset[str]] = frozenset()
    """Metrics that mean something only, or are cheap only, for a whole split, and are left out of `train/*`."""

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        metrics: Mapping[str, Metric],
        monitor: str = "val/loss",
        l1: float = 0.0,
    ) -> None:
        super().__init__()
        silence_known_warnings()
        self._keep_hyperparameters(network=network, loss=loss, optimizer=optimizer, schedule=schedule)
        self.network = network
        self.loss = loss
        self.build_optimizer = optimizer
        self.schedule = schedule
        if not 0 <= l1 < math.inf:
            raise UsageError(f"{type(self).__name__} was given l1={l1}: it is a number, at least 0")
        self.l1 = l1
        collection = MetricCollection(dict(metrics))
        while_training: dict[str, Metric | MetricCollection] = {
            name: metric for name, metric in metrics.items() if name not in self.of_whole_splits
        }
        self.observed_train = Observed("train", MetricCollection(while_training))
        self.observed_val = Observed("val", collection)
        self.observed_test = Observed("test", collection)
        self.monitor = monitor
        self.mode = self._mode(metrics)
        self._logged_step = 0
        self._horizon: dict[str, float] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def shared_step(self, batch: tuple[Tensor, Tensor], observed: Observed) -> Tensor:
        """Return the loss of a batch `(inputs, targets)`, and remember what the metrics need."""
        inputs, targets = batch
        return self.score(self(inputs), targets, observed)

    def score(self, outputs: Tensor, targets: Tensor, observed: Observed) -> Tensor:
        """Return the loss of outputs, and remember what the metrics need; a task overrides this where they differ."""
        loss: Tensor = self.loss(outputs, targets)
        observed.add(loss, outputs, targets)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch, with the penalty on the weights."""
        loss = self.shared_step(batch, self.observed_train)
        if self.l1:
            loss = loss + self.l1 * sum(weight.abs().sum() for weight in weights(self))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Observe a validation batch."""
        self.shared_step(batch, self.observed_val)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Observe a test batch."""
        self.shared_step(batch, self.observed_test)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log `train/*` after every `log_every_n_steps` optimiser steps."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if every and step > self._logged_step and step % every == 0:
            self._logged_step = step
            self.log_dict(self.observed_train.read())

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self.log_dict(self.observed_val.read(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self.log_dict(self.observed_test.read(), sync_dist=True)

    @property
    def total_steps(self) -> float:
        """The optimiser steps that the whole run plans, infinite where nobody knows."""
        planned = self.trainer.estimated_stepping_batches
        return planned if planned >= 0 else math.inf  # Lightning says -1 for an iterable without a length.

    @property
    def planned_schedule(self) -> Schedule:
        """The schedule that the run follows: a resumed run keeps the warm-up that it was first planned with."""
        first = self._horizon["first"] if self.trainer.ckpt_path else self.total_steps
        return self.schedule if first == self.total_steps else self.schedule.continued(first)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, and step the schedule with it."""
        optimizer = self.build_optimizer(parameter_groups(self))
        total = self.total_steps
        schedule = self.planned_schedule
        schedule(0, total)  # A schedule that cannot serve this run says so before it starts.
        # A plain function: LambdaLR would save the attributes of a callable object, and restore an old horizon.
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start to count anew, and move the learning rate at once where a resumed run has another horizon."""
        self.observed_train.reset()
        self._logged_step = self.trainer.global_step
        total = self.total_steps
        before = self._horizon["now"] if self.trainer.ckpt_path else total
        self._horizon = {"first": self._horizon["first"] if self.trainer.ckpt_path else total, "now": total}
        if before != total:
            self._move_to_horizon(before, total)

    def check(self, inputs: Tensor, targets: Tensor) -> None:
        """Refuse samples that this task cannot learn from; a task that knows what it expects overrides this.

        Args:
            inputs: `(N, ...)`, all inputs of a split.
            targets: `(N, ...)`, their targets.

        Raises:
            UsageError: When they do not fit.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the validation metrics of this moment and the horizon of the schedule."""
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {name: value.item() for name, value in metrics.items() if name.startswith("val/")}
        checkpoint["horizon"] = self._horizon

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the horizon that the run was planned with."""
        self._horizon = checkpoint["horizon"]

    def _move_to_horizon(self, before: float, total: float) -> None:
        """Set the learning rate of this step to the new horizon's, which the scheduler does only from the next on."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        step = scheduler.last_epoch
        groups = scheduler.optimizer.param_groups
        old = groups[0]["lr"]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)
        if self.trainer.is_global_zero:
            _log.warning(
                f"the run was planned with {before:,} optimiser steps and now has {total:,}: "
                f"at step {step:,} the learning rate moves from {old:.3g} to {groups[0]['lr']:.3g}"
            )

    def _mode(self, metrics: Mapping[str, Metric]) -> Literal["min", "max"]:
        known = {"val/loss": False, **{f"val/{name}": metric.higher_is_better for name, metric in metrics.items()}}
        if self.monitor not in known:
            raise UsageError(
                f"monitor={self.monitor} is no metric of {type(self).__name__}, which has {', '.join(known)}"
                + did_you_mean(self.monitor, known)
            )
        better = known[self.monitor]
        if better is None:
            raise UsageError(f"monitor={self.monitor} has no best value: neither more nor less of it is better")
        return "max" if better else "min"

    def _keep_hyperparameters(self, **parts: object) -> None:
        """Store how this task was made as plain values, so that its checkpoint loads with `weights_only=True`.

        From the command line that is its configuration, parts included. In a program a part is an object: a note takes
        its place, and to load the checkpoint without that part is refused.
        """
        self.save_hyperparameters(ignore=[*parts, "metrics"], logger=False)
        if "_instantiator" in self.hparams:  # Lightning's mark of the command line.
            self.save_hyperparameters(logger=False)
            return
        given = {**self.hparams, **parts}
        missing = [name for name, value in given.items() if isinstance(value, str) and value.startswith(_OBJECT)]
        if missing:
            raise UsageError(
                f"the checkpoint of this {type(self).__name__} was written by a program that gave {', '.join(missing)} "
                f"as objects: give them again, load_from_checkpoint(path, {', '.join(f'{m}=...' for m in missing)})"
            )
        for name, value in given.items():
            if not _is_plain(value):
                self.hparams[name] = f"{_OBJECT}{type(value).__module__}.{type(value).__qualname__}>"


def _is_plain(value: object) -> bool:
    """Tell whether a checkpoint with `value` loads with `weights_only=True`; a subclass of a number does not."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, float, str)
