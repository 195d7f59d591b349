"""What all tasks share: a step, the logs of each split, an optimiser with its schedule, and what checkpoints hold.

Shapes: `B` batch; `N` samples of a split; `...` the shape of one sample, output or target.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torchmetrics import Metric

from firstlight.checkpoints.allowed import check_metrics
from firstlight.checkpoints.hyperparameters import keep_hyperparameters
from firstlight.checkpoints.trust import SafeLoading
from firstlight.errors import UsageError, check_range, did_you_mean
from firstlight.losses import weights as loss_weights
from firstlight.losses.expected_outputs import Outputs, Pairs, expected_outputs
from firstlight.metrics.added import AddedMetric, Prepare, check_names
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.optim import weights
from firstlight.schedules import Schedule
from firstlight.tasks.checks import at_least_float32, describe
from firstlight.tasks.gradient_weights import (
    GradientWeights,
    count_scored,
    holds_even_batches,
    makes_new_batches,
)
from firstlight.tasks.notices import Notices
from firstlight.tasks.optimization import Optimization
from firstlight.tasks.train_log import TrainLog

_CHECKED_BATCHES = 8  # The first ones, on which a loss of the user is compared with the mean over two parts.


class Task(SafeLoading, LightningModule):  # type: ignore[misc]  # SafeLoading names the rarer options only
    """A network with its loss, optimiser, schedule and metrics. `docs/write_a_task.md` shows how to write a task.

    Override `forward`, `compute_loss` and `predict_step` to change what a step computes; `metric_inputs` and
    `batch_weight` if metrics and weights must differ too. `check_targets` and `check_outputs` refuse wrong data early.

    A network with an integer `members` returns outputs `(B, members, ...)` while training, and else their mean
    `(B, ...)`, as `firstlight.networks.TabM` does. `train/loss` is then the mean of the members' losses, and the
    training metrics take the mean outputs.

    Logs `train/*` as means since the last log, and `val/*` and `test/*` as means over the split. Weight decay does not
    apply to biases and normalisation layers. The schedule counts optimiser steps.

    Args:
        network: Maps inputs to outputs.
        optimizer: Builds an optimiser of parameters or parameter groups, for example
            `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        schedule: Factor of the learning rate at each optimiser step.
        loss: Maps outputs and targets to the mean loss `()` of the batch, or to a dict of such terms, whose sum is
            minimised. `None` if `compute_loss` is overridden and does not use it.
        metrics: By name, metrics of the `metric_inputs`. To a task with metrics of its own, they are added for `val/*`
            and `test/*`: any metric of torchmetrics that returns one number. `docs/write_a_task.md` says what it gets.
        monitor: Decides which checkpoint is best and when to stop: `val/loss`, or `val/NAME` for a metric or a term of
            the loss. Losses are better when lower; a metric tells whether it is better when lower or higher.
        l1: While training, `l1` times the sum of the absolute `weights` is added to the loss; at least 0. `train/loss`
            is logged without it, so that it compares with `val/loss`.
        mode: Whether the lowest (`min`) or the highest (`max`) `monitor` is best. None: as the metric says, `min` for
            losses. Needed for a metric that does not say it.

    Raises:
        UsageError: When an argument is wrong, or when a checkpoint is loaded without a part that was an object.
    """

    eval_only_metrics: ClassVar[frozenset[str]] = frozenset()
    """Metrics computed on validation and test only."""

    exact_targets: ClassVar[bool] = False
    """True if the step takes targets as they were loaded, float64 for numbers, whatever the trainer's precision."""

    losses: ClassVar[Pairs] = {}
    """The losses of torch and firstlight that the task takes, and what each takes outputs for. Empty: any loss."""

    pairwise_loss: ClassVar[bool] = False
    """True for pairwise losses, for example contrastive: the loss of a batch is not a mean over its samples."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        loss: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        monitor: str = "val/loss",
        l1: float = 0.0,
        mode: Literal["min", "max"] | None = None,
        _own_metrics: Mapping[str, Metric] | None = None,
        _prepare: Prepare | None = None,
    ) -> None:
        super().__init__()
        parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "loss": loss}
        if _prepare or "metrics" in inspect.signature(type(self)).parameters:  # Else a subclass builds them itself.
            parts["metrics"] = metrics
        keep_hyperparameters(self, {"metrics", "_own_metrics", "_prepare"} - parts.keys(), **parts)
        self._check_parts(network, optimizer, schedule, loss)
        check_range(type(self).__name__, "[0, inf)", l1=l1)
        members = getattr(network, "members", None)
        self.members = members if isinstance(members, int) else 0
        if self.members and self.pairwise_loss:
            raise UsageError(
                f"{type(self).__name__} compares samples with each other, but {type(network).__name__} has "
                f"members={members}, which have a loss each: use another network"
            )
        self.network = network
        self.loss: Any = loss
        self.l1 = l1
        self.outputs_are = self.expected_outputs(loss)
        self.averages_over = loss_weights.averages_over(loss)
        if self.averages_over == "elements" and self.is_overridden("compute_loss"):
            self.averages_over = "samples"  # The loss may not compare outputs with targets.
        self.gradient_weights = GradientWeights()
        self.optimization = Optimization(optimizer, schedule)
        metrics = metrics or {}
        check_names(type(self).__name__, _own_metrics or (), metrics)
        on_whole_splits = set(self.eval_only_metrics)
        if _prepare:
            on_whole_splits |= metrics.keys()
            if "_instantiator" in self.hparams:  # The command line saves their names.
                check_metrics(type(self).__name__, metrics)
            added = {name: AddedMetric(name, metric, _prepare) for name, metric in metrics.items()}
            metrics = {**(_own_metrics or {}), **added}
        while_training = {name: metric for name, metric in metrics.items() if name not in on_whole_splits}
        counted = self.counted_ignore_index()
        self.train_metrics = SplitMetrics("train", while_training, counted)
        self.val_metrics = SplitMetrics("val", metrics, counted)
        self.test_metrics = SplitMetrics("test", metrics, counted)
        self.train_log = TrainLog(self.train_metrics)
        self.undefined: Mapping[str, str] = {}  # By name, why metrics of the last validation or test are NaN.
        self.notices = Notices()
        is_own = self.is_overridden("compute_loss") or not self._knows_loss()
        self._unproved = _CHECKED_BATCHES if is_own and not self.pairwise_loss else 0
        self._evaluates_again = False
        self.monitor = monitor
        self.mode = self._mode(metrics, mode)

    # What a step computes

    def forward(self, inputs: Any) -> Any:
        """Return the outputs of the network: a tensor, or whatever `compute_loss` takes."""
        return self.network(inputs)

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the mean loss `()` of a batch, or the terms by name whose sum is minimised. Each term is logged."""
        outputs, targets = at_least_float32(outputs), at_least_float32(targets)
        if self.averages_over == "targets":
            return loss_weights.mean_loss(self.loss, outputs, targets)
        return self.loss(outputs, targets)  # type: ignore[no-any-return]

    def metric_inputs(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the predictions `(B, ...)` and targets `(B, ...)` that the metrics compare.

        With `None`, the metrics get the losses and weights of the batches. Only called if there are metrics.
        """
        return outputs, targets

    def batch_weight(self, targets: Tensor) -> Tensor | int:
        """Return the weight of a batch in every mean over batches: what its loss averages over.

        A loss may have a method `batch_weight(targets)` that returns it. A cross-entropy or likelihood averages over
        its scored targets, or the sum of their class weights; other losses over numbers or samples. A batch of weight 0
        counts for nothing.
        """
        if self.averages_over == "samples":
            return targets.shape[0]
        if self.averages_over == "elements":
            return targets.numel()
        if self.averages_over == "targets":
            return loss_weights.batch_weight(self.loss, targets)
        return self.loss.batch_weight(targets)  # type: ignore[no-any-return]

    def weight_of_batch(self) -> Tensor | int:
        """Return the weight of the current training batch: that of `shared_step`, or what the batch holds."""
        weight, results = self.train_metrics.last_weight, self.trainer._results
        return count_scored(getattr(results, "batch", None), self.averages_over) if weight is None else weight

    def counted_ignore_index(self) -> int | None:
        """Return a target that does not count, if metrics may count the others instead of asking `batch_weight`."""
        return None

    def shared_step(self, batch: tuple[Any, Tensor], split_metrics: SplitMetrics) -> Tensor:
        """Return the loss of a batch `(inputs, targets)`, and add the batch to the metrics of its split."""
        inputs, targets = batch
        outputs = self(inputs)
        if not isinstance(outputs, Tensor):
            self.check_structure(outputs)
        predictions, counted = outputs, targets
        if self.members and self.network.training and isinstance(outputs, Tensor):
            predictions, outputs, targets = self._split_members(outputs, targets)
        loss: Any = self.compute_loss(outputs, targets)
        terms = None
        if not isinstance(loss, Tensor):
            loss, terms = sum(loss.values()), loss
        seen = self.metric_inputs(predictions, counted) if split_metrics.names else None
        split_metrics.update(loss, self.batch_weight(counted), seen, terms)
        if self._unproved:
            self._unproved -= 1
            self.notices.tell_other_weight(self, outputs, targets)
        return loss  # type: ignore[no-any-return]

    def _split_members(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean outputs `(B, ...)` of the members, their outputs `(B * members, ...)`, and targets for them.

        The mean loss over these is the mean of the members' losses.
        """
        expected = (len(targets), self.members)
        if outputs.shape[:2] != expected:
            raise UsageError(
                f"{type(self.network).__name__} has members={self.members}, so while training it must return "
                f"({expected[0]}, {expected[1]}, ...), not {describe(outputs)}; a network without members needs "
                "another name for this attribute"
            )
        return outputs.mean(1), outputs.flatten(0, 1), targets.repeat_interleave(self.members, 0)

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch, with the L1 penalty."""
        loss = self.shared_step(batch, self.train_metrics)
        if self._evaluates_again:
            self.train_metrics.is_open = False
        if self.l1:
            loss = loss + self.l1 * sum(weight.abs().sum() for weight in weights(self))
        return loss

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a validation batch to `val/*`."""
        self.shared_step(batch, self.val_metrics)

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a test batch to `test/*`."""
        self.shared_step(batch, self.test_metrics)

    def predict_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the columns of `predictions.csv`, each `(B, ...)`: here `prediction` and `target`."""
        inputs, targets = batch
        return {"prediction": self.predict_outputs(inputs), "target": targets}

    def export_step(self, inputs: Any) -> dict[str, Tensor]:
        """Return the outputs of an exported model by name, each `(B, ...)`: what `predict_step` does without targets.

        A task whose `predict_step` needs targets must override it.
        """
        found = self.predict_step((inputs, inputs.new_zeros(inputs.shape[0], 0)), 0)  # `len` would fix the size
        return {name: column for name, column in found.items() if name != "target"}

    def predict_outputs(self, inputs: Any) -> Tensor:
        """Return the outputs of the network, or raise a UsageError if they are not a tensor."""
        outputs = self(inputs)
        if not isinstance(outputs, Tensor):
            raise UsageError(
                f"{self._told(outputs)}, but {type(self).__name__}.predict_step expects a tensor: override predict_step"
            )
        return outputs

    def _told(self, outputs: Any) -> str:
        """Return what `forward` returned, for messages."""
        source = f"{type(self).__name__}.forward" if self.is_overridden("forward") else type(self.network).__name__
        return f"{source} returned {describe(outputs)}"

    # Hooks of Lightning

    def setup(self, stage: str) -> None:
        """Keep the targets of batches from being rounded to the trainer's precision, if the task asks for it."""
        if self.exact_targets:
            plugin = self.trainer.precision_plugin
            self.teardown(stage)
            # Lightning 2.6.6 rounds all numbers of a batch before any hook of the module.
            vars(plugin)["convert_input"] = partial(_convert_inputs, plugin.convert_input)

    def teardown(self, stage: str) -> None:
        """Give the trainer its own conversion of batches back."""
        vars(self.trainer.precision_plugin).pop("convert_input", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Task":
        """Move and convert the module; buffers of the loss and of the task itself are never rounded."""
        modules = [self, *(self.loss.modules() if isinstance(getattr(self, "loss", None), nn.Module) else ())]
        before = [(each._buffers, name, old) for each in modules for name, old in each._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for buffers, name, old in before:
            new = buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype and new.device.type != "mps":
                buffers[name] = old.to(new.device, torch.promote_types(old.dtype, new.dtype))
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser, with its schedule, and call `fit_targets`."""
        optimizers = self.optimization.configure(self.trainer, self)
        if not hasattr(self, "lr"):
            self.lr = self.optimization.peak  # Lightning's LearningRateFinder asks for it.
        self.fit_targets()
        return optimizers

    def fit_targets(self) -> None:
        """Compute what the task needs to know of the training targets, before the first batch."""

    def on_train_start(self) -> None:
        """Start or resume the plan of the optimiser and the log."""
        self.gradient_weights.start_step()
        self.train_metrics.last_weight = None
        counts = "own" if self.is_overridden("batch_weight") else self.averages_over
        if counts == "targets" and self.is_overridden("training_step"):
            counts = "own"  # Some processes may have a tensor, and others the samples of their batch.
        self.gradient_weights.is_even = holds_even_batches(self.trainer.train_dataloader, counts)
        self._evaluates_again = any(isinstance(each, LBFGS) for each in self.trainer.optimizers)
        self.train_metrics.is_open = True
        self._start_split(self.train_metrics, self.trainer.train_dataloader)
        self.optimization.start(self.trainer)
        self.train_log.start(self.trainer, self.device)

    def on_train_epoch_start(self) -> None:
        """Plan again if the length of an epoch has changed."""
        self.optimization.start_epoch(self.trainer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate. The gradient of a step is that of the mean over all its batches, of all processes."""
        trainer = self.trainer
        if trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            super().backward(loss, *args, **kwargs)
            return
        loss = self.gradient_weights.scale(trainer, loss, self.weight_of_batch())
        super().backward(loss, *args, **kwargs)
        self.gradient_weights.finish(trainer, self.parameters())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Set all gradients to None. torch's `zero_grad` also records a label for its profiler: 22 Python calls."""
        self.gradient_weights.start_step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log `train/*` every `log_every_n_steps` optimiser steps, and forget the weight of the batch."""
        self.train_metrics.last_weight = None
        if self._evaluates_again:
            self.train_metrics.is_open = True
        if values := self.train_log.compute_if_due(self.trainer):
            self.log_dict(values)

    def on_validation_epoch_start(self) -> None:
        """Prepare `val/*`."""
        self._refuse_several("validation_step", self.trainer.num_val_batches)
        self._start_split(self.val_metrics, self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_split(self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Prepare `test/*`."""
        self._refuse_several("test_step", self.trainer.num_test_batches)
        self._start_split(self.test_metrics, self.trainer.test_dataloaders)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self._log_split(self.test_metrics)

    def _start_split(self, metrics: SplitMetrics, loader: Any) -> None:
        metrics.copies_targets = not makes_new_batches(loader)  # Others write into the memory of the batch before.
        self.notices.tell_repeated_samples(metrics.split, loader, self.trainer.world_size)

    def _refuse_several(self, step: str, loaders: Collection[Any]) -> None:
        if len(loaders) > 1 and not self.is_overridden(step):
            raise UsageError(
                f"the data has {len(loaders)} loaders for {step}, but {type(self).__name__} logs one set of values: "
                f"return one loader, for example of a torch.utils.data.ConcatDataset, or override {step}(self, batch, "
                "batch_idx, dataloader_idx=0)"
            )

    def _log_split(self, metrics: SplitMetrics) -> None:
        self.log_dict(metrics.compute(), sync_dist=True)
        self.undefined = metrics.missing_reasons
        if not self.trainer.sanity_checking:  # It sees two batches only.
            self.notices.tell_undefined(self.undefined)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan of the optimiser, the newest validation metrics, and the batches that are not logged yet."""
        checkpoint["optimization"] = self.optimization.state_dict(self.trainer, self)
        if "optimizer_states" in checkpoint:  # A fit can be resumed from it.
            checkpoint["train_log"] = self.train_log.state_dict(self.trainer)
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {name: value.item() for name, value in metrics.items() if name.startswith("val/")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the plan of the optimiser and the log, if a fit is resumed."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.optimization.load_state_dict(checkpoint["optimization"])
            self.train_log.load_state_dict(checkpoint.get("train_log", {}))

    def start_alone(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to be called without a trainer if the data module of the checkpoint scales or encodes inputs.

        Raw inputs would give outputs that look right and are wrong.
        """
        for name, state in checkpoint.items():
            if isinstance(state, dict) and "digest" in state and state.get("mean") is not None:
                self.register_forward_pre_hook(partial(_refuse_unprepared, name))

    # The plan of the run, for its first lines on the screen

    @property
    def total_steps(self) -> float:
        """The optimiser steps of the whole run, infinite if unknown."""
        return self.optimization.total_steps(self.trainer)

    @property
    def warmup_steps(self) -> int:
        """The optimiser steps below the peak learning rate at the start of the run."""
        return self.optimization.planned_schedule(self.trainer).warmup_steps_in(self.total_steps)

    # What is refused before the first step

    def check_targets(self, targets: Tensor) -> None:
        """Raise a UsageError if the targets `(N, ...)` of a split do not fit this task."""

    def check_outputs(self, outputs: Any, targets: Tensor) -> None:
        """Raise a UsageError if the outputs `(B, ...)` of a few samples do not fit the targets `(N, ...)` of the split.

        The outputs are a tensor, unless `compute_loss` is overridden.
        """

    def check_structure(self, outputs: Any) -> None:
        """Raise a UsageError if outputs that are not a tensor reach a method that takes only tensors."""
        passes_on = type(self).compute_loss is Task.compute_loss and not self._knows_loss()
        takes_tensors = {
            "compute_loss": not self.is_overridden("compute_loss") and not passes_on,
            "metric_inputs": not self.is_overridden("metric_inputs") and bool(self.val_metrics.names),
        }
        for method, is_true in takes_tensors.items():
            if is_true:
                raise UsageError(
                    f"{self._told(outputs)}, but {type(self).__name__}.{method} expects a tensor: return a tensor, or "
                    f"override {method}"
                )

    def check_monitor(self, logged: Collection[str]) -> None:
        """Raise a UsageError if `monitor` is not among the names that are logged."""
        if self.monitor not in logged:
            raise UsageError(
                f"unknown monitor={self.monitor}; {type(self).__name__} logs {', '.join(logged)}"
                + did_you_mean(self.monitor, logged)
            )

    def is_overridden(self, method: str) -> bool:
        """Return whether a subclass overrides a method of its task: the class of firstlight that declares `losses`."""
        task = next(kind for kind in type(self).__mro__ if _is_library(kind) and "losses" in vars(kind))
        return getattr(type(self), method) is not getattr(task, method)

    def expected_outputs(self, loss: Any) -> Outputs | None:
        """Return how the task reads outputs for a loss; None if its class declares no `losses`."""
        if self.losses and not self.is_overridden("compute_loss"):
            return expected_outputs(type(self).__name__, loss, self.losses)
        return next(iter(self.losses.values()), None)

    def _knows_loss(self) -> bool:
        """Return whether the loss is torch's or one that the task names: it takes tensors and returns one mean."""
        return type(self.loss).__module__.startswith("torch.") or type(self.loss) in self.losses

    def _check_parts(self, network: object, optimizer: object, schedule: object, loss: object) -> None:
        """Refuse parts that cannot be called: the command line builds a part only if its annotation says what it is."""
        for name, part, annotation in (
            ("network", network, "nn.Module"),
            ("optimizer", optimizer, "OptimizerCallable (from lightning.pytorch.cli)"),
            ("schedule", schedule, "Schedule (from firstlight.schedules)"),
            ("loss", loss, "nn.Module"),
        ):
            if part is None and name == "loss":
                if not self.is_overridden("compute_loss"):
                    raise UsageError(f"{type(self).__name__} has no loss: give it one, or override compute_loss")
            elif not callable(part):
                raise UsageError(
                    f"{type(self).__name__} was given {name}={part!s:.80}, which cannot be called: annotate the "
                    f"argument of its __init__ as {name}: {annotation}"
                )
            elif getattr(function := getattr(part, "func", part), "__module__", "") == "torch.nn.functional":
                raise UsageError(
                    f"{type(self).__name__} was given the function {getattr(function, '__name__', function)}, which "
                    "does not tell what it expects and averages over: give a module, for example "
                    "torch.nn.CrossEntropyLoss()"
                )

    def _mode(self, metrics: Mapping[str, Metric], mode: Literal["min", "max"] | None) -> Literal["min", "max"]:
        is_better_higher: dict[str, bool | None] = {"val/loss": False}
        is_better_higher |= {f"val/{name}": metric.higher_is_better for name, metric in metrics.items()}
        if self.monitor not in is_better_higher:
            # It may be a term of the loss, whose names are known when the loss is first computed.
            is_own = self.is_overridden("compute_loss") or self.is_overridden("validation_step")
            if self._knows_loss() and not is_own:
                self.check_monitor(is_better_higher)
            return mode or "min"
        is_higher = is_better_higher[self.monitor]
        if is_higher is None and mode is None:
            raise UsageError(
                f"monitor={self.monitor} cannot decide what is best: its metric does not say whether higher or lower "
                "is better; give mode=min or mode=max"
            )
        known: Literal["min", "max"] = "max" if is_higher else "min"
        if None not in (is_higher, mode) and mode != known:
            raise UsageError(
                f"{type(self).__name__} was given mode={mode}, which would keep the worst {self.monitor}: "
                f"leave it out, or use mode={known}"
            )
        return mode or known


def _refuse_unprepared(data: str, task: Task, inputs: object) -> None:
    if task._trainer is None:
        raise UsageError(
            f"this {type(task).__name__} was loaded without the {data} that prepares its inputs: use "
            "firstlight.load(PATH).predict(RAW_INPUTS), or load_from_checkpoint(..., prepared_inputs=True) if you "
            "prepare inputs yourself"
        )


def _convert_inputs(convert: Callable[[Any], Any], batch: Any) -> Any:
    """Return a batch `(inputs, targets)` with converted inputs. A single tensor is the inputs alone."""
    if isinstance(batch, Tensor):
        return convert(batch)
    inputs, targets = batch
    return convert(inputs), targets


def _is_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "firstlight"
