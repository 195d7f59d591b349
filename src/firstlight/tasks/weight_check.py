"""Whether the loss of a batch is the mean of its parts, weighted by `batch_weight`.

Shapes: `B` batch; `...` one output or target.
"""

import copy
import math
import pickle
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from firstlight.tasks.checks import at_least_float32

_FEW = 8  # Samples that are cut into small parts.
_ROUNDING = {"rel_tol": 1e-4, "abs_tol": 1e-6}  # Of a mean of float32 numbers, also if it is subtracted from 1.


@torch.no_grad()
def terms_of_other_weight(task: Any, outputs: Any, targets: Tensor) -> list[str]:
    """Return the names of the terms, or `"loss"`, whose mean depends on how the samples are cut into batches.

    The loss of the batch must be the mean of the losses of two parts of it, and the loss of a few samples must be the
    mean of their own losses; of pairs or fours, if the loss cannot take fewer. The answer is empty if the loss draws
    random numbers or cannot take a part. The loss and the task keep their state.

    Args:
        task: A `Task`.
        outputs: `(B, ...)`, or a collection of such tensors.
        targets: `(B, ...)`.
    """
    sizes: set[int] = set()
    apply_to_collection(outputs, Tensor, lambda each: sizes.add(each.shape[0] if each.ndim else -1))
    count = len(targets)
    if sizes != {count} or count < 2:
        return []
    outputs, targets = apply_to_collection(outputs, Tensor, at_least_float32), at_least_float32(targets)
    training = {module: module.training for module in task.modules()}
    twin = _twin(task)
    third, few = (count + 2) // 3, min(_FEW, count)
    step = count // few
    found: set[str] = set()
    # 16 bits would hide what is no rounding.
    with isolate_rng(), warnings.catch_warnings(), torch.autocast(targets.device.type, enabled=False):
        warnings.simplefilter("ignore")  # For example of a variance of one sample.
        try:
            twin.eval()
            halves = [slice(third), slice(third, None)]
            found |= _differing(twin, outputs, targets, slice(None), halves) or set()
            for size in (1, 2, 4):
                starts = range(0, few - few % size, size)
                parts = [slice(start * step, (start + size) * step, step) for start in starts]
                if len(parts) < 2:
                    break
                differing = _differing(twin, outputs, targets, slice(0, parts[-1].stop, step), parts)
                if differing is not None:
                    found |= differing
                    break
        finally:
            for module, was in training.items():
                module.training = was
    return sorted(found)


def _differing(task: Any, outputs: Any, targets: Tensor, rows: slice, parts: list[slice]) -> set[str] | None:
    """Return the terms of rows that are not the mean over parts of these rows; None if that cannot be told."""
    before = _random_states()
    try:
        whole, again, *cut = (
            _terms(task, apply_to_collection(outputs, Tensor, lambda each, part=part: each[part]), targets[part])
            for part in (rows, rows, *parts)
        )
    except Exception:  # The user's loss may need more samples.
        return None
    if _random_states() != before or any(each.keys() != whole.keys() for each in cut):
        return None
    found = set()
    for name, (loss, weight) in whole.items():
        scored = [part[name] for part in cut if part[name][1] > 0]
        if not all(math.isfinite(each) for each, _ in scored):
            return None
        mean = sum(each * size for each, size in scored) / max(sum(size for _, size in scored), 1e-300)
        if weight > 0 and loss == again[name][0] and not math.isclose(mean, loss, **_ROUNDING):
            found.add(name)
    return found


def _random_states() -> bytes:
    """Return the states of the random generators, equal if nothing was drawn."""
    # Two pickles of one tensor differ.
    return pickle.dumps(apply_to_collection(_collect_rng_states(), Tensor, lambda each: each.tolist()))


def _twin(task: Any) -> Any:
    """Return a copy of a task that shares its network, and whose loss and buffers can change without effect."""
    twin = copy.copy(task)
    vars(twin)["_trainer"] = task._trainer
    vars(twin)["_buffers"] = {name: None if each is None else each.clone() for name, each in task._buffers.items()}
    vars(twin)["_modules"] = dict(task._modules)
    twin.loss = copy.deepcopy(task.loss)
    vars(twin)["log"] = vars(twin)["log_dict"] = lambda *_, **__: None
    return twin


def _terms(task: Any, outputs: Any, targets: Tensor) -> dict[str, tuple[float, float]]:
    """Return by name the loss or its terms, with the weight of the batch."""
    loss: Any = task.compute_loss(outputs, targets)
    weight = float(task.batch_weight(targets))
    terms = {"loss": loss} if isinstance(loss, Tensor) else loss
    return {name: (float(term), weight) for name, term in terms.items()}
