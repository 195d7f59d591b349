"""What tasks learn from the training targets before the first step: all of them in one tensor.

Shapes: `N` training samples; `...` the shape of one target.
"""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from firstlight.errors import UsageError

__all__ = ["training_targets"]


def training_targets(trainer: Trainer, purpose: str) -> Tensor:
    """Return the targets `(N, ...)` of the training data set, each once and in its order, on the CPU.

    Every process reads the whole data set, so they need not communicate.

    Args:
        trainer: Of a fit; it builds its training loader now, if it has none yet.
        purpose: What the targets are needed for, for the message.

    Raises:
        UsageError: If the data set cannot be read twice.
    """
    trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise UsageError(
            f"{purpose} needs all training targets, but {type(loader).__name__} cannot be read twice: use a "
            "DataLoader of a data set with a length"
        )
    # A loader with a batch sampler has no batch size.
    batches = DataLoader(loader.dataset, batch_size=loader.batch_size or 1024, collate_fn=loader.collate_fn)
    with isolate_rng():
        return torch.cat([targets for _, targets in batches]).cpu()
