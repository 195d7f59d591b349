"""What can be known to be wrong before the first step."""

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from firstlight.data import DataModule
from firstlight.data.loader import per_process
from firstlight.errors import UsageError, did_you_mean
from firstlight.preflight.probe import probe
from firstlight.tasks import Task

__all__ = [
    "check_data",
    "check_room",
    "check_sizes",
    "checkpoint_bytes",
    "refuse_fewer_samples",
    "refuse_no_batches",
    "refuse_no_room",
    "refuse_no_validation",
    "refuse_options",
    "refuse_unknown_monitors",
]


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `Trainer` that train nothing, mean nothing, or start more processes than there are processors.

    Raises:
        UsageError: Naming the option.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"):
        if options[name] == 0:
            raise UsageError(f"trainer.{name}=0 trains nothing")
    if options["accumulate_grad_batches"] < 0:
        raise UsageError(f"trainer.accumulate_grad_batches={options['accumulate_grad_batches']}: it is at least 1")
    if (options["log_every_n_steps"] or 0) < 0:
        raise UsageError(f"trainer.log_every_n_steps={options['log_every_n_steps']}: it is at least 0, which is never")
    devices, processors = str(options["devices"]), max(os.cpu_count() or 1, 2)  # two can always be tried
    wanted = options["accelerator"]
    on_cpu = wanted == "cpu" or (wanted == "auto" and not torch.accelerator.is_available())
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
    elif not any(trainer.num_val_batches):
        why = "the validation data has no batch"
    else:
        return
    names = ", ".join(type(each).__name__ for each in waiting)
    raise UsageError(f"nothing is ever validated ({why}), and {names} need it: fit --disable early_stopping,best")


def refuse_no_batches(trainer: Trainer) -> None:
    """Refuse a fit whose training data has no batch. Call it when the fit has ended without having started.

    Raises:
        UsageError: With what may have left none.
    """
    if trainer.num_training_batches == 0:
        raise UsageError("the training data has no batch: too few samples for one, with drop_last or these processes")


def refuse_fewer_samples(sizes: Mapping[str, int], processes: int) -> None:
    """Refuse data of which some processes would have nothing, while the others wait for them.

    Args:
        sizes: By split, its samples.
        processes: `P`.

    Raises:
        UsageError: Naming the split.
    """
    for split, size in sizes.items():
        if size < processes:
            raise UsageError(f"the {split} split has {size} samples, so some of {processes} processes have no batch")


def refuse_unknown_monitors(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Refuse a callback that watches what validation does not log. Call it at the end of the sanity check.

    What `training_step` logs is not known yet, so only monitors `val...` are looked at.

    Raises:
        UsageError: Naming callback, monitor and what there is.
    """
    if not any(trainer.num_val_batches):
        return  # `refuse_no_validation` says so.
    known = [name for name in trainer.callback_metrics if name.startswith("val")]
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val") and monitor not in known:
            raise UsageError(
                f"{type(each).__name__} watches {monitor}, but validation logs {', '.join(known) or 'nothing'}"
                + did_you_mean(monitor, known)
            )


def checkpoint_bytes(module: nn.Module, optimizer: OptimizerCallable) -> int:
    """Return about how many bytes a checkpoint of a module has: parameters, buffers and what the optimiser remembers.

    An optimiser that cannot be tried without numbers counts as one that remembers two for each trainable parameter.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = sum(tensor.nbytes for tensor in module.state_dict().values() if isinstance(tensor, torch.Tensor))
    try:
        # Tensors without storage: no memory is taken, and the module keeps its weights.
        shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in trainable]
        for shape in shapes:
            shape.grad = torch.empty_like(shape)
        tried = optimizer(shapes)
        tried.step()
        states = [value for state in tried.state.values() for value in state.values()]
        return size + sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    except Exception:  # A closure that is missing, a number that is asked for: what an optimiser raises is its own.
        return size + 2 * sum(parameter.nbytes for parameter in trainable)


def refuse_no_room(folder: Path, needed: int) -> int:
    """Return the free bytes of a folder that can be made and written, and whose disk has room for the checkpoints.

    Args:
        folder: Where checkpoints go; it need not exist.
        needed: Bytes.

    Raises:
        UsageError: With path, reason, bytes needed and free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        # The rights alone would not do: root has all of them, and a file system may be read-only.
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        doing = "write into" if there == folder else "make"
        raise UsageError(f"cannot {doing} the folder {folder}: {error.strerror}") from error
    if free < needed:
        raise UsageError(
            f"{folder} has no room for the checkpoints: they need about {needed:,} bytes, {free:,} are free"
        )
    return free


def check_data(task: Task, datamodule: LightningDataModule) -> None:
    """Refuse samples that the task cannot learn from; only a `DataModule` of ours can be looked into.

    Raises:
        UsageError: When labels, shapes or types do not fit.
    """
    if isinstance(datamodule, DataModule):
        datamodule.setup()
        for split in datamodule.indices:
            samples = datamodule.dataset(split)
            few = samples[range(min(3, len(samples)))]
            probe(task, datamodule.on_after_batch_transfer(few, 0), samples.targets)


def check_sizes(datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Refuse splits with fewer samples than the processes of a trainer, and a global batch that they do not divide.

    Raises:
        UsageError: Naming the split or the batch.
    """
    if isinstance(datamodule, DataModule):
        processes = trainer.num_devices * trainer.num_nodes
        per_process(datamodule.batch_size, datamodule.batch_size_is, processes)
        sizes = {str(split): len(rows) for split, rows in datamodule.indices.items()}
        refuse_fewer_samples(sizes, processes)


def check_room(task: Task, folder: Path, disable: Collection[str]) -> tuple[int, int]:
    """Return the bytes that the checkpoints of a run still need, and those that are free.

    Needed are those that are not there yet, and one that is being written beside its place.

    Args:
        task: What is trained.
        folder: The run, or where it is going to be.
        disable: Default callbacks that are left out.

    Raises:
        UsageError: When the folder cannot be written, or its disk has no room.
    """
    kept = [name for name in ("best", "last") if name not in disable]
    new = [name for name in kept if not (folder / "checkpoints" / f"{name}.ckpt").is_file()]
    needed = (len(new) + 1 if kept else 0) * checkpoint_bytes(task, task.optimization.build_optimizer)
    return needed, refuse_no_room(folder, needed)
