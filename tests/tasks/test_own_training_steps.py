"""Gradients of a task whose `training_step` or stream of samples is the user's, compared with a plain loop."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from firstlight.cli.parser import CLI
from firstlight.fast_loop import fast_loop
from firstlight.preflight.rate_sweep import run_sweep
from firstlight.tasks import Classification, Task
from tests.helpers import CONFIG, Ranks
from tests.tasks.helpers import loader, parts, trainer

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(23, 4, generator=GENERATOR)
LABELS = torch.randint(0, 3, (23,), generator=GENERATOR)
NUMBERS = torch.randn(23, 2, generator=GENERATOR)
SGD = partial(torch.optim.SGD, lr=0.5)


class Squares(Task):
    """Computes everything itself."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self(inputs) - targets).square().mean()


class Sometimes(Task):
    """Leaves each second batch to the task."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else Squares.training_step(self, batch, 0)


class Mixup(Classification):
    """Passes other targets on than the batch has."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        mixed, outputs = targets.flip(0), self((inputs + inputs.flip(0)) / 2)
        return (self.compute_loss(outputs, targets) + self.compute_loss(outputs, mixed)) / 2


class Dicts(Task):
    """Takes batches that are no pair."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return {"a": [batch[0]], "b": batch[1]} if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        return (self(batch["a"][0]) - batch["b"]).square().mean()


TASKS = {kind.__name__: kind for kind in (Squares, Sometimes, Mixup, Dicts)}


def made(name):
    torch.manual_seed(0)
    if name == "Mixup":
        return Mixup(**parts(nn.Linear(4, 3), nn.CrossEntropyLoss()) | {"optimizer": SGD}, classes=3), LABELS
    return TASKS[name](**parts(nn.Linear(4, 2), nn.MSELoss()) | {"optimizer": SGD}), NUMBERS


def by_hand(name, steps):
    """Return the weights after steps, each of several batches, along the mean over the samples of the step."""
    task, targets = made(name)
    network = copy.deepcopy(task.network)
    for batches in steps:
        losses = []
        for rows in batches:
            if name == "Mixup":
                outputs = network((INPUTS[rows] + INPUTS[rows].flip(0)) / 2)
                flipped = cross_entropy(outputs, targets[rows].flip(0), reduction="none")
                losses.append((cross_entropy(outputs, targets[rows], reduction="none") + flipped) / 2)
            else:
                losses.append((network(INPUTS[rows]) - targets[rows]).square().mean(1))
        for parameter in network.parameters():
            (parameter.grad,) = torch.autograd.grad(torch.cat(losses).mean(), parameter, retain_graph=True)
        for parameter in network.parameters():
            parameter.data -= 0.5 * parameter.grad
    return [each.detach() for each in network.parameters()]


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_accumulated_batches_weigh_as_many_samples_as_they_have(name, is_fast, tmp_path):
    task, targets = made(name)
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    batches = loader(INPUTS, targets, 5)
    if is_fast:
        with fast_loop(run):
            run.fit(task, batches, batches)
    else:
        run.fit(task, batches, batches)
    batches = torch.arange(23).split(5)
    expected = by_hand(name, [batches[:2], batches[2:4], batches[4:]])
    for found, right in zip(task.network.parameters(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_a_weight_is_not_that_of_the_batch_before(tmp_path):
    """A longer batch, which the task weighs, comes before shorter ones, which it does not."""

    class First(Squares):
        def training_step(self, batch, batch_idx):
            return Task.training_step(self, batch, batch_idx) if not batch_idx else super().training_step(batch, 0)

    task, _ = made("Squares")
    task = First(**parts(task.network, nn.MSELoss()) | {"optimizer": SGD})
    expected = by_hand("Squares", [[torch.arange(12), torch.arange(12, 15)]])
    batches = [(INPUTS[:12], NUMBERS[:12]), (INPUTS[12:15], NUMBERS[12:15])]
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, limit_val_batches=0)
    run.fit(task, DataLoader(batches, batch_size=None), loader(INPUTS, NUMBERS))
    for found, right in zip(task.network.parameters(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


ROWS = [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18], [4, 5, 6, 7, 12, 13, 14, 15, 19, 20]]
"""The rows of each process. Batches of 4 rows of each are rows in order, and the last batches are uneven."""


def fitted(name, window):
    task, targets = made(name)
    run = trainer(
        ".", max_epochs=1, devices=2, strategy="ddp", accumulate_grad_batches=window, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    rows = ROWS[int(os.environ["LOCAL_RANK"])]
    run.fit(task, loader(INPUTS, targets, 4, sampler=rows), loader(INPUTS, targets))
    if not run.global_rank:
        Path(f"{name}-{window}").write_text(json.dumps([each.tolist() for each in task.network.parameters()]))


def all_fitted():
    for name in ("Squares", "Sometimes"):
        for window in (1, 2):
            fitted(name, window)


def test_two_processes_weigh_the_batches_of_an_own_step_by_samples(tmp_path):
    Ranks(all_fitted, cwd=tmp_path, ranks=2).succeed()
    batches = torch.arange(21).split(8)
    for window, steps in ((1, [[each] for each in batches]), (2, [batches[:2], batches[2:]])):
        expected = by_hand("Squares", steps)
        for name in ("Squares", "Sometimes"):
            found = json.loads((tmp_path / f"{name}-{window}").read_text())
            for mine, right in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.tensor(mine), right, rtol=1e-5, atol=1e-6)


PARTS = {(0, 0): [0], (0, 1): [1, 2, 3, 4], (1, 0): [5, 6, 7, 8], (1, 1): [9, 10, 11, 12]}
"""The rows of each worker of each process. The only batch of the first worker is short, and not the last one."""


class Stream(IterableDataset):
    def __iter__(self):
        rows = PARTS[int(os.environ["LOCAL_RANK"]), get_worker_info().id]
        return zip(INPUTS[rows], NUMBERS[rows], strict=True)


class OwnLoss(nn.Module):
    def forward(self, outputs, targets):
        return (outputs - targets).square().mean()


def streamed():
    task = Task(**parts(made("Squares")[0].network, OwnLoss()) | {"optimizer": SGD})
    run = trainer(".", max_epochs=1, devices=2, strategy="ddp", limit_val_batches=0)
    run.fit(task, DataLoader(Stream(), batch_size=4, num_workers=2), loader(INPUTS, NUMBERS))
    Path(str(run.global_rank)).write_text(json.dumps([each.tolist() for each in task.network.parameters()]))


def test_two_processes_weigh_the_short_batches_of_each_worker(tmp_path):
    Ranks(streamed, cwd=tmp_path, ranks=2).succeed()
    expected = by_hand("Squares", [[PARTS[0, 0] + PARTS[1, 0]], [PARTS[0, 1] + PARTS[1, 1]]])
    for rank in "01":
        for mine, right in zip(json.loads((tmp_path / rank).read_text()), expected, strict=True):
            torch.testing.assert_close(torch.tensor(mine), right, rtol=1e-5, atol=1e-6)


class OwnStep(Classification):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


def test_the_range_test_takes_a_step_of_the_user():
    name = f"{__name__}.OwnStep"
    options = ["--config", CONFIG, "--model", name, "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=1"]
    losses = run_sweep(CLI("fit", options).experiment, fast_loop, [1e-6] * 4, lambda _: False, 0).sweep.losses
    assert losses == pytest.approx([2.3] * 4, rel=0.1)  # log(10)
