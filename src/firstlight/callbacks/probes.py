"""What is asked once, before the first step: what ends the network, what its loss aims at, what the data can tell.

Shapes: `B` batch, `N` samples, `C` classes, `K` outputs; `...` the shape of one sample, output or target.
"""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from firstlight.callbacks.activations import layers, main_weight
from firstlight.metrics.whole_split import r2
from firstlight.tasks import Task

_FEW = 16  # Samples that are enough to see what ends a network.
_LARGE = 30.0  # exp(30) is finite in float32, and sigmoid(30) is 1.
_LINEAR = 1e-3

_LAYERS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Embedding", "NativeLayerNorm", "NativeBatchNorm")
"""Operations, as autograd names them, at which the path from the loss ends. `Cudnn...BatchNorm` is one, too."""
_MOST_NODES = 500

_FREE_SAMPLES, _FREE_STEPS, _FREE_RATE = 64, 60, 0.3
_MOST_CLASSES = 100

_HASHED, _ORDERS = 512, 39
_SURE, _UNSURE = 0.9, 0.7
_PENALTIES = (0.01, 0.1, 1.0, 10.0)


@torch.no_grad()
def of_head(network: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return whether the outputs of a network are linear in those of its last layer, and the range that they keep.

    Random numbers of several sizes take the place of the outputs of the last layer, so any function is recognised.

    >>> inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    >>> of_head(nn.Linear(3, 2), inputs), of_head(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), inputs)["head"]
    ({'head': 'linear'}, 'in [0, 1]')
    """
    unknown = {"head": None}
    if not isinstance(inputs, Tensor) or len(inputs) < 2:
        return unknown
    called: list[nn.Module] = []
    matrices = [
        layer
        for layer in layers(network, 10_000).values()
        if (weight := main_weight(layer)) is not None and weight.ndim > 1 and not isinstance(layer, nn.Embedding)
    ]
    if isinstance(network, nn.Linear):
        matrices = [network]
    handles = [layer.register_forward_hook(lambda layer, _, out: called.append(layer)) for layer in matrices]
    try:
        network(inputs[:_FEW])
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        return unknown
    factor = 0.0

    def replaced(layer: nn.Module, _: Any, outputs: Tensor) -> Tensor:
        random = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
        return random * (factor / random.abs().max())

    found: dict[float, Tensor] = {}
    handle = called[-1].register_forward_hook(replaced)
    try:
        for factor in (0.0, 1.0, -1.0, _LARGE, -_LARGE):
            outputs = network(inputs[:_FEW])
            if not isinstance(outputs, Tensor) or outputs.dtype not in (torch.float32, torch.float64):
                return unknown
            found[factor] = outputs.double().reshape(len(outputs), -1, outputs.shape[-1] if outputs.ndim > 1 else 1)
    finally:
        handle.remove()
    zero = found.pop(0.0)
    changes = {each: outputs - zero for each, outputs in found.items()}
    size = float(changes[1.0].norm())
    if not size > 0:
        return unknown
    is_odd = float((changes[1.0] + changes[-1.0]).norm()) < _LINEAR * size
    if is_odd and float((changes[_LARGE] - _LARGE * changes[1.0]).norm()) < _LINEAR * _LARGE * size:
        return {"head": "linear"}
    return {"head": look(torch.cat([*found.values()]))}


def look(values: Tensor) -> str:
    """Return the range of outputs `(..., K)`."""
    if not values.isfinite().all():
        return "not finite"
    if len(values) > 1 and float((values - values[:1]).abs().max()) <= 1e-6 * float(values.abs().max()):
        return "constant"
    # A small number is often added, so that a logarithm is finite.
    if values.shape[-1] > 1 and values.min() >= 0 and ((values.sum(-1) - 1).abs() < 1e-3).all():
        return "probabilities"
    if values.shape[-1] > 1 and values.max() <= 1e-3 and (values.logsumexp(-1).abs() < 1e-3).all():
        return "log-probabilities"
    if values.min() >= 0 and values.max() <= 1 + 1e-3:
        return "in [0, 1]"
    if values.min() >= 0:
        return "non-negative"
    return "in [-1, 1]" if values.abs().max() <= 1 else "logits"


@torch.no_grad()
def mixed_samples(network: Callable[[Tensor], Tensor], inputs: Tensor, reorders: bool = False) -> tuple[float, float]:
    """Return how much outputs change when another sample is replaced, and when the samples come in reverse order.

    Each is the largest change, divided by the largest output. The network must draw the same numbers at each call.
    Outputs are compared and not losses, because a pairwise loss depends on other samples by design.

    Args:
        network: Returns outputs `(B, ...)`.
        inputs: `(B, ...)`.
        reorders: Whether to try the reverse order, else 0 is returned for it. The network must draw no numbers then.

    Raises:
        ValueError: If it cannot be told.
    """
    other = next((sample for sample in inputs if not torch.equal(sample, inputs[0])), None)
    if other is None:
        raise ValueError("the batch has no two different samples")
    replaced = torch.cat([other[None], inputs[1:]])
    first, again, after = (network(given) for given in (inputs, inputs, replaced))
    if not torch.equal(first, again):
        raise ValueError("the network gives different outputs with the same seed")
    if len(first) != len(inputs):
        raise ValueError(f"the network gives {len(first)} outputs for {len(inputs)} samples")
    scale = first[1:].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    replaced_share = float((after[1:] - first[1:]).abs().max() / scale)
    if not reorders:
        return replaced_share, 0.0
    return replaced_share, float((network(inputs.flip(0)).flip(0) - first).abs().max() / scale)


@torch.no_grad()
def seen_future(network: Callable[[Tensor], Any], tokens: Tensor) -> float | None:
    """Return how much the outputs of earlier tokens change when later tokens do, divided by the largest output.

    The later half of each sequence is exchanged with that of another one.

    Args:
        network: Returns outputs `(B, T, C)`, the same at each call.
        tokens: `(B, T)`.

    Returns:
        None if the network has other inputs or outputs, or draws random numbers.

    >>> tokens = torch.arange(8).view(2, 4)
    >>> seen_future(lambda tokens: functional.one_hot(tokens, 8).float().cumsum(1), tokens)
    0.0
    >>> seen_future(lambda tokens: functional.one_hot(tokens, 8).float().flip(1).cumsum(1), tokens)
    1.0
    """
    if tokens.is_floating_point() or tokens.ndim != 2 or len(tokens) < 2:
        return None
    half = tokens.shape[1] // 2
    other = torch.cat([tokens[:, :half], tokens.roll(1, 0)[:, half:]], 1)
    if not half or torch.equal(tokens, other):
        return None
    first, again, after = (network(given) for given in (tokens, tokens, other))
    if not isinstance(first, Tensor) or first.shape[:-1] != tokens.shape or not torch.equal(first, again):
        return None
    scale = first.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((after[:, :half] - first[:, :half]).abs().max() / scale)


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


_KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
    "mse_loss": functional.mse_loss,
    "l1_loss": functional.l1_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
}


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


@torch.no_grad()
def of_relation(inputs: Tensor, targets: Tensor) -> dict[str, float] | None:
    """Return how well a simple method predicts targets from inputs, each sample from the others, and if by chance.

    The method is ridge regression with a kernel, Gaussian for numbers and linear for counts of tokens. Its R² for
    samples left out is exact without fitting again. It is compared with that of targets in random orders.

    Args:
        inputs: `(N, ...)` as the network takes them: numbers, or tokens `(N, T)`.
        targets: Class indices `(N,)`, or numbers `(N, K)`.

    Returns:
        `r2`; `p_value`, the share of random orders that are as good; `samples`. None if there are too few samples.
    """
    is_class = targets.ndim == 1 and not targets.is_floating_point()
    wanted = functional.one_hot(targets.long()).double() if is_class else targets.double()
    wanted = wanted[:, None] if wanted.ndim == 1 else wanted
    wanted = wanted[:, wanted.std(0) > 0]
    if len(targets) < 30 or wanted.ndim > 2 or not 0 < wanted.shape[1] <= _MOST_CLASSES:
        return None
    wanted = wanted - wanted.mean(0) if is_class else (wanted - wanted.mean(0)) / wanted.std(0)
    kernel = _kernel(inputs)
    values, vectors = torch.linalg.eigh(kernel)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(wanted), generator=generator) for _ in range(_ORDERS)]
    every = torch.stack([wanted, *(wanted[order] for order in orders)], 1)
    best = torch.full((len(orders) + 1,), -torch.inf, dtype=torch.float64)
    for penalty in _PENALTIES:
        smoother = (vectors * (values / (values + penalty))) @ vectors.T
        errors = every - (smoother @ every.flatten(1)).view_as(every)
        errors /= (1 - smoother.diagonal())[:, None, None]
        best = torch.maximum(best, 1 - errors.square().sum((0, 2)) / wanted.square().sum())
    return {
        "r2": float(best[0]),
        "p_value": float((best >= best[0]).double().mean()),
        "samples": len(wanted),
    }


def _kernel(inputs: Tensor) -> Tensor:
    """Return the kernel `(N, N)` of samples, 1 on its diagonal.

    It is not centred: the mean of the others would tell the target that was left out.
    """
    if not inputs.is_floating_point():
        tokens = inputs.flatten(1).long()
        pairs = (tokens[:, 1:] * 31 + tokens[:, :-1] * 1009 + 7) % _HASHED
        counts = torch.zeros(len(tokens), 2 * _HASHED, dtype=torch.float64)
        counts.scatter_add_(1, tokens % _HASHED, torch.ones_like(tokens, dtype=torch.float64))
        counts.scatter_add_(1, _HASHED + pairs, torch.ones_like(pairs, dtype=torch.float64))
        features = functional.normalize(counts.sqrt(), dim=1)
        return features @ features.T
    features = inputs.flatten(1).double().nan_to_num()
    if inputs.ndim == 2:  # Columns have units of their own; pixels have one.
        features = (features - features.mean(0)) / features.std(0).clamp(1e-12)
    distances = torch.cdist(features, features).square()
    return torch.exp(-distances / distances[distances > 0].median().clamp(1e-12))
