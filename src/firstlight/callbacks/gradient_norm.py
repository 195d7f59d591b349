"""The norm of the gradient, in total and for each block of the network."""

import math
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from firstlight.callbacks.cadence import log, should_log

__all__ = ["GradientNorm", "blocks", "by_block", "norms"]


class GradientNorm(Callback):
    """Log `grad_norm/total` and `grad_norm/BLOCK` every `log_every_n_steps` optimiser steps, before clipping.

    The norm is read when all micro-batches are accumulated, all processes are averaged and a gradient scaler is
    divided out; it is the 2-norm. A block is a child that has parameters, of the task's network or of the module, by
    its name, which is a number in a `Sequential`. Each logging waits for the device once. With several optimisers, the
    index of the optimiser follows `grad_norm`.

    Args:
        per_block: Whether to log each block beside the total.
    """

    def __init__(self, per_block: bool = True) -> None:
        self.per_block = per_block
        self._blocks: dict[int, dict[str, list[nn.Parameter]]] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients when a logging is due."""
        if not should_log(trainer):
            return
        index = trainer.optimizers.index(optimizer)
        # Looked for again only when what is optimised changes: they take longer to find than their norms.
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        known = self._blocks.get(index, {})
        if {id(p) for own in known.values() for p in own} != {id(p) for p in optimized}:
            known = self._blocks[index] = by_block(pl_module, optimized)
        values = norms({name: [p.grad for p in own if p.grad is not None] for name, own in known.items()})
        prefix = f"grad_norm/{index}" if len(trainer.optimizers) > 1 else "grad_norm"
        shown = values if self.per_block else {"total": values["total"]}
        log(trainer, {f"{prefix}/{name}": value for name, value in shown.items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the parameters go."""
        self._blocks.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the parameters go."""
        self._blocks.clear()


def by_block(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Return which of `parameters` belong to each block of a module.

    What blocks share counts once, in the first of them.
    """
    left = {id(parameter) for parameter in parameters}
    found = {}
    for name, block in blocks(module).items():
        found[name] = [p for p in block.parameters() if id(p) in left]
        left -= {id(p) for p in found[name]}
    return found


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the top-level blocks of a module: its children that have parameters.

    A module whose parameters all belong to one child is only a wrapper: its child's blocks are returned. Parameters
    that belong to no child make the module itself one block.

    >>> list(blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))))
    ['0', '2']
    """
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    own = next(module.parameters(recurse=False), None) is not None
    if own or not children:
        return {type(module).__name__: module}
    if len(children) == 1:
        (child,) = children.values()
        return blocks(child)
    return children


def norms(gradients: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Return the 2-norm of each list of gradients, and of all of them as `total`, waiting for the device once."""
    gradients = {name: grads for name, grads in gradients.items() if grads}
    if all(grad.is_cpu and not isinstance(grad, DTensor) for grads in gradients.values() for grad in grads):
        # Nothing waits here, and each by itself takes half the time.
        found = {name: math.hypot(*[_norm(grad).item() for grad in grads]) for name, grads in gradients.items()}
    else:
        each = [nn.utils.get_total_norm(grads) for grads in gradients.values()]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in each]
        read = torch.stack([norm.to(whole[0].device) for norm in whole]).tolist()
        found = dict(zip(gradients, read, strict=True))
    return {"total": math.hypot(*found.values()), **found}


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if values.dtype.itemsize == 2 else None)
    return norm
