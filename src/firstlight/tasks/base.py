"""What every task does with the parts it is given."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from firstlight.checkpoints.hyperparameters import keep_hyperparameters
from firstlight.checkpoints.trust import SafeLoading
from firstlight.compat import silence_known_warnings
from firstlight.errors import UsageError, did_you_mean
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.optim import weights
from firstlight.preflight.probe import attempt, described
from firstlight.schedules import Schedule
from firstlight.tasks.logged import Logged

__all__ = ["Task"]


class Task(SafeLoading, Logged):  # type: ignore[misc]  # it takes the rarer options by name only
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

    eval_only_metrics: ClassVar[frozenset[str]] = frozenset()
    """Metrics that mean something only, or are cheap only, for a whole split, and are left out of `train/*`."""

    pairwise_loss: ClassVar[bool] = False
    """Whether the loss of a batch is one of the samples' relations, and no mean over them."""

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
        super().__init__(optimizer, schedule)
        silence_known_warnings()
        keep_hyperparameters(self, {"metrics"}, network=network, loss=loss, optimizer=optimizer, schedule=schedule)
        self.network = network
        self.loss = loss
        if not 0 <= l1 < math.inf:
            raise UsageError(f"{type(self).__name__} was given l1={l1}: it is a number, at least 0")
        self.l1 = l1
        collection = MetricCollection(dict(metrics))
        while_training: dict[str, Metric | MetricCollection] = {
            name: metric for name, metric in metrics.items() if name not in self.eval_only_metrics
        }
        self.train_metrics = SplitMetrics("train", MetricCollection(while_training))
        self.val_metrics = SplitMetrics("val", collection)
        self.test_metrics = SplitMetrics("test", collection)
        self.monitor = monitor
        self.mode = self._mode(metrics)
        self._samples = [0]  # In a list: setting an attribute of a module takes 5 µs.

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def shared_step(self, batch: tuple[Tensor, Tensor], split_metrics: SplitMetrics) -> Tensor:
        """Return the loss of a batch `(inputs, targets)`, and remember what the metrics need."""
        inputs, targets = batch
        return self.compute_loss(self(inputs), targets, split_metrics)

    def compute_loss(self, outputs: Tensor, targets: Tensor, split_metrics: SplitMetrics) -> Tensor:
        """Return the loss of outputs, and remember what the metrics need; a task overrides this where they differ."""
        loss: Tensor = self.loss(outputs, targets)
        split_metrics.update(loss, outputs, targets)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch, with the penalty on the weights."""
        self._samples[0] = batch[1].shape[0]  # len() of a tensor is a call
        loss = self.shared_step(batch, self.train_metrics)
        if self.l1:
            loss = loss + self.l1 * sum(weight.abs().sum() for weight in weights(self))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate the loss; of several processes as that of all their samples, not as the mean of their means.

        Only the last batch of an epoch is larger on some processes than on others.
        """
        if self.trainer.world_size > 1 and self.trainer.is_last_batch:
            own = torch.tensor(float(self._samples[0]), device=loss.device)
            mean = self.trainer.strategy.reduce(own, reduce_op="mean")
            loss = loss * (self._samples[0] / mean)
        super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Observe a validation batch."""
        self.shared_step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Observe a test batch."""
        self.shared_step(batch, self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self.log_dict(self.val_metrics.compute(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self.log_dict(self.test_metrics.compute(), sync_dist=True)

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
            outputs = attempt(lambda: self(inputs), f"{network} cannot take samples of shape {tuple(inputs.shape[1:])}")
            self.check_outputs(outputs, few, targets)
            fault = f"{loss} cannot compare outputs {described(outputs)} with targets {described(few)}"
            value = attempt(lambda: self.compute_loss(outputs, few, self.val_metrics), fault)
            both = torch.cat([outputs, outputs]), torch.cat([few, few])
            twice = attempt(lambda: self.compute_loss(*both, self.val_metrics), fault)
        finally:
            self.val_metrics.reset()
            self.train(training)
        if value.ndim:
            raise UsageError(f"{loss} gives {described(value)}: a loss is one number, the mean over the batch")
        if not self.pairwise_loss and not torch.isclose(value, twice, rtol=1e-3, equal_nan=True):
            raise UsageError(f"{loss} gives {value:.4g} for some samples and {twice:.4g} for them twice: it is no mean")

    def check_outputs(self, outputs: Tensor, few: Tensor, targets: Tensor) -> None:
        """Refuse outputs that this task cannot read; a task that knows their shape overrides this.

        Args:
            outputs: `(B, ...)`, of a few samples.
            few: `(B, ...)`, their targets.
            targets: `(N, ...)`, all targets of the split.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the validation metrics of this moment."""
        super().on_save_checkpoint(checkpoint)
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {name: value.item() for name, value in metrics.items() if name.startswith("val/")}

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
