"""What the outputs of a network are before the first step: their range, and what they depend on.

Shapes: `B` batch, `N` samples, `K` outputs; `...` the shape of one sample or output.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from firstlight.callbacks.activations import activation_before, layers, main_weight
from firstlight.callbacks.facts.network import network_of, synchronises
from firstlight.callbacks.fixed_sample import undisturbed
from firstlight.tasks import Task

_FEW = 8  # Samples that show whether they are mixed.
_FEW_FOR_HEAD = 16  # Samples that are enough to see what ends a network.
_LARGE = 30.0  # exp(30) is finite in float32, and sigmoid(30) is 1.
_LINEAR = 1e-3
_MOST_SAMPLES = 400  # Samples, so that it takes less than a tenth of a second.
_MOST_OUTPUTS = 1_000


def of_first_outputs(trainer: Trainer, module: LightningModule, inputs: Any) -> dict[str, Any]:
    """Return what a network does with a batch of inputs before training, and leave it as it was."""
    found, network = of_outputs(None), network_of(module)
    if network is None:
        return found
    with undisturbed(module), torch.enable_grad():
        if synchronises(module):  # It would wait for the other processes.
            module.eval()
        with trainer.precision_plugin.forward_context():
            outputs = module(inputs) if isinstance(module, Task) else network(inputs)
        members = isinstance(module, Task) and module.members and isinstance(outputs, Tensor) and network.training
        found = of_outputs(outputs.mean(1) if members else outputs)
        module.eval()
        found["evaluation_draws"] = draws(network, inputs)
        error = affine_error(network, inputs)
        found |= of_head(network, inputs)
        found |= {"mixes_samples": None, "depends_on_order": None, "sees_future": None}
        if isinstance(inputs, Tensor):
            called = module if isinstance(module, Task) else network
            found["sees_future"] = seen_future(called, inputs[:_FEW])
            with suppress(ValueError):
                shares = mixed_samples(called, inputs[:_FEW], reorders=True)
                found["mixes_samples"], found["depends_on_order"] = shares
    return {**found, "affine_error": error}


@torch.no_grad()
def draws(network: nn.Module, inputs: Any) -> bool | None:
    """Return whether two passes of inputs `(B, ...)` give different outputs; None if these are no tensors.

    >>> draws(nn.Dropout(), torch.ones(64)), draws(nn.Dropout().eval(), torch.ones(64))
    (True, False)
    """
    first, again = network(inputs), network(inputs)
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.shape != again.shape:
        return None
    return float((first - again).abs().max()) > _LINEAR * float(first.abs().max())


def of_outputs(outputs: Any) -> dict[str, Any]:
    """Return what outputs `(B, ...)` with their gradient function look like before training.

    >>> of_outputs(torch.ones(2, 3, requires_grad=True).softmax(1))["outputs_look_like"]
    'constant'
    >>> of_outputs(torch.arange(6.0, requires_grad=True).view(3, 2).softmax(1).flip(0))["last_activation"]
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim < 2 or not outputs.numel():
        unknown = ("initial_output_std", "outputs_look_like", "last_activation", "outputs_follow_one")
        return dict.fromkeys(unknown)
    values = outputs.detach().double()
    return {
        "initial_output_std": float(values.std(0, correction=0).mean()),
        "outputs_look_like": look(values),
        "last_activation": activation_before(outputs)[0] or None,
        "output_size": outputs.shape[-1],
        "outputs_follow_one": follow_one(values.flatten(0, -2)),
    }


def follow_one(outputs: Tensor) -> bool | None:
    """Return whether all columns of `(N, K)` rise and fall with one of them; None if there are too few, or no change.

    >>> outputs = torch.arange(6.0).view(6, 1)
    >>> follow_one(outputs * torch.tensor([1.0, 2.0]) + 3), follow_one(torch.cat([outputs, outputs**2], 1))
    (True, False)
    """
    values = outputs[:_MOST_SAMPLES].detach().double()
    if values.shape[1] < 2 or len(values) < 3 or values.shape[1] > _MOST_OUTPUTS or not values.isfinite().all():
        return None
    sizes = torch.linalg.svdvals(values - values.mean(0))
    # Rounding of float32, relative to the outputs, is no change.
    return None if sizes[0] <= 1e-5 * values.norm() else bool(sizes[1] <= 1e-5 * sizes[0])


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
        network(inputs[:_FEW_FOR_HEAD])
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
            outputs = network(inputs[:_FEW_FOR_HEAD])
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
    every = torch.cat([*found.values()])
    seen = look(every)
    # One side hardly moves, and the other one goes as far as its input.
    if seen == "logits" and every.min() >= -1 and every.max() > _LARGE / 3:
        seen = "at least -1"  # As those of GELU, SiLU and ELU.
    elif seen == "logits" and every.max() <= 1 and every.min() < -_LARGE / 3:
        seen = "at most 1"  # As those of LogSigmoid.
    return {"head": seen}


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
    >>> seen_future(lambda tokens: nn.functional.one_hot(tokens, 8).float().cumsum(1), tokens)
    0.0
    >>> seen_future(lambda tokens: nn.functional.one_hot(tokens, 8).float().flip(1).cumsum(1), tokens)
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


@torch.no_grad()
def affine_error(network: nn.Module, inputs: Any) -> float | None:
    """Return how far a network is from an affine function of inputs `(B, ...)`, relative to its outputs.

    It is the norm of `f(a) + f(b) - f(a + b) - f(0)`, divided by that of `f(a) - f(0)`: about 0 for an affine one.

    >>> affine_error(nn.Linear(3, 2), torch.randn(8, 3)) < 1e-5, affine_error(nn.Tanh(), torch.randn(8, 3)) > 0.1
    (True, True)
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or len(inputs) < 2:
        return None
    half = len(inputs) // 2
    one, other = inputs[:half], inputs[half : 2 * half]
    outputs = [network(each) for each in (one, other, one + other, torch.zeros_like(one))]
    if not all(isinstance(each, Tensor) and each.dtype in (torch.float32, torch.float64) for each in outputs):
        return None  # Half precision rounds too much.
    first, second, both, zero = (each.double() for each in outputs)
    size = float((first - zero).norm())
    return float((first + second - both - zero).norm()) / size if size > 0 else None
