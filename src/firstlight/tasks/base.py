"""What every task does with the parts it is given."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection

from firstlight.compat import silence_known_warnings
from firstlight.errors import UsageError, did_you_mean
from firstlight.hyperparameters import keep_hyperparameters
from firstlight.optim import parameter_groups
from firstlight.schedules import Schedule
from firstlight.tasks.observed import Observed

__all__ = ["Task"]

_log = logging.getLogger(__name__)


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

    Raises:
        UsageError: When no metric has the name `monitor`, or when a checkpoint is loaded without a part that was given
            as an object.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        metrics: Mapping[str, Metric],
        monitor: str = "val/loss",
    ) -> None:
        super().__init__()
        silence_known_warnings()
        keep_hyperparameters(self, {"metrics"}, network=network, loss=loss, optimizer=optimizer, schedule=schedule)
        self.network = network
        self.loss = loss
        self.build_optimizer = optimizer
        self.schedule = schedule
        collection = MetricCollection(dict(metrics))
        self.observed_train = Observed("train", collection)
        self.observed_val = Observed("val", collection)
        self.observed_test = Observed("test", collection)
        self.monitor = monitor
        self.mode = self._mode(metrics)
        self._logged_step = 0
        self._horizon: dict[str, float] = {}
        self._steps_done = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def shared_step(self, batch: tuple[Tensor, Tensor], observed: Observed) -> Tensor:
        """Return the loss of a batch `(inputs, targets)`, and remember what the metrics need."""
        inputs, targets = batch
        outputs = self(inputs)
        loss: Tensor = self.loss(outputs, targets)
        observed.add(loss, outputs, targets)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        return self.shared_step(batch, self.observed_train)

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
        try:
            optimizer = self.build_optimizer(parameter_groups(self))
        except ValueError as error:  # torch's word for a value out of its range
            raise UsageError(f"optimizer: {error}") from error
        total = self.total_steps
        if self.trainer.ckpt_path and total < self._steps_done:
            raise UsageError(
                f"the run has done {self._steps_done:,} optimiser steps, and only {total:,} are planned now: plan more"
            )
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

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse samples that this task cannot learn from; network and loss are tried without a gradient.

        Args:
            batch: A few samples `(inputs, targets)` as the network is going to see them.
            targets: `(N, ...)`, all targets of the split.

        Raises:
            UsageError: When they do not fit.
        """
        network, loss = type(self.network).__name__, type(self.loss).__name__
        inputs, few = batch
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("error", "Using a target size")  # What torch broadcasts to a wrong number.
                outputs = _tried(lambda: self(inputs), f"{network} cannot take inputs of shape {tuple(inputs.shape)}")
                self.check_outputs(outputs, few)
                fault = f"{loss} cannot compare outputs {_described(outputs)} with targets {_described(few)}"
                value = _tried(lambda: self.loss(outputs, few), fault)
        finally:
            self.train(training)
        if value.ndim:
            raise UsageError(f"{loss} gives {_described(value)}: a loss is one number, the mean over the batch")

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs that this task cannot read; a task that knows their shape overrides this."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the validation metrics of this moment and the horizon of the schedule."""
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {name: value.item() for name, value in metrics.items() if name.startswith("val/")}
        checkpoint["horizon"] = self._horizon

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the horizon that the run was planned with."""
        self._horizon = checkpoint["horizon"]
        self._steps_done = checkpoint["global_step"]

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


def _tried(call: Callable[[], Tensor], fault: str) -> Tensor:
    try:
        return call()
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:  # what torch says of shapes and dtypes
        raise UsageError(f"{fault}: {' '.join(str(error).split())}") from error


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
