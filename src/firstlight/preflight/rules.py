"""The rules that a fit must pass before its first step. Each `refuse_*` raises one `UsageError`."""

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence, Sized
from copy import copy, deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from firstlight.callbacks.defaults import DEFAULTS, Monitored
from firstlight.checkpoints.content import find_unreadable
from firstlight.data import DataModule
from firstlight.data.loader import ResumableDistributedSampler, normalises_batches, per_process
from firstlight.errors import UsageError, check_range, did_you_mean
from firstlight.loggers import as_list, logged_names, split_of
from firstlight.tasks import Task


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options of `Trainer` that train nothing, are out of range, or start more processes than processors."""
    for name in ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"):
        if options[name] == 0:
            raise UsageError(f"trainer.{name}=0 trains nothing")
    check_range("trainer", "[1, inf)", accumulate_grad_batches=options["accumulate_grad_batches"])
    check_range("trainer", "[0, inf)", log_every_n_steps=options["log_every_n_steps"] or 0)
    strategy = options["strategy"]
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    method = getattr(strategy, "_start_method", None) or name.rpartition("_")[2]
    if method in ("spawn", "fork", "notebook", "forkserver"):
        raise UsageError(
            f"trainer.strategy={name} starts the processes of a run from within it, and its results stay in them: "
            "use ddp"
        )
    if name.lower().startswith("fsdp"):
        raise UsageError(
            f"trainer.strategy={name} splits gradients so that their norm cannot be computed: use "
            "ModelParallelStrategy with fully_shard"
        )
    devices, processors = str(options["devices"]), max(os.cpu_count() or 1, 2)  # Two processes can always be tried.
    accelerator = options["accelerator"]
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and devices.isdigit() and int(devices) > processors:
        # Each process holds a copy of everything, so a typing error could exhaust the machine.
        raise UsageError(
            f"trainer.devices={devices} starts {devices} processes on the CPU; at most {processors} fit here"
        )


def refuse_unreadable_checkpoints(
    task: LightningModule, datamodule: LightningDataModule, options: Mapping[str, Any], disable: Collection[str]
) -> None:
    """Refuse hyper-parameters that a checkpoint of the run cannot hold."""
    writes = not {"best", "last"} <= {*disable} or any(isinstance(e, Checkpoint) for e in as_list(options["callbacks"]))
    if not writes or any(isinstance(each, CheckpointIO) for each in as_list(options["plugins"])):
        return
    for part in (task, datamodule):
        if wrong := find_unreadable(dict(part.hparams)):
            raise UsageError(
                f"a checkpoint cannot hold a hyper-parameter of {type(part).__name__}: {wrong}, or leave it out with "
                "save_hyperparameters(ignore=[...])"
            )


def refuse_other_limits(options: Mapping[str, Any], own: Sequence[Callback]) -> None:
    """Refuse options and callbacks that contradict `--time`."""
    for name in ("min_epochs", "min_steps", "max_time", "fast_dev_run"):
        if options[name]:
            raise UsageError(f"--time and trainer.{name}={options[name]} both decide when the run ends: give one")
    for each in own:
        if isinstance(each, StochasticWeightAveraging | Timer):
            raise UsageError(
                f"trainer.callbacks holds {type(each).__name__}, which needs to know the end of the run or decides "
                "it: leave out --time"
            )


def monitored(module: LightningModule, monitor: str | None, mode: Literal["min", "max"] | None) -> Monitored | None:
    """Return which metric decides what is best, or `None` if nothing says so.

    Args:
        module: A task declares `monitor` and `mode`. Another module may have attributes of these names.
        monitor: The option `--monitor`.
        mode: The option `--mode`.

    Raises:
        UsageError: When a task is given the options, or when the mode is unknown.
    """
    name = type(module).__name__
    if isinstance(module, Task):
        if monitor or mode:
            raise UsageError(f"--monitor and --mode are for modules that declare none: {name} takes --model.monitor")
        return module
    own, own_mode = getattr(module, "monitor", None), getattr(module, "mode", None)
    monitor = monitor or (own if isinstance(own, str) else None)
    if monitor is None:
        if mode:
            raise UsageError(f"--mode {mode} needs --monitor NAME, the metric that decides what is best")
        return None
    mode = mode or (own_mode if own_mode in ("min", "max") else None)
    if mode is None:
        raise UsageError(
            f"monitor {monitor} of {name} needs a direction: --mode min if lower values are better, else --mode max"
        )
    return SimpleNamespace(monitor=monitor, mode=mode)


def refuse_no_step(module: LightningModule, datamodule: LightningDataModule, verb: str) -> None:
    """Refuse to test, validate or predict with a module or data that lack the method for it."""
    stage = {"validate": "val", "run": "test"}.get(verb, verb)
    step = {"val": "validation_step"}.get(stage, f"{stage}_step")
    hint = ": use fit" if verb == "run" else ""
    for part, method in ((module, step), (datamodule, f"{stage}_dataloader")):
        if not is_overridden(method, part):
            raise UsageError(f"{verb} needs {method}, which {type(part).__name__} does not have{hint}")


def refuse_collisions(own: Sequence[Callback], default: Sequence[Callback]) -> None:
    """Refuse a callback that duplicates a default one, and one that changes the batch size after the plan.

    Lightning refuses some of these with a traceback. With others, two callbacks write one file, or the order of the
    callbacks decides which checkpoint is best.
    """
    if any(isinstance(each, BatchSizeFinder) for each in own):
        raise UsageError(
            "trainer.callbacks holds BatchSizeFinder, which would change the batch size after the run is planned and "
            "its config written: find it with lightning.pytorch.tuner.Tuner, then give --data.batch_size"
        )
    for mine in own:
        for theirs in default:
            name = next(name for name, kind in DEFAULTS.items() if type(theirs) is kind)
            bars = isinstance(mine, ProgressBar) and isinstance(theirs, ProgressBar)
            files = isinstance(mine, ModelCheckpoint) and (mine.filename == name or (name == "last" and mine.save_last))
            # Classes without a state may share a state key.
            same = mine.state_key == theirs.state_key and (type(mine) is type(theirs) or bool(mine.state_dict()))
            if same or bars or files:
                raise UsageError(
                    f"trainer.callbacks holds {type(mine).__name__}, which duplicates the default callback {name}: "
                    f"set the options of {name}, or leave it out with --disable {name}"
                )


def refuse_no_validation(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Refuse a fit that never validates although a callback monitors `val/...`. Call it when training starts."""
    waiting = [
        each
        for each in callbacks
        if isinstance(each, EarlyStopping | ModelCheckpoint) and split_of(str(each.monitor)) == "val"
    ]
    if not waiting:
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
    default = [name for name, kind in DEFAULTS.items() if any(type(each) is kind for each in waiting)]
    way_out = f"use --disable {','.join(default)}" if default else "remove them from trainer.callbacks"
    raise UsageError(f"the run never validates ({why}), which these callbacks need: {names}; {way_out}")


def long_accumulation(trainer: Trainer) -> str:
    """Return that a step accumulates more batches than an epoch has, or `""`. Call it when training starts."""
    accumulated, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if accumulated <= batches:
        return ""
    return (
        f"accumulate_grad_batches is {accumulated:,}, but an epoch has {batches:,} batches: an epoch makes one "
        f"step, of {batches:,} batches"
    )


def refuse_no_batches(trainer: Trainer) -> None:
    """Refuse a fit whose training data has no batch. Call it after a fit that trained nothing."""
    if trainer.num_training_batches == 0:
        raise UsageError(
            "the training data has no batch: too few samples for the batch size with drop_last, or for the processes"
        )


def refuse_sizes(datamodule: LightningDataModule, trainer: Trainer) -> None:
    """Refuse a split with fewer samples than processes, and a global batch that the processes cannot share.

    Processes without a batch would make the others wait forever.
    """
    if isinstance(datamodule, DataModule):
        processes = trainer.num_devices * trainer.num_nodes
        per_process(datamodule.batch_size, datamodule.batch_size_is, processes)
        for split, rows in datamodule.indices.items():
            if len(rows) < processes:
                count = f"{len(rows)} sample{'s' * (len(rows) != 1)}"
                raise UsageError(
                    f"the {split} split has {count}, too few for {processes} processes: start fewer processes"
                )


def refuse_single_samples(trainer: Trainer, processes: int = 1) -> None:
    """Refuse a training batch of one sample if the network cannot train on one, as batch normalisation cannot.

    Call it when training starts. It tries a copy of the network. Only batches of a DataLoader are known.

    Args:
        trainer: Of the fit, or of a dry run on one process.
        processes: How many processes will share the batches of this trainer.
    """
    network, loader = getattr(trainer.lightning_module, "network", None), trainer.train_dataloader
    if not isinstance(network, nn.Module) or not normalises_batches(network):
        return
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    if _smallest(loader, trainer, processes) > 1:
        return
    with isolate_rng(), torch.no_grad():
        data: Any = loader.dataset
        one = data.__getitems__([0]) if hasattr(data, "__getitems__") else [data[0]]
        batch = trainer.precision_plugin.convert_input(loader.collate_fn(one))
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            return  # Only the module knows what its network gets.
        try:
            deepcopy(network).train()(trainer.strategy.batch_to_device(batch)[0])
        except ValueError as error:
            raise UsageError(
                f"a training batch has one sample, and {type(network).__name__} cannot train on it ({error}): use "
                "another batch_size, or drop_last=True in a DataLoader"
            ) from error
        except Exception:  # Another module than a task may give its network something else.
            return


def _smallest(loader: DataLoader[Any], trainer: Trainer, processes: int) -> int:
    """Return the size of the smallest batch of a loader that processes share; 2 if it is unknown."""
    sampler, data = loader.sampler, trainer.datamodule  # type: ignore[attr-defined]  # set outside the class
    if isinstance(sampler, ResumableDistributedSampler):
        shared: ResumableDistributedSampler = copy(sampler)
        if processes > 1 and isinstance(data, DataModule):
            shared.num_replicas = processes
            shared.batch_size = per_process(data.batch_size, data.batch_size_is, processes)
        return shared.smallest
    size, drop = getattr(loader.batch_sampler, "batch_size", None), getattr(loader.batch_sampler, "drop_last", True)
    if not isinstance(size, int) or not isinstance(sampler, Sized):
        return 2
    rest = -(-len(sampler) // processes) % size  # Lightning's sampler gives each process as many samples.
    return rest if rest and not drop else size


def unknown_monitors(trainer: Trainer, callbacks: Sequence[Callback]) -> str:
    """Return which monitored metric the sanity check has not logged, or `""`. Call it at the end of the sanity check.

    Only monitors `val...` are checked, because `training_step` has logged nothing yet. A module or callback of the user
    may log later what it does not log in a sanity check, so the first validation decides.

    Raises:
        UsageError: When no part of the user can log the metric later.
    """
    if not any(trainer.num_val_batches):
        return ""  # `refuse_no_validation` reports it.
    logged = logged_names(trainer.fit_loop.epoch_loop.val_loop._results, everything=True)
    known = sorted(name for name in logged if split_of(name) == "val")
    every: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
    parts = [trainer.lightning_module, *every]
    is_certain = all(type(each).__module__.partition(".")[0] in ("firstlight", "lightning") for each in parts)
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if isinstance(monitor, str) and split_of(monitor) == "val" and monitor not in known:
            logs = f"logs {', '.join(known) or 'nothing'}" + did_you_mean(monitor, known)
            if is_certain:
                raise UsageError(f"{type(each).__name__} monitors {monitor}, but validation {logs}")
            return f"{monitor} is not known before the first validation, which must log it: the sanity check {logs}"
    return ""


def checkpoint_bytes(module: nn.Module, optimizer: OptimizerCallable | None) -> int:
    """Return the approximate size of a checkpoint in bytes: parameters, buffers and optimiser state.

    An optimiser that is `None`, or that cannot step on tensors without storage, counts as one with two values per
    trainable parameter.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = sum(tensor.nbytes for tensor in module.state_dict().values() if isinstance(tensor, torch.Tensor))
    estimate = size + 2 * sum(parameter.nbytes for parameter in trainable)
    if optimizer is None:
        return estimate
    try:
        # Tensors on the meta device take no memory, and the module keeps its weights.
        shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in trainable]
        for shape in shapes:
            shape.grad = torch.empty_like(shape)
        tried = optimizer(shapes)
        tried.step()
        states = [value for state in tried.state.values() for value in state.values()]
        return size + sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    except Exception:  # An optimiser may raise anything here: it may need a closure, or a value of a tensor.
        return estimate


def refuse_no_room(task: LightningModule, disable: Collection[str], folder: Path) -> tuple[int, int]:
    """Refuse a run directory that cannot be created or written, or whose disk has no room for the checkpoints.

    Returns:
        The bytes that are needed and the bytes that are free. The checkpoints that do not exist yet count, and one
        more, because a checkpoint is written beside the file that it replaces.
    """
    kept = [name for name in ("best", "last") if name not in disable]
    new = [name for name in kept if not (folder / "checkpoints" / f"{name}.ckpt").is_file()]
    files = len(new) + 1 if kept else 0
    needed = files * checkpoint_bytes(task, task.optimization.build_optimizer if isinstance(task, Task) else None)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        bytes(folder.absolute()).decode()  # torch and TensorBoard take no other names.
        # Permissions do not decide it: root has all of them, and a file system may be read-only.
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        action = "write to" if existing == folder else "create"
        raise UsageError(f"cannot {action} the folder {folder}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot use the folder {folder}: its name is not UTF-8; choose another with --runs"
        ) from error
    if free < needed:
        raise UsageError(
            f"{folder} has no room for the checkpoints: they need about {needed:,} bytes, {free:,} are free; "
            "choose another folder with --runs"
        )
    return needed, free
