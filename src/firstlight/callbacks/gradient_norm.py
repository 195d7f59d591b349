"""Log the norm of the gradient, in total and for each block of the network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from firstlight.callbacks.finite import by_mesh
from firstlight.loggers import LogsSteps, log


class GradientNorm(LogsSteps):
    """Log `grad_norm/total` and `grad_norm/BLOCK` every `log_every_n_steps` optimiser steps, before clipping.

    They are 2-norms of the gradient that the optimiser receives: accumulated over micro-batches, averaged over
    processes, and divided by the scale of a gradient scaler. `blocks` tells what a block is; its name is a number in a
    `Sequential`. Each log waits for the device once. With several optimisers, the names are `grad_norm/INDEX/BLOCK`.

    Args:
        per_block: Whether to log the norm of each block as well as the total.
    """

    def __init__(self, per_block: bool = True) -> None:
        super().__init__()
        self.per_block = per_block
        self._blocks: dict[int, dict[str, list[nn.Parameter]]] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norms if this step is logged."""
        index = trainer.optimizers.index(optimizer)
        if not self.cadence.is_due(trainer, index):
            return
        # Finding the blocks takes longer than their norms, so they are kept until the optimised parameters change.
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = self._blocks.get(index, {})
        if {id(p) for block in found.values() for p in block} != {id(p) for p in optimized}:
            found = self._blocks[index] = by_block(pl_module, optimized)
        values = norms({name: [p.grad for p in block if p.grad is not None] for name, block in found.items()})
        prefix = f"grad_norm/{index}" if len(trainer.optimizers) > 1 else "grad_norm"
        shown = values if self.per_block else {"total": values["total"]}
        log(trainer, {f"{prefix}/{name}": value for name, value in shown.items()})

    def on_fit_end(self, *args: Any, **kwargs: Any) -> None:
        """Release the parameters."""
        self._blocks.clear()

    on_exception = on_fit_end


def by_block(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Return those of `parameters` that belong to each block of a module.

    A parameter that blocks share counts once, in the first of them.
    """
    remaining = {id(parameter) for parameter in parameters}
    found = {}
    for name, block in blocks(module).items():
        found[name] = [p for p in block.parameters() if id(p) in remaining]
        remaining -= {id(p) for p in found[name]}
    return found


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the top-level blocks of a module: its children that have parameters.

    A module with one such child and no parameters of its own is a wrapper: the blocks of that child are returned. A
    module that has parameters of its own is one block.

    >>> list(blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))))
    ['0', '2']
    """
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    has_parameters = next(module.parameters(recurse=False), None) is not None
    if has_parameters or not children:
        return {type(module).__name__: module}
    if len(children) == 1:
        (child,) = children.values()
        return blocks(child)
    return children


def norms(gradients: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Return the 2-norm of each list of gradients, and of all of them as `total`, waiting for the device once.

    Gradients may be sparse, sharded (`DTensor`), on several device meshes, or of half precision, whose norm is
    calculated in float32.
    """
    parts = [(name, part) for name, grads in gradients.items() for part in by_mesh(map(dense, grads))]
    found = [nn.utils.get_total_norm(part) for _, part in parts]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in found]
    read = torch.stack([norm.to(whole[0].device) for norm in whole]).tolist() if whole else []
    blocks = {
        name: math.hypot(*(value for (own, _), value in zip(parts, read, strict=True) if own == name))
        for name, _ in parts
    }
    return {"total": math.hypot(*read), **blocks}


def let_sharded_gradients_clip(trainer: Trainer) -> Trainer:
    """Let a trainer clip the norm of gradients of which only some are DTensors, and return the trainer.

    Lightning 2.6.6 calls a function of torch 2.13 that raises for a mixture. This can go when torch takes both.
    """
    precision: Any = trainer.precision_plugin
    if isinstance(trainer.strategy, ModelParallelStrategy):

        def clip_grad_by_norm(optimizer: Optimizer, clip_val: float) -> None:
            gradients = [p.grad for p in precision.main_params(optimizer) if p.grad is not None]
            factor = clip_val / (norms({"": gradients})["total"] + 1e-6)  # As torch does.
            if factor < 1:
                for gradient in gradients:
                    gradient.mul_(factor)

        precision.clip_grad_by_norm = clip_grad_by_norm
    return trainer


def dense(gradient: Tensor) -> Tensor:
    """Return the entries that a gradient stores; those of half precision as float32."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return values.float() if values.dtype.itemsize == 2 else values


def let_fused_optimisers_clip(trainer: Trainer) -> Trainer:
    """Let a trainer clip gradients in bfloat16 with a fused optimiser, and return the trainer.

    Lightning 2.6.6 refuses this combination, although it is a problem only with a gradient scaler. Remove this when
    Lightning checks for the scaler.
    """
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        precision.clip_gradients = Precision.clip_gradients.__get__(precision)  # type: ignore[method-assign]
    return trainer
