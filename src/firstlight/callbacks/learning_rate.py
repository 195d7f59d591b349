"""The learning rate, once."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from firstlight.callbacks.cadence import log, should_log

__all__ = ["LearningRate", "rates"]


class LearningRate(Callback):
    """Log `lr`, the rate of the step under way, every `log_every_n_steps` optimiser steps.

    Groups with one rate, such as those with and without weight decay, are one curve. Where they differ, or there are
    several optimisers, each has its own: `lr/0`, `lr/1`, ...
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the rates of all optimisers when the first of them steps and a logging is due."""
        if should_log(trainer) and optimizer is trainer.optimizers[0]:
            log(trainer, rates([group["lr"] for each in trainer.optimizers for group in each.param_groups]))


def rates(found: Sequence[float]) -> dict[str, float]:
    """Name the rates of all parameter groups.

    >>> rates([0.1, 0.1]), rates([0.1, 0.2])
    ({'lr': 0.1}, {'lr/0': 0.1, 'lr/1': 0.2})
    """
    if len(set(found)) == 1:
        return {"lr": float(found[0])}
    return {f"lr/{index}": float(rate) for index, rate in enumerate(found)}
