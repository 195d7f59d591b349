"""What a loss aims at, asked before the first step of it and of its first value.

Shapes: `B` batch, `N` samples, `C` classes, `K` outputs; `...` the shape of one sample, output or target.
"""

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from firstlight.callbacks.fixed_sample import undisturbed
from firstlight.metrics.whole_split import r2
from firstlight.tasks import (
    Classification,
    Regression,
    Task,
)

_LAYERS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Embedding", "NativeLayerNorm", "NativeBatchNorm")
"""Operations, as autograd names them, at which the path from the loss ends. `Cudnn...BatchNorm` is one, too."""

_MOST_NODES = 500
_MOST_TARGETS = 20_000  # From which the loss of the best constant is computed.
_MOST_CLASSES = 100
_FREE_SAMPLES, _FREE_STEPS, _FREE_RATE = 64, 60, 0.3
_SURE, _UNSURE = 0.9, 0.7

_KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
    "mse_loss": functional.mse_loss,
    "l1_loss": functional.l1_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
}


@torch.no_grad()
def chance_loss(task: Task, kind: str | None, targets: Tensor | None, output_size: int | None) -> float | None:
    """Return the loss of the best constant outputs for training targets `(N, ...)`, or None if it is unknown.

    It is the loss of a network that ignores its inputs. For classes it is their entropy, with the class weights and the
    label smoothing of the loss. A language model has `ln(vocabulary)`.
    """
    if kind == "language":
        return math.log(output_size) if output_size else None
    if targets is None or not len(targets) or kind in (None, "retrieval", "other"):
        return None
    targets = targets[torch.linspace(0, len(targets) - 1, min(len(targets), _MOST_TARGETS)).long()].to(task.device)
    found = []
    for constant in _constants(task, kind, targets):
        loss: Any = task.compute_loss(constant.expand(len(targets), *constant.shape[1:]), targets)
        found.append(float(loss if isinstance(loss, Tensor) else sum(loss.values())))
    return min(found, default=None)


def _constants(task: Task, kind: str | None, targets: Tensor) -> list[Tensor]:
    """Return outputs `(1, ...)`, of which one is about the best constant."""
    small = 1e-6
    if isinstance(task, Classification):
        weight, smoothing = getattr(task.loss, "weight", None), float(getattr(task.loss, "label_smoothing", 0.0))
        counts = targets[(targets >= 0) & (targets < task.classes)].bincount(minlength=task.classes).double()
        shares = counts if weight is None else counts * weight.double()
        shares = (1 - smoothing) * shares / shares.sum() + smoothing / task.classes
        logs = shares.clamp(small).log()[None].float()
        return [logs] if task.outputs_are in ("logits", "log_probabilities") else []
    if kind in ("binary", "multilabel"):
        weight = getattr(task.loss, "pos_weight", None)
        share = targets.double().mean(0, keepdim=True).clamp(small, 1 - small)
        odds = share / (1 - share) * (1 if weight is None else weight.double())
        return [(odds / (1 + odds)).float() if task.outputs_are == "probabilities" else odds.log().float()]
    if isinstance(task, Regression):
        values = targets.double()
        means = [values.mean(0, keepdim=True), values.median(0, keepdim=True).values]
        if task.outputs_are == "standardised":
            means = [(each - task.target_mean) / task.target_std for each in means]
        elif task.outputs_are == "log_rates":
            means = [means[0].clamp(small).log()]
        return [each.float() for each in means]
    return []


def aim_of_loss(module: nn.Module, kind: str | None, targets: Tensor | None, output_size: int | None) -> dict[str, Any]:
    """Return what the loss of a task aims at, and leave the task as it was; `{}` for another module."""
    if not isinstance(module, Task):
        return {}
    with undisturbed(module):
        return of_loss(module, kind, targets, output_size)


def of_loss(task: Task, kind: str | None, targets: Tensor | None, size: int | None) -> dict[str, Any]:
    """Return what the loss of a task aims at, whatever the network is: outputs that are free are fitted to targets.

    `loss_fit` is how right the outputs become if each can be any number: 1 is perfect, 0 a guess. `loss_pairs` is
    whether the loss changes when outputs meet the targets of other samples. `loss_ranks` is the share of classes that
    win when they are the most frequent ones and outputs ignore the inputs, which Bartlett, Jordan and McAuliffe (2006)
    ask of a loss for classes.

    Args:
        task: The task.
        kind: What it predicts.
        targets: Training targets `(N, ...)`.
        size: Outputs of a sample.
    """
    found: dict[str, Any] = {"loss_fit": None, "loss_pairs": None, "loss_ranks": None}
    is_known = kind in ("classification", "binary", "multilabel", "regression")
    if not is_known or targets is None or task.members or len(targets) < 2 or not size:
        return found
    if targets.ndim != (1 if kind == "classification" else 2):
        return found
    rows = torch.linspace(0, len(targets) - 1, min(len(targets), _FREE_SAMPLES)).long()
    targets = targets[rows].to(task.device)
    if kind == "classification" and not (0 <= int(targets.min()) and int(targets.max()) < size):
        return found
    if bool((targets == targets[0]).all()):
        return found
    link = _link(task, targets)
    shape = (len(targets), size) if kind == "classification" else tuple(targets.shape)
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(task.device)
    other = targets.roll(len(targets) // 3 + 1, 0)
    first, moved = (float(_total(task, link(random), each)) for each in (targets, other))
    found["loss_pairs"] = abs(first - moved) > 1e-6 * max(abs(first), 1e-6)
    fitted = _fit(task, link, random, targets)
    found["loss_fit"] = None if fitted is None else _right(task, kind, fitted, targets)
    if kind == "classification" and getattr(task.loss, "weight", None) is None and size <= _MOST_CLASSES:
        found["loss_ranks"] = _ranks(task, link, size)
    return found


def meets_own_targets(task: Task, outputs: Tensor, targets: Tensor) -> bool | None:
    """Return whether the loss changes when outputs `(B, ...)` meet the targets of other samples.

    None if the loss does not depend on the targets, as that of an autoencoder, or if all targets or outputs are alike.
    """
    outputs = outputs.detach()
    if float((outputs - outputs[:1]).abs().max()) <= 0.01 * float(outputs.abs().max()):
        return None
    same, moved = targets[:1].expand_as(targets), targets.roll(len(targets) // 3 + 1, 0)
    with torch.no_grad():
        first, with_same, with_moved = (float(_total(task, outputs, each)) for each in (targets, same, moved))
    least = 1e-5 * max(abs(first), 1e-5)
    return None if abs(first - with_same) <= least else abs(first - with_moved) > least


def _link(task: Task, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes outputs, as the loss expects them, of any numbers."""
    if task.outputs_are == "probabilities":
        return torch.sigmoid
    if task.outputs_are == "log_probabilities":
        return lambda free: free.log_softmax(1)
    if task.outputs_are == "rates":
        return functional.softplus
    if task.outputs_are == "raw":
        mean, spread = targets.float().mean(), targets.float().std()
        return lambda free: mean + spread * free
    return lambda free: free


def _total(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    loss: Any = task.compute_loss(outputs, targets)
    return loss if isinstance(loss, Tensor) else sum(loss.values())


def _fit(task: Task, link: Callable[[Tensor], Tensor], start: Tensor, targets: Tensor) -> Tensor | None:
    """Return the outputs that minimise the loss; None if it does not depend on them."""
    free = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=_FREE_RATE)
    with torch.enable_grad():
        for step in range(_FREE_STEPS):
            optimizer.param_groups[0]["lr"] = _FREE_RATE * (1 - step / _FREE_STEPS)
            outputs = link(free).expand(len(targets), *free.shape[1:])
            loss = _total(task, outputs, targets)
            if not loss.requires_grad:
                return None
            (free.grad,) = torch.autograd.grad(loss, free)
            optimizer.step()
    return link(free.detach())


def _right(task: Task, kind: str | None, outputs: Tensor, targets: Tensor) -> float | None:
    seen = task.metric_inputs(outputs, targets)
    if seen is None:
        return None
    predictions, wanted = seen
    if kind == "regression":
        return float(r2(predictions, wanted))
    if kind == "classification":
        guess = float(targets.bincount().max() / len(targets))
        return (float((predictions.argmax(1) == wanted).float().mean()) - guess) / (1 - guess)
    ones = (wanted > 0).float().mean(0)
    guess = float(torch.maximum(ones, 1 - ones).mean())
    threshold = 0.5 if task.outputs_are == "probabilities" else 0
    right = float(((predictions > threshold) == (wanted > 0)).float().mean())
    return (right - guess) / (1 - guess) if guess < 1 else None


def _ranks(task: Task, link: Callable[[Tensor], Tensor], classes: int) -> float:
    """Return the share of the first and the last class that win when 40 % of the targets are theirs."""
    each = 3 if classes <= 10 else 1
    many = round(each * (classes - 1) * (2 / 3 if classes > 2 else 2))
    tried = sorted({0, classes - 1})
    won = 0
    for winner in tried:
        counts = torch.full((classes,), each)
        counts[winner] = many
        targets = torch.arange(classes).repeat_interleave(counts).to(task.device)
        fitted = _fit(task, link, torch.zeros(1, classes, device=task.device), targets)
        if fitted is not None:
            first, second = fitted[0].topk(2).values.tolist()
            won += int(fitted[0].argmax()) == winner and first - second > 0.02
    return won / len(tried)


def of_first_loss(loss: Tensor, outputs: Tensor, targets: Tensor, every: Tensor) -> dict[str, Any]:
    """Return which loss of torch has the value of the first loss, its best constant, and what its gradient raises.

    `raises_right_output` is the share of samples for which a small step against the gradient raises the output of the
    right class most.

    Args:
        loss: `()`.
        outputs: `(B, C)` or `(B, K)`, part of the graph of the loss.
        targets: Class indices `(B,)`, or numbers `(B, K)`.
        every: All training targets, or those of the batch.

    >>> outputs, targets = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, 1, 0])
    >>> found = of_first_loss(nn.functional.cross_entropy(outputs, targets), outputs, targets, targets)
    >>> found["loss_is"], round(found["chance_loss"], 3), found["raises_right_output"]
    ('cross_entropy', 0.693, 1.0)
    """
    found: dict[str, Any] = {"loss_is": None, "chance_loss": None, "raises_right_output": None}
    is_class = targets.ndim == 1 and not targets.is_floating_point() and outputs.ndim == 2 and outputs.shape[1] > 1
    if len(targets) != len(outputs) or (not is_class and outputs.shape != targets.shape):
        return found
    targets, every = (each.long() if is_class else each.float() for each in (targets, every))
    if is_class and not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]:
        return found
    with torch.no_grad():
        values, is_binary = outputs.detach().float(), bool(((targets == 0) | (targets == 1)).all())
        for name, known in _KNOWN.items():
            fits = is_class if name == "cross_entropy" else not is_class and (is_binary or "binary" not in name)
            if fits and torch.isclose(known(values, targets), loss.detach().float(), rtol=1e-3):
                found["loss_is"] = name
                mean = every.float().mean(0)
                best = every.bincount() / len(every) if is_class else mean
                if name == "binary_cross_entropy_with_logits":
                    best = mean.clamp(1e-6, 1 - 1e-6).logit()
                elif name == "l1_loss":
                    best = every.median(0).values
                constant = best.clamp(1e-9).log() if is_class else best
                found["chance_loss"] = float(known(constant.expand(len(every), *constant.shape), every))
                break
    if is_class:
        (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        right = gradient.gather(1, targets[:, None])[:, 0]
        others = gradient.scatter(1, targets[:, None], torch.inf).amin(1)
        found["raises_right_output"] = float((right < others).float().mean())
    else:
        found |= {"target_mean": float(every.mean()), "target_spread": float(every.std(0, correction=0).mean())}
    return found


def of_token_offset(loss: Tensor, outputs: Tensor, tokens: Tensor) -> int | None:
    """Return how many places ahead the token is that the loss wants at each position; None if that is unknown.

    The gradient of a cross-entropy lowers only the output of the target.

    Args:
        loss: `()`.
        outputs: `(B, T, C)`, part of the graph of the loss.
        tokens: The inputs, `(B, T)`. Other inputs have no answer.

    >>> tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    >>> outputs = torch.zeros(4, 16, 50, requires_grad=True)
    >>> of_token_offset(functional.cross_entropy(outputs[:, :-1].transpose(1, 2), tokens[:, 1:]), outputs, tokens)
    1
    """
    if outputs.ndim != 3 or outputs.shape[:2] != tokens.shape or tokens.is_floating_point():
        return None
    (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    least, wanted = gradient.min(-1)
    shares = {}
    for offset in range(-1, 4):
        here = slice(max(-offset, 0), tokens.shape[1] - max(offset, 0))
        there = slice(max(offset, 0), tokens.shape[1] + min(offset, 0))
        counted = least[:, here] < 0
        shares[offset] = float((wanted[:, here] == tokens[:, there])[counted].float().mean()) if counted.any() else 0.0
    best, second = sorted(shares, key=lambda offset: -shares[offset])[:2]
    return best if shares[best] > _SURE and shares[second] < _UNSURE else None


def of_path(loss: Tensor) -> dict[str, Any]:
    """Return the operations from a loss `()` back to the last layer, as autograd names them, and whether it broadcasts.

    It broadcasts if each of `B` outputs is compared with all targets of the batch, not with its own.

    >>> outputs = nn.Linear(3, 4)(torch.randn(8, 3)).softmax(1)
    >>> of_path(nn.functional.cross_entropy(outputs, torch.zeros(8, dtype=torch.long)))
    {'loss_path': ['NllLoss', 'LogSoftmax', 'Softmax'], 'loss_broadcasts': False}
    """
    start: Any = loss.grad_fn
    queue, before = deque([start] if start is not None else []), {start: None}
    end = None
    while queue and end is None and len(before) < _MOST_NODES:
        node = queue.popleft()
        for each, _ in node.next_functions:
            if each is not None and each not in before:
                before[each] = node
                queue.append(each)
                if _operation(each).endswith(_LAYERS):
                    end = each
                    break
    path: list[Any] = []
    node = before[end] if end is not None else None
    while node is not None:
        path.insert(0, node)
        node = before[node]
    if end is None:
        return {"loss_path": None, "loss_broadcasts": None}
    return {"loss_path": [_operation(each) for each in path], "loss_broadcasts": _broadcasts(end, path)}


def _operation(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")  # type: ignore[no-any-return]


def _broadcasts(layer: Any, path: list[Any]) -> bool:
    """Return whether outputs `(B,)` or `(B, 1)` meet targets that need no gradient in a table `(B, B)`."""
    shapes = [tuple(each._input_metadata[0].shape) for each in (*path, layer)]
    size = shapes[-1][0] if shapes[-1] else 0
    if size < 2 or not any(to == (size, size) and of in ((size,), (size, 1)) for to, of in pairwise(shapes)):
        return False
    # Losses over pairs of outputs make such tables on purpose: there, both sides need a gradient.
    joins = [each for each in path if len(each.next_functions) > 1]
    return all(sum(other is not None for other, _ in each.next_functions) == 1 for each in joins)
