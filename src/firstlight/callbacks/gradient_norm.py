"""The norm of the gradient, in total and for each block of the network."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from firstlight.callbacks.due import log, should_log

__all__ = ["GradientNorm", "blocks", "norms"]


class GradientNorm(Callback):
    """Log `grad_norm/total` and `grad_norm/BLOCK` every `log_every_n_steps` optimiser steps, before clipping.

    The norm is read when all micro-batches are accumulated, all processes are averaged and a gradient scaler is
    divided out; it is the 2-norm. Each logging waits for the device once. With several optimisers, the index of the
    optimiser follows `grad_norm`.

    Args:
        per_block: Whether to log each block beside the total.
    """

    def __init__(self, per_block: bool = True) -> None:
        self.per_block = per_block

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients when a logging is due."""
        if not should_log(trainer):
            return
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients: dict[str, list[Tensor]] = {}
        for name, block in blocks(pl_module).items():
            own = [p for p in block.parameters() if id(p) in optimized]
            optimized -= {id(p) for p in own}  # What blocks share counts once, in the first of them.
            gradients[name] = [p.grad for p in own if p.grad is not None]
        values = norms(gradients)
        many = len(trainer.optimizers) > 1
        prefix = f"grad_norm/{trainer.optimizers.index(optimizer)}" if many else "grad_norm"
        shown = values if self.per_block else {"total": values["total"]}
        log(trainer, {f"{prefix}/{name}": value for name, value in shown.items()})


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
    names = [name for name, grads in gradients.items() if grads]
    if not names:
        return {"total": 0.0}
    read: list[float] = torch.stack([nn.utils.get_total_norm(gradients[name]) for name in names]).tolist()
    return {"total": math.hypot(*read), **dict(zip(names, read, strict=True))}
