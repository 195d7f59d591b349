"""Prevent updates from a loss or a gradient that is not finite."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from firstlight.callbacks.finite import all_finite, by_mesh, not_finite, surely_finite
from firstlight.callbacks.replay import fault_message, first_fault
from firstlight.distributed import all_gather_objects
from firstlight.errors import TrainingError, UsageError, check_saved
from firstlight.loggers import current_step, log, should_log


class _Window:
    """The batches of one optimiser step with their indices, and losses that may not be finite."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, int]] = []
        self.losses: list[Tensor] = []


class _Step:
    """An optimiser step, and a copy of its flag, 1 if the gradient was not finite, on its way from the device."""

    def __init__(self, trainer: Trainer, window: _Window, flag: Tensor) -> None:
        self.step, self.epoch, self.window = current_step(trainer), trainer.current_epoch, window
        self._flag = flag.to("cpu", non_blocking=True, copy=True)
        self._event = torch.Event(flag.device) if flag.device.type != "cpu" else None
        if self._event is not None:
            self._event.record()

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class NonFinite(Callback):
    """Prevent an update from a loss or a gradient that is not finite: stop the run, or skip the step.

    The gradient is the one that the optimiser would use: accumulated, and averaged over the processes, so that all of
    them decide alike. With several processes or a gradient scaler, a loss that is not finite makes the gradient not
    finite.

    On the CPU the step is not made. On another device nothing waits for the flag. An optimiser that takes `found_inf`
    (Adam, AdamW, SGD and Adagrad with `fused=True`) leaves weights and state unchanged, also in all later steps of a
    run that stops. The flag is read when it has arrived, at the latest when something is logged, validated or saved.
    The first step waits. With other optimisers, `skip` waits at each step, and `stop` passes zero gradients until the
    flag is read.

    A gradient scaler skips steps to find its scale. These do not stop the run, unless the loss is not finite or the
    scale is below 1. A skipped step counts for the schedule and in `global_step`; buffers, for example running means,
    are restored. `nonfinite/skipped` is logged from the first one on. Weights or monitored metrics that are not finite
    always stop the run, before a checkpoint holds them.

    Args:
        action: `stop` stops the run and names batch and layer; `skip` continues with the next step.

    Raises:
        TrainingError: When the run stops.
        UsageError: When `action` is unknown.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        if action not in ("stop", "skip"):
            raise UsageError(f"NonFinite was given action={action}: it must be stop or skip")
        self.action = action
        self.skipped = 0
        self._reset()

    def _reset(self) -> None:
        self._window = _Window()
        self._pending: deque[_Step] = deque()
        self._flags: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._begun: set[int] = set()
        self._stepped = True
        self._checked_step = -1
        self._replaying = False
        self._scaler: Any = None
        self._checks_losses = False
        self._buffers: list[Tensor] = []
        self._buffer_copies: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        check_saved("NonFinite", state_dict, skipped=int)
        self.skipped = state_dict["skipped"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the count of an earlier fit; a checkpoint restores that of its own fit afterwards."""
        if stage == "fit":
            self.skipped = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, and copy the buffers if a step may be skipped."""
        self._reset()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        # An infinite loss may have a finite gradient. Several processes need the gradient to decide alike.
        self._checks_losses = trainer.world_size == 1 and self._scaler is None
        # After a skipped step the run continues with the buffers as they were.
        self._buffers = list(pl_module.buffers()) if self.action == "skip" or self._scaler else []
        self._buffer_copies = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its step is known to be finite."""
        if self._stepped:
            self._stepped = False
            self._window = _Window()
            if self._buffer_copies:
                self._buffers = list(pl_module.buffers())
                torch._foreach_copy_(self._buffer_copies, self._buffers)
        self._window.batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep a loss that may not be finite; if the gradient decides, make it not finite either."""
        if self._replaying:
            return
        if loss.ndim == 0 and loss.is_cpu and math.isfinite(loss.item()):
            return
        value = loss.detach().sum()  # `sum` copies.
        self._window.losses.append(value)
        if loss.requires_grad and not (self._checks_losses and pl_module.automatic_optimization):
            loss.register_hook(lambda gradient: gradient + 0 * value)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradient."""
        if self._replaying:
            return
        self._stepped = True
        gradients = [grad for group in optimizer.param_groups for p in group["params"] if (grad := p.grad) is not None]
        if not gradients:
            return
        is_quick = self._checks_losses and gradients[0].is_cpu and _are_large(gradients)
        if is_quick and surely_finite(gradients + self._window.losses):
            self._continue(pl_module, optimizer)
        else:
            self._check(trainer, pl_module, optimizer, [_values(gradient) for gradient in gradients])
        if self.skipped and should_log(trainer):
            log(trainer, {"nonfinite/skipped": self.skipped})

    def _check(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, gradients: list[Tensor]) -> None:
        """Check each number, because a sum was not finite or because the device should not be waited for."""
        found = self._flag(gradients + self._window.losses if self._checks_losses else gradients)
        # torch's fused SGD leaves its momentum uninitialised if the device skips its first step.
        waits = id(optimizer) not in self._begun or (self.action == "skip" and not _skips_on_device(optimizer))
        if found.is_cpu or (waits and not self._scaler):
            if found.item():
                self._decide(trainer, module, _Step(trainer, self._window, found))
                if self._buffers:
                    torch._foreach_copy_(self._buffers, self._buffer_copies)
                if self._scaler is None:
                    optimizer.zero_grad()  # torch's optimisers skip parameters without a gradient.
            else:
                self._continue(module, optimizer)
        else:
            self._block(optimizer, gradients, found)
            self._pending.append(_Step(trainer, self._window, found))
            self._read(trainer, module, wait=should_log(trainer))

    def _continue(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Note that an optimiser makes a step that is known to be finite."""
        self._begun.add(id(optimizer))
        if module.automatic_optimization:
            self._window.batches = []  # Releases its memory for the next batch.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the validation if a step or a weight was not finite."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._read_all(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a monitored metric is not finite; checkpoint callbacks come after this one."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for monitor in [name for each in trainer.checkpoint_callbacks if (name := getattr(each, "monitor", None))]:
            value = trainer.callback_metrics.get(monitor)
            if value is not None and not trainer.strategy.reduce_boolean_decision(all_finite(value), all=True):
                why, advice = "with finite weights", "look at the validation data, or lower the learning rate"
                undefined = getattr(pl_module, "undefined", {})
                if isinstance(undefined, Mapping) and monitor in undefined:
                    why, advice = (
                        f"because {undefined[monitor]}",
                        "monitor another metric or use other data",
                    )
                raise TrainingError(
                    f"{monitor} is {value.item():.4g} after step {current_step(trainer)} (epoch "
                    f"{trainer.current_epoch + 1}), {why}: {advice}\nno checkpoint was written from it"
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop if a step or a weight was not finite, before the file is opened."""
        self._read_all(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the remaining flags."""
        self._read_all(trainer, pl_module)
        if self.skipped:
            log(trainer, {"nonfinite/skipped": self.skipped})
        self.on_exception(trainer, pl_module, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None) -> None:
        """Remove the flags from the optimisers, and release batches and buffers."""
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)
        self._reset()

    def _flag(self, tensors: list[Tensor]) -> Tensor:
        """Return 1 on the device if a number is not finite, else 0; with `stop` it stays 1."""
        device = tensors[0].device
        if device not in self._flags:
            self._flags[device] = torch.zeros((), device=device), torch.ones((), device=device)
        found, one = self._flags[device]
        if self.action == "skip" or self._scaler:
            found.zero_()
        # The gradient scaler's kernel, which also divides by `one`: on the CPU it is much faster than a norm.
        for group in by_mesh(tensors):
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, one)
        return found

    def _block(self, optimizer: Optimizer, gradients: list[Tensor], found: Tensor) -> None:
        """Prevent the update on the device if the flag is set."""
        for buffer, kept in zip(self._buffers, self._buffer_copies, strict=True):
            buffer.copy_(torch.where(found.bool(), kept, buffer))
        if self._scaler:
            return
        if _skips_on_device(optimizer):
            optimizer.found_inf = found  # type: ignore[attr-defined]  # as a gradient scaler does
        else:
            for gradient in gradients:
                gradient.masked_fill_(found.bool(), 0)

    def _read(self, trainer: Trainer, module: LightningModule, wait: bool) -> None:
        """Read the flags that have arrived, or wait for all. Several processes act only on flags that all wait for."""
        while self._pending and (wait or self._pending[0].arrived()):
            if self._pending[0].read():
                if trainer.world_size > 1 and not wait:
                    return
                self._decide(trainer, module, self._pending[0])
            self._pending.popleft()

    def _decide(self, trainer: Trainer, module: LightningModule, step: _Step) -> None:
        """Skip a step whose gradient is not finite, or stop the run."""
        scale = None if self._scaler is None else float(self._scaler.get_scale())
        finite = True if scale is None else trainer.strategy.reduce_boolean_decision(all_finite(step.window.losses))
        if verdict(self.action, scale, finite) == "skip":
            self.skipped += 1
            return
        self._replaying = True
        found = all_gather_objects(trainer, first_fault(trainer, module, step.window.batches))
        raise TrainingError(fault_message(step.step, step.epoch, [index for _, index in step.window.batches], found))

    def _read_all(self, trainer: Trainer, module: LightningModule) -> None:
        """Read every flag, and check the weights once a step."""
        self._read(trainer, module, wait=True)
        if trainer.global_step == self._checked_step:
            return
        if name := not_finite(module):
            raise TrainingError(
                f"{name} is not finite after {trainer.global_step:,} steps, although the gradients are: the last "
                "update was too large; lower the learning rate\nno checkpoint was written from it"
            )
        self._checked_step = trainer.global_step


def verdict(action: Literal["stop", "skip"], scale: float | None, finite_loss: bool) -> Literal["stop", "skip"]:
    """Return what to do with a step whose gradient is not finite: `action`, or `skip` if a scaler overflowed.

    `scale` is that of the gradient scaler, `None` without one. `finite_loss` matters with a scaler only.

    >>> verdict("stop", None, True), verdict("stop", 1024.0, True), verdict("stop", 1024.0, False)
    ('stop', 'skip', 'stop')
    """
    overflowed = scale is not None and finite_loss and scale >= 1
    return "skip" if overflowed else action


def _values(gradient: Tensor) -> Tensor:
    values = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values


def _are_large(gradients: list[Tensor]) -> bool:
    """Return whether a sum of each gradient takes less time than a check of each number, which is one call for all."""
    return sum([gradient.numel() for gradient in gradients]) > 20_000 * len(gradients)


def _skips_on_device(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
