"""What a network does with one training batch, tried on a copy before a run starts.

Shapes: `B` batch; `...` whatever one sample or output is shaped like.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstlight.errors import UsageError
from firstlight.preflight.rules import refuse_no_validation, refuse_unknown_monitors
from firstlight.tasks import Task

__all__ = ["Finding", "Skipped", "TrialRun", "attempted", "neighbours_touched", "overfitted", "without_gradient"]


class Skipped(Exception):
    """A check says nothing here; the message tells why."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        check: Its name.
        state: `"ok"`, `"FAIL"` or `"skipped"`.
        text: The figures, what is wrong, or why it was skipped.
    """

    check: str
    state: str
    text: str

    def __str__(self) -> str:
        """Return a line of the table.

        >>> print(Finding("leak", "ok", "8 samples"))
        leak       ok       8 samples
        """
        return f"{self.check:<10} {self.state:<8} {self.text}"


def attempted(check: str, call: Callable[[], str]) -> Finding:
    """Return what a check found: its text, or that it was skipped or failed with a `UsageError`."""
    try:
        return Finding(check, "ok", call())
    except Skipped as why:
        return Finding(check, "skipped", str(why))
    except UsageError as error:
        return Finding(check, "FAIL", str(error))


def without_gradient(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the trainable parameters that a loss gives no gradient, and of those where all of it is 0.

    A gradient of 0 may be meant: a layer that starts at 0 stops it for one step.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    value = loss()
    if not named or not value.requires_grad:
        return list(named), []
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    by_name = dict(zip(named, found, strict=True))
    unused = [name for name, gradient in by_name.items() if gradient is None]
    return unused, [name for name, gradient in by_name.items() if gradient is not None and not gradient.any()]


def neighbours_touched(network: nn.Module, inputs: Tensor) -> float:
    """Return how much the outputs of a batch change when another sample takes the place of the first one.

    The network is tried as it stands, in training or not; its dropout draws the same numbers each time. What is
    compared are its outputs: a loss over pairs of a batch is meant to look at neighbours.

    Args:
        network: Maps `inputs` to outputs `(B, ...)`.
        inputs: `(B, ...)`.

    Returns:
        The largest change of an output of the other samples, as a share of the largest output.

    Raises:
        Skipped: When it cannot be told: samples that are all the same, or outputs that are never twice the same.
    """
    other = next((sample for sample in inputs if not torch.equal(sample, inputs[0])), None)
    if other is None:
        raise Skipped("a batch without two different samples")
    changed = torch.cat([other[None], inputs[1:]])
    first, again, then = (_seeded(network, given) for given in (inputs, inputs, changed))
    if not torch.equal(first, again):
        raise Skipped("the network never gives the same outputs twice, not even with the same seed")
    if len(first) != len(inputs):
        raise Skipped(f"the network gives {len(first)} outputs for {len(inputs)} samples")
    scale = first[1:].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((then[1:] - first[1:]).abs().max() / scale)


def overfitted(step: Callable[[], float], steps: int, seconds: float) -> list[float]:
    """Return the losses of up to `steps` steps on one batch, until it is learned by heart, not finite or late."""
    losses = [step()]
    until = time.monotonic() + seconds
    for _ in range(steps - 1):
        if not math.isfinite(losses[-1]) or abs(losses[-1]) <= 0.01 * abs(losses[0]) or time.monotonic() > until:
            break
        losses.append(step())
    return losses


class TrialRun(Callback):
    """Checks what `Trainer` makes of a copy of a task and its data, and stops before the first training step.

    Args:
        waiting: Callbacks of the real run, of which the monitors are looked at.
        steps: At most that many steps are made to overfit one batch.
        seconds: After that many the steps end.
    """

    def __init__(self, waiting: Sequence[Callback], steps: int = 1000, seconds: float = 6.0) -> None:
        self.waiting = waiting
        self.steps = steps
        self.seconds = seconds
        self.findings: list[Finding] = []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the monitors among what a validation logs."""

        def monitors() -> str:
            refuse_unknown_monitors(trainer, self.waiting)
            return ", ".join(sorted({str(monitor) for each in self.waiting if (monitor := _monitor(each))})) or "none"

        self.findings.append(attempted("monitors", monitors))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the batches, the gradients, the neighbours and that a batch can be overfitted; then stop."""
        assert isinstance(pl_module, Task)

        def batches() -> str:
            refuse_no_validation(trainer, self.waiting)
            val = sum(trainer.num_val_batches) if trainer.enable_validation else 0
            return f"{trainer.num_training_batches:,} training, {val:,} validation an epoch"

        self.findings.append(attempted("batches", batches))
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            assert trainer.train_dataloader is not None
            batch = trainer.strategy.batch_to_device(next(iter(trainer.train_dataloader)))
            for check, call in (("gradients", _gradients), ("leak", _leak), ("overfit", self._overfit)):
                self.findings.append(attempted(check, lambda call=call: call(trainer, pl_module, batch)))  # type: ignore[misc]
        trainer.should_stop = True

    def _overfit(self, trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
        optimizer = trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]  # No schedule: the peak.

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _loss(trainer, task, batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                task.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            return loss.detach()

        losses = overfitted(lambda: float(optimizer.step(closure)), self.steps, self.seconds)  # type: ignore[arg-type]
        reached = sum(losses[-3:]) / len(losses[-3:])  # Dropout makes a single one noisy.
        told = f"loss {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses) - 1} steps on one batch"
        if not math.isfinite(losses[-1]):
            raise UsageError(f"{told}: a smaller learning rate, or inputs that are scaled")
        if losses[0] - reached < 0.1 * abs(losses[0]):
            raise UsageError(f"{told}: it does not fall by a tenth, so nothing is learned, or too slowly")
        return told


def _gradients(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
    unused, zero = without_gradient(task, lambda: _loss(trainer, task, batch))
    total = sum(parameter.requires_grad for parameter in task.parameters())
    if not total:
        raise UsageError("no parameter is trainable")
    if unused:
        raise UsageError(f"{len(unused)} of {total} parameters get none: {', '.join(unused)}")
    return f"all {total} parameters" + (f", all of it 0 on this batch: {', '.join(zero)}" if zero else "")


def _leak(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> str:
    if any(isinstance(part, _BatchNorm) for part in task.network.modules()):
        raise Skipped("batch normalisation mixes the samples of a batch, and is meant to")
    inputs = batch[0][:8]
    with trainer.precision_plugin.forward_context():
        share = neighbours_touched(task.network, inputs)
    told = f"{len(inputs)} samples, another first one changes the outputs of the rest by {share:.1e} of the largest"
    if not share <= 1e-4:  # not: NaN
        raise UsageError(f"{told}: {type(task.network).__name__} mixes the samples of a batch")
    return told


def _loss(trainer: Trainer, task: Task, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a batch without `l1`, which gives each weight a gradient whether it is used or not."""
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


def _monitor(callback: Callback) -> str | None:
    return getattr(callback, "monitor", None)
