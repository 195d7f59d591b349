"""The probe: network and loss on a few samples, before a run starts.

Shapes: `B` the few samples; `N` all samples of a split.
"""

import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.preflight.outputs import check_output_kind
from firstlight.tasks import Task
from firstlight.tasks.checks import describe

_LIBRARIES = ("firstlight", "torch", "torchmetrics")
_PRODUCT = r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)"

T = TypeVar("T")


def probe_splits(task: LightningModule, datamodule: LightningDataModule, reads_test: bool = True) -> None:
    """Probe a task with three samples of each split; modules that are not firstlight's are not inspected.

    Args:
        task: The task.
        datamodule: Its data.
        reads_test: Whether the test split is probed, too.
    """
    if not isinstance(datamodule, DataModule):
        return
    datamodule.setup()
    if not isinstance(task, Task):
        return
    for split in datamodule.indices:
        if split == "test" and not reads_test:
            continue
        samples = datamodule.dataset(split)
        few = samples[range(min(3, len(samples)))]
        if few[1].is_floating_point() and not task.exact_targets:
            samples = samples.with_targets(torch.float32)
            few = samples[range(min(3, len(samples)))]
        chunks = samples.target_chunks()
        targets = next(chunks)
        probe(task, datamodule.on_after_batch_transfer(few, 0), targets)
        _probe_metrics(task, split, targets)
        for targets in chunks:
            task.check_targets(targets)


def _probe_metrics(task: Task, split: str, targets: Tensor) -> None:
    """Refuse a monitor that is undefined for its split, and warn about other metrics that are."""
    metrics = {"val": task.val_metrics, "test": task.test_metrics}
    reasons = metrics[split].undefined(targets) if split in metrics else {}
    if task.monitor in reasons:
        raise UsageError(
            f"monitor={task.monitor} is undefined for the {len(targets)} samples of the {split} split, because "
            f"{reasons[task.monitor]}: monitor another metric, or use another split"
        )
    task.notices.tell_undefined(reasons)


def probe(task: Task, batch: tuple[Any, Tensor], targets: Tensor) -> None:
    """Refuse samples that do not fit a task: run network and loss on a few of them, without a gradient.

    Args:
        task: Runs in evaluation mode.
        batch: A few samples `(inputs, targets)` as the network will get them.
        targets: `(N, ...)`, all targets of the split.

    Raises:
        UsageError: When targets, outputs, loss or monitor do not fit.
    """
    was_training = task.training
    task.eval()
    try:
        task.check_targets(targets)
        inputs, few = batch
        shape = f"shape {tuple(inputs.shape[1:])}" if isinstance(inputs, Tensor) else f"the form {describe(inputs)}"
        with torch.enable_grad():
            outputs = _attempt(lambda: task(inputs), f"{_name(task.network)} cannot take samples of {shape}")
        seen, outputs = outputs, apply_to_collection(outputs, Tensor, Tensor.detach)
        _probe_outputs(task, outputs, few, targets)
        if isinstance(seen, Tensor):
            check_output_kind(task, seen)
        _probe_loss(task, outputs, few)
    finally:
        task.train(was_training)


def _probe_outputs(task: Task, outputs: Any, few: Tensor, targets: Tensor) -> None:
    if isinstance(outputs, Tensor):
        if outputs.shape[:1] != few.shape[:1]:
            raise UsageError(
                f"{_name(task.network)} returns outputs of shape {tuple(outputs.shape)} for {len(few)} samples: the "
                "first axis must be the samples"
            )
    else:
        task.check_structure(outputs)
    if isinstance(outputs, Tensor) or task.is_overridden("check_outputs"):
        task.check_outputs(outputs, targets)


def _probe_loss(task: Task, outputs: Any, few: Tensor) -> None:
    source = f"{_name(task)}.compute_loss" if task.is_overridden("compute_loss") else _name(task.loss)
    fault = f"{source} cannot compare outputs {describe(outputs)} with targets {describe(few)}"
    losses = _attempt(lambda: task.compute_loss(outputs, few), fault)
    terms = losses if isinstance(losses, dict) else {"loss": losses}
    if not terms or not all(isinstance(term, Tensor) and not term.ndim for term in terms.values()):
        raise UsageError(
            f"{source} returns {describe(losses)}: it must return the mean loss of the batch as a tensor of "
            "shape (), or a dict of such tensors"
        )
    metrics = {f"val/{name}" for name in task.val_metrics.names}
    if isinstance(losses, dict):
        if taken := sorted({f"val/{name}" for name in terms} & {"val/loss", *metrics}):
            raise UsageError(f"{source} returns a term for {taken[0]}, which is logged already: rename the term")
    if task.val_metrics.names:
        seen = _attempt(lambda: task.metric_inputs(outputs, few), f"{_name(task)}.metric_inputs fails")
        if seen is not None and not (len(seen) == 2 and all(isinstance(each, Tensor) for each in seen)):
            raise UsageError(
                f"{_name(task)}.metric_inputs returns {describe(seen)}: it must return predictions and targets"
            )
        if seen is not None:
            task.val_metrics.try_added(*seen)
    if not task.is_overridden("validation_step"):
        task.check_monitor(list(dict.fromkeys(["val/loss", *(f"val/{name}" for name in terms), *sorted(metrics)])))
    if not task.pairwise_loss:
        _probe_mean(task, outputs, few, terms, source, fault)


def _probe_mean(task: Task, outputs: Any, few: Tensor, terms: dict[str, Tensor], source: str, fault: str) -> None:
    """Refuse a loss that is not a mean: the same samples twice must give the same loss."""
    if not all(each.shape[:1] == few.shape[:1] for each in _tensors(outputs)):
        return  # Some output does not belong to the samples and cannot be repeated.
    twice = apply_to_collection(outputs, Tensor, lambda each: torch.cat([each, each]))
    losses = _attempt(lambda: task.compute_loss(twice, torch.cat([few, few])), fault)
    doubled = losses if isinstance(losses, dict) else {"loss": losses}
    for name, term in terms.items():
        if not torch.isclose(term, doubled[name], rtol=1e-3, equal_nan=True):
            raise UsageError(
                f"{source} returns the {name} {term:.4g} for some samples and {doubled[name]:.4g} for the same samples "
                "twice: it must be a mean over the batch, or the task must set pairwise_loss = True"
            )


def _tensors(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(outputs, Tensor, found.append)
    return found


def _attempt(call: Callable[[], T], fault: str) -> T:
    """Return the result of `call`.

    If torch refuses shapes, types or values, a `UsageError` holds `fault`, the line of the user's code that called
    torch, if there is one, and torch's message.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # It would broadcast to a wrong loss.
            return call()
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        message = re.sub(_PRODUCT, r"a layer for \2 features was given \1", " ".join(str(error).split()))
        raise UsageError(f"{fault}{_user_line(error)}: {message}") from error


def _user_line(error: BaseException) -> str:
    """Return file and line of the innermost frame outside the libraries, or `""`."""
    lines = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].partition(".")[0] not in _LIBRARIES
    ]
    return lines[-1] if lines else ""


def _name(part: object) -> str:
    return type(part).__name__
