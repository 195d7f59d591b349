from functools import partial

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from firstlight.schedules import Constant


def trainer(tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "logger": False, "log_every_n_steps": 1, **options},
    )


def parts(network, loss, lr=0.01, **options):
    """Return what every task is made of, with AdamW at a constant rate."""
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    return {"network": network, "loss": loss, "optimizer": optimizer, "schedule": Constant(), **options}


def loader(inputs, targets, batch_size=8, **options):
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size, **options)


def predicted(task, batches, tmp_path):
    """Return what a task predicts for all batches, by name."""
    found = trainer(tmp_path).predict(task, batches)
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
