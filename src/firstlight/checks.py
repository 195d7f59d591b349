"""What can be known to be wrong before the first step."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from firstlight.errors import UsageError

__all__ = ["refuse_no_validation", "refuse_options"]


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `Trainer` that train nothing, or start more processes than there are processors.

    Raises:
        UsageError: Naming the option.
    """
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches"):
        if options[name] == 0:
            raise UsageError(f"trainer.{name}=0 trains nothing: it is at least 1")
    if options["accumulate_grad_batches"] < 0:
        raise UsageError(f"trainer.accumulate_grad_batches={options['accumulate_grad_batches']}: it is at least 1")
    devices, processors = str(options["devices"]), max(os.cpu_count() or 1, 2)  # two can always be tried
    on_cpu = options["accelerator"] == "cpu" or not torch.accelerator.is_available()
    if on_cpu and devices.isdigit() and int(devices) > processors:
        # Each is a process with a copy of everything: a slip of the finger could take the machine down.
        raise UsageError(f"trainer.devices={devices}: on the CPU each is a process, and {processors} are the most here")


def refuse_no_validation(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Refuse a fit that never validates, where a callback waits for a validation. Call it when training starts.

    Raises:
        UsageError: Saying why nothing is validated.
    """
    waiting = [each for each in callbacks if isinstance(each, EarlyStopping | ModelCheckpoint) and each.monitor]
    if not any(str(each.monitor).startswith("val/") for each in waiting):
        return
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs or -1
    if not trainer.enable_validation:
        why = "limit_val_batches is 0, or there is no validation data"
    elif every is not None and 0 < epochs < every:
        why = f"check_val_every_n_epoch={every}, but the run has {epochs} epochs"
    else:
        return
    names = ", ".join(type(each).__name__ for each in waiting)
    raise UsageError(f"nothing is ever validated ({why}), and {names} need it: fit --without early_stopping,best")
