"""Measure a module on one batch: gradients, what outputs depend on, and whether the batch can be overfitted.

Shapes: `B` is the batch size, `...` the shape of one sample or output.
"""

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from firstlight.callbacks.gradient_norm import dense
from firstlight.tasks import Task

_AT_LEAST = 20
"""Steps on one batch that are made even if they are slow."""
_SIMULATED = 50_000
"""Steps of a scheduler that is not a pure function of the step, which has to be called for each."""


class Skipped(Exception):
    """A check does not apply; the message gives the reason."""


class Subject:
    """A module of a trainer and one batch, and how they give outputs and a loss.

    Args:
        trainer: It is about to train on the batch.
        module: A task, or any LightningModule.
        batch: On the device, as the training step gets it.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        self.trainer, self.module, self.batch = trainer, module, batch
        self.task = module if isinstance(module, Task) else None
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        self.inputs: Tensor | None = batch[0] if is_pair else None
        self.targets: Tensor | None = batch[1] if is_pair else None
        self._kept = {name: value.detach().clone() for name, value in _values(module)}
        self._states = [deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]

    def loss(self) -> Tensor:
        """Return the loss of the batch, of a task without `l1`, which would give even unused weights a gradient."""
        if self.task is not None:
            with self.trainer.precision_plugin.forward_context():
                of_task = self.task.shared_step(self.batch, self.task.train_metrics)
            self.task.train_metrics.reset()
            return of_task
        if not self.module.automatic_optimization:
            raise Skipped(f"{type(self.module).__name__} optimises by hand")
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise Skipped("training_step takes batches from the loader itself")
        arguments = self.trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), self.batch, 0)
        found = call._call_strategy_hook(self.trainer, "training_step", *arguments.values())
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor):
            raise Skipped("training_step returned no loss for the first batch")
        return loss

    def outputs(self, inputs: Tensor, seed: int = 0) -> Tensor:
        """Return the outputs for inputs `(B, ...)` in the present mode, drawn with the same seed at each call."""
        torch.manual_seed(seed)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            outputs = self.module(inputs)
        if not isinstance(outputs, Tensor):
            raise Skipped("the network returns no tensor")
        return outputs

    def known_inputs(self) -> Tensor:
        """Return the inputs of the batch, or skip a check that needs to know how they become outputs."""
        if self.inputs is None:
            raise Skipped("the batch is not a pair of tensors, inputs and targets")
        if not is_overridden("forward", self.module):
            raise Skipped(f"{type(self.module).__name__} has no forward")
        if self.task is None:
            try:
                self.outputs(self.inputs[:1])
            except Skipped:
                raise
            except Exception as error:  # The forward of another module may take anything.
                raise Skipped(f"forward does not take the inputs of the batch ({type(error).__name__})") from error
        return self.inputs

    @property
    def optimizer(self) -> Optimizer:
        """The only optimiser, or skip a check that needs to know how the module trains."""
        if len(self.trainer.optimizers) != 1 or not self.module.automatic_optimization:
            raise Skipped(f"{type(self.module).__name__} optimises by hand, or with several optimisers")
        return self.trainer.optimizers[0]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set all modules to evaluation mode in this context."""
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def reset(self) -> None:
        """Restore weights, buffers and the optimiser's state, and delete gradients."""
        with torch.no_grad():
            for name, value in _values(self.module):
                if name in self._kept:
                    value.copy_(self._kept[name])
        for optimizer, state in zip(self.trainer.optimizers, self._states, strict=True):
            optimizer.load_state_dict(deepcopy(state))
        for parameter in self.module.parameters():
            parameter.grad = None

    def steps(self, rate: float | None, steps: int, seconds: float) -> list[float]:
        """Return the losses of steps on the batch at a learning rate; `None` is the peak of each group."""
        optimizer = self.optimizer
        peak = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
            if rate is not None and peak:
                group["lr"] = group["lr"] * rate / peak

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                clip = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
                self.module.configure_gradient_clipping(optimizer, *clip)
            return loss.detach()

        with torch.enable_grad():
            return overfit(lambda: float(optimizer.step(closure)), steps, seconds)  # type: ignore[arg-type]


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, without those of lazy layers that have no shape yet."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not is_lazy(value):
            yield name, value


def gradients(module: nn.Module, loss: Tensor) -> tuple[list[str], dict[str, float], list[str]]:
    """Return what the trainable parameters get from a loss.

    Returns:
        The names of those without a gradient; the largest absolute gradient of each weight, without those that are 0;
        and the names of all parameters whose gradient is 0. That can be intended: a layer initialised to 0 passes no
        gradient in the first step.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not named or not loss.requires_grad:
        return list(named), {}, []
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    by_name = dict(zip(named, found, strict=True))
    largest = {
        name: float(dense(gradient).abs().max())
        for name, gradient in by_name.items()
        if gradient is not None and gradient.numel()
    }
    unused = [name for name, gradient in by_name.items() if gradient is None]
    weights = {name: size for name, size in largest.items() if size and named[name].ndim > 1}
    return unused, weights, [name for name, size in largest.items() if not size]


def dependence(network: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[float | None, float | None]:
    """Return how much the outputs change with zeroed and with shuffled inputs `(B, ...)`, relative to the largest one.

    `None` if it cannot be told: tokens of 0 are padding, and samples may be equal.
    """
    before = network(inputs)
    scale = before.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    zeroed = shuffled = None
    if inputs.is_floating_point() and inputs.any():
        zeroed = float((network(torch.zeros_like(inputs)) - before).abs().max() / scale)
    if len(before) == len(inputs) and not torch.equal(inputs, inputs.roll(1, 0)):
        shuffled = float((before.roll(1, 0) - before).abs().max() / scale)
    return zeroed, shuffled


def neutral_outputs(kind: str | None, outputs: Tensor, targets: Tensor) -> tuple[Tensor, str] | None:
    """Return outputs `(B, ...)` that say nothing of a sample, and their meaning; None if unknown for this kind."""
    if kind in ("logits", "scores"):
        many = f"{outputs.shape[-1]:,} equal {kind}" if outputs.shape[-1] > 1 else f"a {kind.rstrip('s')} of 0"
        return torch.zeros_like(outputs), many
    if kind == "log_probabilities":
        return torch.full_like(outputs, -math.log(outputs.shape[-1])), f"{outputs.shape[-1]:,} equal probabilities"
    if kind == "probabilities":
        return torch.full_like(outputs, 0.5), "probabilities of 0.5"
    if kind == "standardised":
        return torch.zeros_like(outputs), "the mean of the targets"
    if kind in ("rates", "log_rates"):
        mean = targets.to(outputs.dtype).mean(0, keepdim=True).clamp_min(1e-6).expand_as(outputs)
        return (mean.log() if kind == "log_rates" else mean), "the mean of the targets"
    return None


def pull_to_targets(task: Task, neutral: Tensor, targets: Tensor) -> float:
    """Return the cosine of the angle between a step against the gradient and the way to the targets.

    It is 0 if the loss does not change with the outputs, and NaN if the way is unknown, or no target of the batch
    counts.

    Args:
        task: Its loss.
        neutral: `(B, ...)`, outputs that say nothing of a sample, from which both ways start.
        targets: `(B, ...)`.
    """
    way = _way_to_targets(task, neutral, targets)
    if way is None or not way.any() or not float(task.batch_weight(targets)):
        return math.nan
    leaf = neutral.detach().clone().requires_grad_()
    loss: Any = task.compute_loss(leaf, targets)
    total = loss if isinstance(loss, Tensor) else sum(loss.values())
    gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None or not gradient.any():
        return 0.0
    return -float(nn.functional.cosine_similarity(gradient.double().flatten(), way.flatten(), dim=0))


def _way_to_targets(task: Task, neutral: Tensor, targets: Tensor) -> Tensor | None:
    """Return the difference between right and neutral outputs `(B, ...)`, float64; None if it is unknown."""
    numbers = targets.double()
    if task.outputs_are == "standardised":
        known = hasattr(task, "target_mean") and targets.shape == neutral.shape
        return (numbers - task.target_mean) / task.target_std if known else None  # type: ignore[operator]
    if targets.is_floating_point():
        middle = 0.5 if task.outputs_are in ("logits", "probabilities") else numbers.mean(0, keepdim=True)
        return numbers - middle if targets.shape == neutral.shape else None
    if targets.shape != neutral.shape[:-1]:
        return None
    is_scored = (targets >= 0) & (targets < neutral.shape[-1])
    one_hot = nn.functional.one_hot(targets.where(is_scored, 0), neutral.shape[-1]).double()
    return one_hot * is_scored[..., None]


def overfit(step: Callable[[], float], steps: int, seconds: float) -> list[float]:
    """Return the losses of up to `steps` steps on one batch.

    It ends early when the loss is at most 1 % of the first one, not finite, or `seconds` have passed. Slow steps get
    twice as long, until there are 20.
    """
    losses = [step()]
    begun = time.monotonic()
    for _ in range(steps - 1):
        if not math.isfinite(losses[-1]) or abs(losses[-1]) <= 0.01 * abs(losses[0]):
            break
        if time.monotonic() > begun + seconds * (1 if len(losses) > _AT_LEAST else 2):
            break
        losses.append(step())
    return losses


def learning_rates(trainer: Trainer, total: float, points: int) -> list[float]:
    """Return the learning rate of the first group at `points` steps from 0 to `total`; empty if nobody can know it."""
    if not trainer.optimizers or not math.isfinite(total):
        return []
    if len(trainer.lr_scheduler_configs) != 1:
        constant = len(trainer.lr_scheduler_configs) == 0 and len(trainer.optimizers) == 1
        return [float(trainer.optimizers[0].param_groups[0]["lr"])] * points if constant else []
    config = trainer.lr_scheduler_configs[0]
    scheduler: Any = config.scheduler
    batches = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    every = config.frequency * (1 if config.interval == "step" else batches)
    calls = [int(total * index / (points - 1)) // every for index in range(points)]
    if isinstance(scheduler, LambdaLR):
        with suppress(Exception):
            return [float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](index)) for index in calls]
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau) or calls[-1] > _SIMULATED:
        return []
    groups = [{**group, "params": []} for group in scheduler.optimizer.param_groups]
    copied = deepcopy(scheduler, {id(scheduler.optimizer): SimpleNamespace(param_groups=groups, step=None)})
    rates = [float(groups[0]["lr"])]
    with warnings.catch_warnings(), suppress(Exception):  # It may end before, or need an optimiser.
        warnings.simplefilter("ignore")
        for _ in range(calls[-1]):
            copied.step()
            rates.append(float(groups[0]["lr"]))
    return [rates[index] for index in calls] if len(rates) > calls[-1] else []


@contextmanager
def exact_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let the next pass in training mode set the statistics of batch normalisation to exactly those of its batch."""
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    kept = [each.momentum for each in layers]
    for each in layers:
        each.reset_running_stats()
        each.momentum = None
    try:
        yield
    finally:
        for each, momentum in zip(layers, kept, strict=True):
            each.momentum = momentum


def root_mean_square(values: Tensor) -> float:
    """Return the root mean square of values."""
    return float(values.detach().double().square().mean().sqrt()) if values.numel() else 0.0


def size_of_inputs(inputs: Tensor) -> tuple[float, float]:
    """Return the largest root mean square of a column of `(B, F)`, or that of all inputs, and the largest value."""
    values = inputs.double()
    per_column = values.square().mean(0).sqrt() if inputs.ndim == 2 else values.square().mean().sqrt()
    return float(per_column.max()), float(values.abs().max())


def fitting_rates(rate: float) -> list[float]:
    """Return the rates that are tried in place of one, the nearest first: 10 and 100 times it, and usual ones.

    >>> [f"{each:.0e}" for each in fitting_rates(3)]
    ['3e-01', '3e+01', '1e-01', '3e-02', '3e+02', '1e-02', '1e-03', '1e-04']
    """
    found = [rate * factor for factor in (0.1, 10, 0.01, 100)] + [0.1, 0.01, 0.001, 0.0001]
    apart = [each for each in found if not 0.5 < each / rate < 2]
    return sorted(dict.fromkeys(apart), key=lambda each: abs(math.log(each / rate)))


def distance_to_targets(outputs: Tensor, targets: Tensor) -> float | None:
    """Return how far outputs are from targets; None if they do not compare.

    For numbers of one shape, it is the root of their mean square difference. For class indices `(B,)` and an output for
    each class of the batch `(B, C)`, it is the cross-entropy.
    """
    if targets.shape == outputs.shape and targets.is_floating_point():
        return root_mean_square(outputs.double() - targets)
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.dtype != torch.int64:
        return None
    if outputs.shape[1] < 2 or targets.min() < 0 or targets.max() + 1 != outputs.shape[1]:  # They may be embeddings.
        return None
    return float(nn.functional.cross_entropy(outputs.double(), targets))
