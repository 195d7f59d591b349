"""What `firstlight check` tries on a copy of the task: one batch, some real steps, and a part of a validation."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import GroupNorm, LayerNorm

from firstlight.callbacks.facts.losses import meets_own_targets
from firstlight.callbacks.facts.outputs import mixed_samples, seen_future
from firstlight.checkpoints.io import AtomicCheckpointIO
from firstlight.data.loader import normalises_batches
from firstlight.data.quality.finding import Finding
from firstlight.insight.rules.outputs import COMPARE_OWN, UNPAIRED
from firstlight.insight.rules.setup import FIND_MIXING, HIDE_FUTURE, MIXED, future_text
from firstlight.preflight import draw, judge
from firstlight.preflight.layers import Layer, watched
from firstlight.preflight.measure import (
    Skipped,
    Subject,
    dependence,
    distance_to_targets,
    exact_batch_statistics,
    fitting_rates,
    gradients,
    learning_rates,
    neutral_outputs,
    pull_to_targets,
    root_mean_square,
    size_of_inputs,
)
from firstlight.preflight.rules import (
    long_accumulation,
    refuse_no_validation,
    refuse_single_samples,
    unknown_monitors,
)
from firstlight.tasks import LanguageModel, Task

Check = Callable[[], "str | Sequence[Finding]"]
"""Returns figures, or what is wrong. It raises `Skipped` or a `UsageError` otherwise."""

_WARM = 2
"""First steps, which are slow."""
_TIMED = 10
_AT_LEAST = 20
"""Steps on one batch from which a loss that does not fall is a fault."""
_SECONDS = 0.4
"""Seconds of timed steps from which ten of them are enough."""
_LARGE = 200_000_000
"""Bytes from which no checkpoint is written for its time."""
_VALIDATED = 10
"""Batches of the validation that is timed."""


@dataclass
class Facts:
    """What a dry run has learnt of a run; empty or None where nobody can know it."""

    layers: list[Layer] = field(default_factory=list)
    activations: int = 0
    batch_size: int | None = None
    loss: float | None = None
    neutral: float | None = None
    neutral_meaning: str = ""
    train_batches: float = 0
    val_batches: float = 0
    total_batches: float = math.inf
    total_steps: float = math.inf
    warmup: int | None = None
    validations: float = 0.0
    rates: list[float] = field(default_factory=list)
    step_seconds: float | None = None
    validation_seconds: float = 0.0
    epoch_seconds: float = 0.0
    write_seconds: float = 0.0
    checkpoints: int = 0
    optimizer_bytes: int = 0
    device: str = "cpu"
    has_gradient: bool = True

    @property
    def seconds(self) -> float | None:
        """How long all steps, validations and checkpoints take; None if unknown."""
        if self.step_seconds is None or not math.isfinite(self.total_batches):
            return None
        epochs = self.total_batches / self.train_batches
        seconds = self.total_batches * self.step_seconds + self.validations * self.validation_seconds
        seconds += epochs * self.epoch_seconds
        # An epoch writes each file, but at most once a second, see `LastCheckpoint.min_seconds`.
        return seconds + self.checkpoints * (1 + min(epochs, seconds)) * self.write_seconds


class DryRun(Callback):
    """Check the first batch of a fit, let it make some real steps, and end it.

    All but the time of a step is found with weights, buffers and random states that are restored afterwards.

    Args:
        callbacks: Callbacks of the real run; their monitors are checked.
        record: Called with the name of a check and the function that runs it.
    """

    def __init__(self, callbacks: Sequence[Callback], record: Callable[[str, Check], None]) -> None:
        self.callbacks = callbacks
        self.record = record
        self.facts = Facts()
        self.processes = 1  # Of the fit; the dry run itself has one.
        self._subject: Subject | None = None
        self._adds_up = False
        self._batches = self._epoch = -1
        self._timed = 0
        self._last = self._spent = self._began = 0.0
        self._gaps: list[float] = []
        self._validated: list[float] = []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for each monitor among the metrics that validation logged."""
        if self._subject is not None:
            return  # This validation is timed.

        def monitors() -> str:
            note = unknown_monitors(trainer, self.callbacks)
            names = {str(name) for each in self.callbacks if (name := getattr(each, "monitor", None))}
            return note or ", ".join(sorted(names)) or "none"

        self.record("monitors", monitors)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the number of batches."""
        if isinstance(pl_module, Task):
            refuse_single_samples(trainer, self.processes)  # The other checks train on such a batch.

        def batches() -> "str | Sequence[Finding]":
            refuse_no_validation(trainer, self.callbacks)
            val = sum(trainer.num_val_batches) if trainer.enable_validation else 0
            if note := long_accumulation(trainer):
                return [Finding("long_accumulation", "warning", note, {}, "")]
            return f"{trainer.num_training_batches:,} training, {val:,} validation an epoch"

        self.record("batches", batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, check the batch."""
        if self._subject is not None:
            return
        self._plan(trainer, pl_module)
        self._subject = Subject(trainer, pl_module, batch)
        with isolate_rng():
            _check(self._subject, self.record, self.facts)
            self._subject.reset()
        if not self.facts.has_gradient:
            raise _TunerExitException  # No step can be made.

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Before the second step, check whether the gradient of the first one is still there."""
        if self._batches == 0 and trainer.accumulate_grad_batches == 1 and pl_module.automatic_optimization:
            self._adds_up = any(each.grad is not None and bool(each.grad.any()) for each in pl_module.parameters())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the steps, then a part of a validation, and end the fit."""
        now = _now(pl_module)
        self._batches += 1
        if self._batches >= _WARM:
            if trainer.current_epoch == self._epoch:
                self._spent += now - self._last
                self._timed += 1
            elif self._timed:
                self._gaps.append(max(now - self._last - self._spent / self._timed, 0.0))
        self._epoch, self._last = trainer.current_epoch, now
        is_enough = self._timed >= _TIMED * trainer.accumulate_grad_batches and self._spent > _SECONDS
        if is_enough or self._spent > 5 * _SECONDS:
            self._finish(trainer, pl_module)
            raise _TunerExitException  # Lightning ends the fit, without a validation.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation."""
        self._began = _now(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time a validation, which is part of neither a step nor the pause between two epochs."""
        if not trainer.sanity_checking:
            self._validated.append(_now(pl_module) - self._began)
            self._last += self._validated[-1]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a fit with fewer steps than are timed."""
        self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        facts = self.facts
        facts.step_seconds = self._spent / self._timed if self._timed else None
        facts.optimizer_bytes = sum(
            value.nbytes
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            if isinstance(state, dict)
            for value in state.values()
            if isinstance(value, Tensor)
        )
        if self._adds_up:
            text = "the gradient of a step is still there before the next one, so gradients add up"
            advice = "let optimizer_zero_grad set them to None, or set trainer.accumulate_grad_batches"
            found = [Finding("gradient_not_zeroed", "fault", text, {}, advice)]
            self.record("steps", lambda: found)
        elif self._timed:
            self.record("steps", lambda: f"{self._batches + 1} steps, {1000 * self._spent / self._timed:.3g} ms each")
        if facts.val_batches and self._subject is not None:
            self._subject.reset()  # Weights that are not finite make metrics undefined.
            facts.validation_seconds = (
                statistics.median(self._validated)
                if self._validated
                else _time_validation(trainer, module, facts.val_batches)
            )
        facts.epoch_seconds = statistics.median(self._gaps) if self._gaps else 0.0
        facts.checkpoints = sum(isinstance(each, Checkpoint) for each in self.callbacks)
        size = sum(each.nbytes for each in module.parameters()) + facts.optimizer_bytes
        # Another CheckpointIO may write in the background, or elsewhere.
        if facts.checkpoints and size < _LARGE and type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO:
            begun = _now(module)
            checkpoint = deepcopy(trainer._checkpoint_connector.dump_checkpoint())
            # A new best is kept in memory, and written once a second.
            facts.epoch_seconds += _now(module) - begun if facts.validations else 0.0
            begun = _now(module)
            trainer.strategy.save_checkpoint(checkpoint, Path(trainer.default_root_dir) / "dry_run.ckpt")
            facts.write_seconds = _now(module) - begun

    def _plan(self, trainer: Trainer, module: LightningModule) -> None:
        facts = self.facts
        batches: float = trainer.num_training_batches
        facts.train_batches = batches
        facts.val_batches = sum(trainer.num_val_batches) if trainer.enable_validation else 0
        facts.device = module.device.type
        planned = module.total_steps if isinstance(module, Task) else trainer.estimated_stepping_batches
        is_timed = isinstance(module, Task) and module.optimization.is_timed
        facts.total_steps = math.inf if planned < 0 or is_timed else planned
        if isinstance(module, Task):
            facts.warmup = module.warmup_steps if math.isfinite(facts.total_steps) else None
        if math.isfinite(facts.total_steps) and math.isfinite(batches):
            window = trainer.accumulate_grad_batches
            per_epoch = math.ceil(batches / window)
            epochs, rest = divmod(facts.total_steps, per_epoch)
            facts.total_batches = epochs * batches + rest * window
            every = min(float(trainer.val_check_batch or math.inf), batches) * (trainer.check_val_every_n_epoch or 1)
            facts.validations = facts.total_batches // every if every and facts.val_batches else 0
        facts.rates = learning_rates(trainer, facts.total_steps, draw.WIDTH)


def _now(module: LightningModule) -> float:
    if module.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _time_validation(trainer: Trainer, module: LightningModule, batches: float) -> float:
    """Return the seconds of a validation of so many batches, from one batch and from ten."""

    def timed(steps: int) -> float:
        trainer.num_sanity_val_steps = steps
        begun = _now(module)
        trainer._run_sanity_check()
        return _now(module) - begun

    one = timed(1)
    many = int(min(batches, _VALIDATED, max(2, _SECONDS / one)))
    seconds = timed(many)
    return seconds if many == 1 else seconds + max(seconds - one, 0.0) / (many - 1) * (batches - many)


def _check(subject: Subject, record: Callable[[str, Check], None], facts: Facts) -> None:
    """Check one batch. `inputs` and `modes` use the weights that `overfit` leaves."""
    record("scale", lambda: _scale(subject))
    record("loss", lambda: _initial_loss(subject, facts))
    record("gradients", lambda: _gradients(subject, facts))
    record("mixing", lambda: _mixing(subject))
    before = _dependence(subject)
    record("overfit", lambda: _overfit(subject, facts))
    record("inputs", lambda: _inputs(subject, before))
    record("modes", lambda: _modes(subject, facts))


def _scale(subject: Subject) -> str | list[Finding]:
    inputs = subject.inputs
    if inputs is None or not inputs.is_floating_point():
        raise Skipped("the inputs are not one tensor of numbers")
    size, largest = size_of_inputs(inputs)
    weighted = (each for each in subject.module.modules() if [*each.parameters(recurse=False)])
    first = next(weighted, None)
    normalises = isinstance(first, LayerNorm | GroupNorm) or normalises_batches(first)
    return judge.judge_inputs(size, largest, normalises) or f"root mean square {size:.3g}, at most {largest:.4g}"


def _initial_loss(subject: Subject, facts: Facts) -> str | list[Finding]:
    task, inputs, targets = subject.task, subject.inputs, subject.targets
    facts.batch_size = len(inputs) if inputs is not None else None
    with torch.no_grad():
        facts.loss = float(subject.loss())
    size, found = math.nan, []
    if task is not None and inputs is not None and targets is not None:
        with subject.evaluating():
            outputs = subject.outputs(inputs)
        size = root_mean_square(outputs)
        if neutral := neutral_outputs(_kind(task), outputs, targets):
            with torch.no_grad():
                known: Any = task.compute_loss(neutral[0], targets)
            facts.neutral = float(known if isinstance(known, Tensor) else sum(known.values()))
            facts.neutral_meaning = neutral[1]
            with torch.enable_grad():
                found += judge.judge_direction(pull_to_targets(task, neutral[0], targets), type(task.loss).__name__)
        if not found and not task.members and meets_own_targets(task, outputs, targets) is False:
            found = [Finding("wrong_loss", "fault", UNPAIRED, {}, COMPARE_OWN)]
    if not found:
        found = judge.judge_initial_loss(facts.loss, facts.neutral, facts.neutral_meaning, size)
    known = f", and {facts.neutral:.4g} for {facts.neutral_meaning}" if facts.neutral is not None else ""
    return found or f"the first loss is {facts.loss:.4g}{known}"


def _kind(task: Task) -> str | None:
    """Return how the loss of a task reads outputs; None if nobody can know it."""
    return None if task.is_overridden("compute_loss") else task.outputs_are


def _gradients(subject: Subject, facts: Facts) -> str | list[Finding]:
    module = subject.module
    with torch.enable_grad(), watched(module) as seen:
        loss = subject.loss()
    facts.layers, facts.activations, facts.has_gradient = seen.layers, seen.kept_bytes, loss.requires_grad
    without, sizes, zero = gradients(module, loss)
    trainable = [name for name, each in module.named_parameters() if each.requires_grad]
    frozen = [name for name, each in module.named_parameters() if not each.requires_grad]
    detached = [name for name in without if seen.owner_was_called(name)]
    unused = [name for name in without if name not in detached]
    found = judge.judge_gradients(unused, detached, frozen, len(trainable), sizes)
    dead = {each.name: each.dead for each in seen.layers if each.dead is not None}
    saturated = {each.name: each.saturated for each in seen.layers if each.saturated is not None}
    found += judge.judge_units(dead, saturated)
    return found or f"all {len(trainable)} parameters" + (
        f"; the gradient is 0 on this batch for {', '.join(zero)}" if zero else ""
    )


def _mixing(subject: Subject) -> str | list[Finding]:
    inputs = subject.known_inputs()[:8]
    replacing = f"replacing one of {len(inputs)} samples"
    network = getattr(subject.module, "network", subject.module)
    modes = ["evaluation"] if normalises_batches(subject.module) else ["training", "evaluation"]
    for mode in modes:
        try:
            with subject.evaluating() if mode == "evaluation" else nullcontext():
                draws = not torch.equal(subject.outputs(inputs), subject.outputs(inputs, seed=1))
                shares = mixed_samples(subject.outputs, inputs, reorders=not draws)
        except ValueError as error:
            raise Skipped(str(error)) from error
        share = max(shares)
        if not share <= 1e-4:  # "not", so that NaN fails.
            is_order = shares[0] <= 1e-4
            text = (
                "another order of the samples changes their outputs"
                if is_order
                else f"{replacing} changes the outputs "
            )
            text += f"{'' if is_order else 'of the others'} by {share:.1%} of the largest output in {mode} mode: "
            text += f"{type(network).__name__} mixes the samples of a batch"
            return [Finding("mixes_samples", "fault", text, {"share": share}, FIND_MIXING)]
    if isinstance(subject.module, LanguageModel):
        with subject.evaluating():
            share = seen_future(subject.outputs, inputs) or 0.0
        if share > MIXED:
            return [Finding("sees_future", "fault", future_text(share), {"share": share}, HIDE_FUTURE)]
    by_design = "; in training mode batch normalisation mixes them by design" if len(modes) == 1 else ""
    return f"{replacing} does not change the outputs of the others{by_design}"


def _dependence(subject: Subject) -> tuple[float | None, float | None]:
    try:
        inputs = subject.known_inputs()[:64]
        with subject.evaluating():
            return dependence(subject.outputs, inputs)
    except Skipped:
        return None, None


def _overfit(subject: Subject, facts: Facts) -> str | list[Finding]:
    optimizer = subject.optimizer
    group = optimizer.param_groups[0]
    rate = float(group.get("initial_lr", group["lr"]))
    subject.reset()
    is_known = subject.task is not None and _kind(subject.task) is not None  # `loss` has compared them.
    before = None if is_known else _distance(subject)
    losses = subject.steps(None, steps=300, seconds=1.5)
    if len(losses) < _AT_LEAST and judge.judge_overfit(losses, rate, {}) and math.isfinite(losses[-1]):
        losses += subject.steps(None, steps=_AT_LEAST - len(losses), seconds=20)  # Few steps prove no fault.
    if not judge.judge_overfit(losses, rate, {}):
        away = before is not None and judge.judge_predictions(before, _distance(subject) or 0.0)
        if away:
            return away
        return f"loss {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses) - 1} steps on one batch"
    others: dict[float, list[float]] = {}
    for other in fitting_rates(rate) if rate and math.isfinite(losses[0]) else ():
        subject.reset()
        others[other] = subject.steps(other, steps=60, seconds=0.5)
        if sum(judge.fall(each) >= judge.CLEARLY for each in others.values()) > 1:
            break
    subject.reset()
    return judge.judge_overfit(losses, rate, others, facts.neutral)


def _distance(subject: Subject) -> float | None:
    try:
        inputs = subject.known_inputs()
        assert subject.targets is not None
        with subject.evaluating():
            return distance_to_targets(subject.outputs(inputs), subject.targets)
    except Skipped:
        return None


def _inputs(subject: Subject, before: tuple[float | None, float | None]) -> str | list[Finding]:
    subject.known_inputs()
    after = _dependence(subject)
    if all(each is None for each in before):
        raise Skipped("the batch has no two different samples")
    # A last layer of zeros hides the inputs before the first step, and weights that are not finite after it.
    found = judge.judge_dependence(*before) and judge.judge_dependence(*after)
    return found or "outputs change with the inputs"


def _modes(subject: Subject, facts: Facts) -> str | list[Finding]:
    inputs = subject.known_inputs()
    with subject.evaluating(), torch.no_grad(), subject.trainer.precision_plugin.forward_context():
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(subject.module(inputs))
        is_random = isinstance(outputs[0], Tensor) and not torch.equal(*outputs)
    # Few steps do not bring the running statistics near those of the batch.
    with torch.no_grad(), exact_batch_statistics(subject.module):
        train = float(subject.loss())
        with subject.evaluating():
            evaluated = float(subject.loss())
    found = judge.judge_modes(train, evaluated, facts.neutral, is_random)
    return found or f"loss {train:.4g} in training, {evaluated:.4g} in evaluation mode after these steps"
