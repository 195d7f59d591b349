"""Whether the loss of a batch is the mean of its parts, weighted by `batch_weight`.

Shapes: `B` batch; `...` one output or target.
"""

import copy
import math
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


@torch.no_grad()
def terms_of_other_weight(task: Any, outputs: Any, targets: Tensor) -> list[str]:
    """Return the names of the terms, or `"loss"`, whose mean depends on how the samples are cut into batches.

    The loss of the batch must be the mean of the losses of two parts of it. The answer is empty if the loss draws
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
    training = {module: module.training for module in task.modules()}
    twin = _twin(task)
    try:
        with isolate_rng():
            twin.eval()
            whole, again, first, second = (
                _terms(twin, apply_to_collection(outputs, Tensor, lambda each, rows=rows: each[rows]), targets[rows])
                for rows in (slice(None), slice(None), slice(0, (count + 2) // 3), slice((count + 2) // 3, None))
            )
    except (RuntimeError, ValueError, IndexError):
        return []
    finally:
        for module, was in training.items():
            module.training = was
    if whole.keys() != first.keys() or whole.keys() != second.keys():
        return []
    found = []
    for name, (loss, weight) in whole.items():
        parts = [part[name] for part in (first, second) if part[name][1] > 0]
        mean = sum(each * size for each, size in parts) / max(sum(size for _, size in parts), 1e-300)
        is_exact = loss == again[name][0]
        if weight > 0 and is_exact and not math.isclose(mean, loss, rel_tol=1e-2, abs_tol=1e-8):
            found.append(name)
    return found


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
