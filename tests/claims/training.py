"""Helpers of the claims tests: data, a hand-written training loop, and a run of a task."""

import math
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from firstlight.data import Digits
from firstlight.schedules import Cosine
from firstlight.tasks import Classification

UNIFORM_LOSS = math.log(10)
"""Cross-entropy of equal probabilities for all ten digits."""

SMALL = {"val_fraction": 0.5, "test_fraction": 0.45}
"""Options of `Digits` that leave 90 training digits and 898 validation digits."""


def samples(data, split):
    """Return inputs and targets of a split as the network gets them."""
    data.setup()
    dataset = data.dataset(split)
    return data.prepare_batch(dataset.inputs), dataset.targets.long()


def descend(network, optimizer, schedule, seed, steps=150):
    """Train on random batches of 64 digits and return the final loss on the training split."""
    torch.manual_seed(seed)
    inputs, targets = samples(Digits(), "train")
    net = network()
    optimizer = optimizer(net.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        indices = torch.randint(len(inputs), (64,))
        cross_entropy(net(inputs[indices]), targets[indices]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return cross_entropy(net.eval()(inputs), targets).item()


def fit(network, data, seed, epochs=100, lr=3e-3, weight_decay=0.0, schedule=None, callbacks=(), **options):
    """Train a task on the digits and return it."""
    torch.manual_seed(seed)
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    task = Classification(network(), nn.CrossEntropyLoss(), optimizer, schedule or Cosine(), classes=10, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=None if callbacks else 0,
        callbacks=list(callbacks),
    )
    trainer.fit(task, data)
    return task


@torch.no_grad()
def loss(task, data, split):
    """Return the mean cross-entropy over a split, without dropout and augmentation."""
    inputs, targets = samples(data, split)
    return cross_entropy(task.eval()(inputs), targets).item()
