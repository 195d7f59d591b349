"""What `firstlight check` tries on a copy of the task: one batch, its gradients, and whether it can be overfitted.

Shapes: `B` is the batch size, `...` the shape of one sample or output.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from firstlight.data.loader import normalises_batches
from firstlight.errors import UsageError
from firstlight.preflight.rules import (
    long_accumulation,
    refuse_no_validation,
    refuse_single_samples,
    refuse_unknown_monitors,
)
from firstlight.tasks import Task


class Skipped(Exception):
    """A check does not apply; the message gives the reason."""


def parameters_without_gradient(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the trainable parameters that get no gradient from a loss, and of those whose gradient is 0.

    A gradient of 0 can be intended: a layer initialised to 0 passes no gradient in the first step.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    value = loss()
    if not named or not value.requires_grad:
        return list(named), []
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    by_name = dict(zip(named, found, strict=True))
    unused = [name for name, gradient in by_name.items() if gradient is None]
    return unused, [name for name, gradient in by_name.items() if gradient is not None and not gradient.any()]


def leak_between_samples(network: nn.Module, inputs: Tensor) -> float:
    """Return how much the outputs of the other samples change when the first sample of `inputs` `(B, ...)` is replaced.

    This is the largest change, divided by the largest output. The network stays in its current mode. Each call uses
    the same seed, so dropout draws the same numbers. Outputs are compared and not losses, because a pairwise loss
    depends on other samples by design.
    """
    other = next((sample for sample in inputs if not torch.equal(sample, inputs[0])), None)
    if other is None:
        raise Skipped("the batch has no two different samples")
    replaced = torch.cat([other[None], inputs[1:]])
    first, again, after = (_seeded(network, given) for given in (inputs, inputs, replaced))
    if not torch.equal(first, again):
        raise Skipped("the network gives different outputs with the same seed")
    if len(first) != len(inputs):
        raise Skipped(f"the network gives {len(first)} outputs for {len(inputs)} samples")
    scale = first[1:].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((after[1:] - first[1:]).abs().max() / scale)


def overfit(step: Callable[[], float], steps: int, seconds: float) -> list[float]:
    """Return the losses of up to `steps` steps on one batch.

    It ends early when the loss is at most 1 % of the first one, not finite, or `seconds` have passed.
    """
    losses = [step()]
    deadline = time.monotonic() + seconds
    for _ in range(steps - 1):
        if not math.isfinite(losses[-1]) or abs(losses[-1]) <= 0.01 * abs(losses[0]) or time.monotonic() > deadline:
            break
        losses.append(step())
    return losses


class DryRun(Callback):
    """Check one batch of a fit, and stop the fit before its first training step.

    Args:
        callbacks: Callbacks of the real run; their monitors are checked.
        record: Called with the name of a check and the function that runs it.
    """

    def __init__(self, callbacks: Sequence[Callback], record: Callable[[str, Callable[[], str]], None]) -> None:
        self.callbacks = callbacks
        self.record = record
        self.processes = 1  # Of the fit; the dry run itself has one.

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for each monitor among the metrics that validation logged."""

        def monitors() -> str:
            refuse_unknown_monitors(trainer, self.callbacks)
            names = {str(name) for each in self.callbacks if (name := getattr(each, "monitor", None))}
            return ", ".join(sorted(names)) or "none"

        self.record("monitors", monitors)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check batches and, if the module is a task, gradients, leaks between samples and overfitting.

        Then stop the fit.
        """
        if isinstance(pl_module, Task):
            refuse_single_samples(trainer, self.processes)  # The other checks train on such a batch.

        def batches() -> str:
            refuse_no_validation(trainer, self.callbacks)
            val = sum(trainer.num_val_batches) if trainer.enable_validation else 0
            found = f"{trainer.num_training_batches:,} training, {val:,} validation an epoch"
            note = long_accumulation(trainer)
            return f"{found}; {note}" if note else found

        self.record("batches", batches)
        trainer.should_stop = True
        if not isinstance(pl_module, Task):
            for name in ("gradients", "leak", "overfit"):
                self.record(name, lambda: _skip(f"{type(pl_module).__name__} is not a firstlight task"))
            return
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            assert trainer.train_dataloader is not None
            batch = trainer.strategy.batch_to_device(next(iter(trainer.train_dataloader)))
            self.record("gradients", lambda: _gradients(trainer, pl_module, batch))
            self.record("leak", lambda: _leak(trainer, pl_module, batch))
            self.record("overfit", lambda: _overfit(trainer, pl_module, batch))


def _skip(reason: str) -> str:
    raise Skipped(reason)


def _overfit(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
    optimizer = trainer.optimizers[0]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # The peak of the schedule.

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(trainer, task, batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            task.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        return loss.detach()

    losses = overfit(lambda: float(optimizer.step(closure)), steps=1000, seconds=6)  # type: ignore[arg-type]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # Otherwise the task would report that a callback has set the peak.
    reached = sum(losses[-3:]) / len(losses[-3:])  # Dropout makes a single loss noisy.
    figures = f"loss {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses) - 1} steps on one batch"
    if not math.isfinite(losses[-1]):
        raise UsageError(f"{figures}: try a smaller learning rate, or scale the inputs")
    if losses[0] - reached < 0.1 * abs(losses[0]):
        raise UsageError(f"{figures}: it falls by less than 10 %, so the task learns nothing or too slowly")
    return figures


def _gradients(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
    unused, zero = parameters_without_gradient(task, lambda: _loss(trainer, task, batch))
    total = sum(parameter.requires_grad for parameter in task.parameters())
    if not total:
        raise UsageError("no parameter is trainable: at least one must have requires_grad=True")
    if unused:
        raise UsageError(f"{len(unused)} of {total} parameters get no gradient, so use or freeze: {', '.join(unused)}")
    return f"all {total} parameters" + (f"; the gradient is 0 on this batch for {', '.join(zero)}" if zero else "")


def _leak(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
    if normalises_batches(task.network):
        raise Skipped("batch normalisation mixes the samples of a batch by design")
    inputs = batch[0][:8]
    with trainer.precision_plugin.forward_context():
        share = leak_between_samples(task.network, inputs)
    replacing = f"replacing one of {len(inputs)} samples"
    if not share <= 1e-4:  # "not", so that NaN fails.
        raise UsageError(
            f"{replacing} changes the outputs of the others by {share:.1%} of the largest output: "
            f"{type(task.network).__name__} mixes the samples of a batch"
        )
    return f"{replacing} does not change the outputs of the others"


def _loss(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a batch without `l1`, which would give even unused weights a gradient."""
    with trainer.precision_plugin.forward_context():
        loss = task.shared_step(batch, task.train_metrics)
    task.train_metrics.reset()
    return loss


def _seeded(network: nn.Module, inputs: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = network(inputs)
    if not isinstance(outputs, Tensor):
        raise Skipped("the network returns no tensor")
    return outputs
