"""Log the learning rate."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from firstlight.loggers import LogsSteps, log


class LearningRate(LogsSteps):
    """Log `lr`, the rate of the current step, every `log_every_n_steps` optimiser steps.

    Parameter groups with equal rates, for example with and without weight decay, share one curve. If rates differ,
    each group of each optimiser has a curve of its own: `lr/0`, `lr/1`, ...
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the rates of all optimisers when one of them makes a logged step."""
        if self.cadence.is_due(trainer):
            log(trainer, rates([group["lr"] for each in trainer.optimizers for group in each.param_groups]))


def rates(values: Sequence[float]) -> dict[str, float]:
    """Return the rates of all parameter groups by the names under which they are logged.

    >>> rates([0.1, 0.1]), rates([0.1, 0.2])
    ({'lr': 0.1}, {'lr/0': 0.1, 'lr/1': 0.2})
    """
    if len(set(values)) == 1:
        return {"lr": float(values[0])}
    return {f"lr/{index}": float(rate) for index, rate in enumerate(values)}
