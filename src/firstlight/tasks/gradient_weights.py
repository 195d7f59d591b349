"""How the gradients of the batches of a step become the gradient of the mean over all that they scored."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import BatchSampler, IterableDataset, TensorDataset, default_collate

from firstlight.metrics.whole_split import exact


class GradientWeights:
    """Weighs the batches of processes, and those that are accumulated for one step, by what they scored.

    Lightning lets all of them count alike, and divides a shorter last step by the full number of batches. Where all
    weights are equal, nothing is computed here. Processes ask each other only if their weights may differ: for weights
    that are tensors, for the last batch of an epoch, and for loaders whose batches may differ in size.
    """

    def __init__(self) -> None:
        self.is_even = True
        self.start_step()

    def start_step(self) -> None:
        """Forget the batches of a step that was left unfinished."""
        self._unit: Any = None  # The weight that counts as 1 in this step, equal on all processes.
        self._total: Any = 0.0

    def scale(self, trainer: Trainer, loss: Tensor, weight: Tensor | int) -> Tensor:
        """Return the loss to back-propagate for a batch of this weight."""
        if trainer.accumulate_grad_batches == 1:
            if not self._may_differ(trainer, weight):
                return loss
            share: Tensor = _ratio(weight, _mean_over_processes(trainer, weight, loss.device))
            return loss * share.to(loss.dtype)
        if isinstance(weight, Tensor):
            weight = exact(weight)  # torch divides integers in float32.
        if self._unit is None:
            differs = self._may_differ(trainer, weight)
            unit = _mean_over_processes(trainer, weight, loss.device) if differs else weight
            self._unit = unit.where(unit > 0, 1) if isinstance(unit, Tensor) else unit or 1
        relative = _ratio(weight, self._unit)
        self._total = self._total + relative
        if isinstance(relative, Tensor):
            return loss * relative.to(loss.dtype)
        return loss if _is_one(relative) else loss * relative

    def finish(self, trainer: Trainer, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the weight of all batches of the step, if a batch was its last one."""
        accumulated = trainer.accumulate_grad_batches
        if accumulated == 1 or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        total = self._total
        self.start_step()
        parameters = [each for each in parameters if each.grad is not None]
        if parameters and self._may_differ(trainer, total):
            total = _mean_over_processes(trainer, total, parameters[0].device)
        factor = _ratio(accumulated, total)
        if not _is_one(factor):
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(factor)

    def _may_differ(self, trainer: Trainer, weight: Any) -> bool:
        if trainer.world_size == 1:
            return False
        return not self.is_even or isinstance(weight, Tensor) or trainer.is_last_batch


def holds_even_batches(loader: Any, averages_over: str = "samples") -> bool:
    """Return whether all processes get batches of one weight from a loader, except for the last batch of an epoch.

    Args:
        loader: The training loader.
        averages_over: What the loss averages over; the weights of a loss that counts itself may always differ.
    """
    # Each worker of an iterable data set may end with a short batch in the middle of an epoch.
    if averages_over == "own" or isinstance(getattr(loader, "dataset", None), IterableDataset):
        return False
    if _is_of_firstlight(getattr(loader, "sampler", None)):
        return True
    dataset, collate_fn = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if type(getattr(loader, "batch_sampler", None)) is not BatchSampler or collate_fn is not default_collate:
        return False
    return averages_over != "elements" or type(dataset) is TensorDataset


def count_samples(batch: Any) -> int:
    """Return the length of the first axis of the first tensor of a batch; 0 without one."""
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda each: lengths.append(each.shape[0]) if each.ndim else None)
    return lengths[0] if lengths else 0


def count_scored(batch: Any, averages_over: str) -> int:
    """Return the weight of a batch whose own is not known: its samples, or 1 if it shows none.

    If the loss of the task averages over numbers or tokens, these are counted, so that the weight compares with others.
    """
    targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if isinstance(targets, Tensor) and targets.ndim:
        if averages_over == "elements" or (averages_over == "targets" and not targets.is_floating_point()):
            return targets.numel()
    return count_samples(batch) or 1


def makes_new_batches(loader: Any) -> bool:
    """Return whether each batch of a loader has its own memory; others may write into the memory of the one before."""
    return _is_of_firstlight(getattr(loader, "sampler", None)) or getattr(loader, "collate_fn", None) is default_collate


def may_hold(loader: Any, target: int) -> bool:
    """Return whether targets of a loader may equal a value; True unless its data set only holds tensors."""
    dataset, targets = getattr(loader, "dataset", None), None
    if dataset is not None and _is_of_firstlight(dataset) and hasattr(dataset, "target_chunks"):
        return any(bool((chunk == target).any()) for chunk in dataset.target_chunks())
    if type(dataset) is TensorDataset and loader.collate_fn is default_collate:
        targets = dataset.tensors[-1]
    return not isinstance(targets, Tensor) or bool((targets == target).any())


def _is_of_firstlight(part: Any) -> bool:
    return type(part).__module__.startswith("firstlight.")


def _ratio(weight: Any, total: Any) -> Any:
    """Return `weight / total`, and 0 if the total is 0, because then nothing was scored."""
    if isinstance(total, Tensor):
        return torch.where(total > 0, weight / total.where(total > 0, 1), 0.0)
    return weight / total if total else 0.0 * weight


def _is_one(factor: Any) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


def _mean_over_processes(trainer: Trainer, weight: Any, device: torch.device) -> Tensor:
    # `reduce` changes its argument.
    weight = exact(torch.as_tensor(weight, device=device)).clone()
    return trainer.strategy.reduce(weight, reduce_op="mean")
