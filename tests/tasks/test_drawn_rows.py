"""Statistics of training targets are those of the rows that can be drawn, and of no others."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from firstlight.errors import UsageError
from firstlight.tasks import Classification, Regression
from tests.helpers import Ranks
from tests.tasks.helpers import loader, parts, trainer

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 3, generator=GENERATOR)
NUMBERS = torch.randn(40, 1, generator=GENERATOR)
NUMBERS[20:] += 1000  # Never drawn.
DATA = TensorDataset(INPUTS, NUMBERS)


class Half(Sampler):
    """Draws the first 20 rows, in a random order."""

    def __init__(self, generator=None):
        self.generator = generator

    def __iter__(self):
        return iter(torch.randperm(20, generator=self.generator).tolist())

    def __len__(self):
        return 20


class HalfOfProcess(Half):
    """Draws every second of them."""

    def __iter__(self):
        return iter(range(int(os.environ.get("LOCAL_RANK", 0)), 20, int(os.environ.get("WORLD_SIZE", 1))))

    def __len__(self):
        return 20 // int(os.environ.get("WORLD_SIZE", 1))


class Pairs(Half):
    """Draws batches."""

    def __iter__(self):
        return iter(torch.randperm(20).view(10, 2).tolist())

    def __len__(self):
        return 10


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield from range(20)


class OfIterator(Half):
    def __init__(self):
        self.rows = (row for row in range(20))


SHOWN = torch.arange(40) < 20
LOADERS = {
    "sampler": lambda: DataLoader(DATA, batch_size=4, sampler=Half()),
    "own generator": lambda: DataLoader(DATA, batch_size=4, sampler=Half(torch.Generator().manual_seed(1))),
    "list": lambda: DataLoader(DATA, batch_size=4, sampler=list(range(20))),
    "weights": lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(SHOWN.double(), 20)),
    "rows of others": lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(range(20))),
    "batches": lambda: DataLoader(DATA, batch_sampler=Pairs()),
    "batches of a sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(Half(), 4, False)),
    "lists": lambda: DataLoader(DATA, batch_size=None, sampler=BatchSampler(Half(), 4, False)),
    "whole batches": lambda: DataLoader([DATA[:8], DATA[8:20]], batch_size=None, shuffle=True),
}


def task():
    torch.manual_seed(0)
    return Regression(**parts(nn.Linear(3, 1), nn.MSELoss()))


def fitted(batches, cwd, **options):
    found = task()
    run = trainer(cwd, max_epochs=1, limit_train_batches=1, limit_val_batches=0, **options)
    run.fit(found, batches, loader(INPUTS, NUMBERS))
    return [found.target_mean.item(), found.target_std.item()]


def expected():
    rows = NUMBERS[:20].double()
    return pytest.approx([rows.mean().item(), rows.std(correction=0).item()], rel=1e-12)


@pytest.mark.parametrize("name", LOADERS)
def test_statistics_are_those_of_the_rows_that_are_drawn(name, tmp_path):
    assert fitted(LOADERS[name](), tmp_path) == expected()


def test_class_weights_balance_the_rows_that_are_drawn(tmp_path):
    labels = (INPUTS[:, 0] > 0).long().where(SHOWN, 0)
    kind = Classification(**parts(nn.Linear(3, 2), nn.CrossEntropyLoss()), classes=2, class_weights="balanced")
    batches = loader(INPUTS, labels, 4, sampler=Half())
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(kind, batches, batches)
    counts = labels[:20].bincount().double()
    torch.testing.assert_close(kind.loss.weight.double(), 10 / counts, rtol=1e-6, atol=0)


def test_reading_the_rows_leaves_random_states_as_they_are(tmp_path):
    generator = torch.Generator().manual_seed(1)
    expected_order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    seen = []

    class Seeing(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(batch[1])

    made = Seeing(**parts(nn.Linear(3, 1), nn.MSELoss()))
    batches = loader(INPUTS, NUMBERS, 4, sampler=Half(generator))
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(made, batches, batches)
    assert torch.equal(torch.cat(seen), NUMBERS[expected_order])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Endless(), r"the rows that Endless draws, but these cannot be read ahead \(it has no length, and never ends"),
        (OfIterator(), r"the rows that OfIterator draws, but these cannot be read ahead \(cannot pickle 'generator'"),
    ],
)
def test_a_sampler_whose_rows_cannot_be_known_is_refused(sampler, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        fitted(DataLoader(DATA, batch_size=4, sampler=sampler), tmp_path)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(*DATA[:8], 1)], r"a batch is a list of \(8, 3\) float32, \(8, 1\) float32, a int: it must be a pair"),
        ([{"inputs": INPUTS[:8]}], r"a batch is a dict of inputs \(8, 3\) float32: it must be a pair"),
        ([DATA[:8], (INPUTS[8:12], INPUTS[8:12])], r"of one shape, but they have the shapes \(1,\), \(3,\)"),
    ],
)
def test_batches_without_targets_of_one_shape_are_refused(batches, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        fitted(DataLoader(batches, batch_size=None), tmp_path)


SHARED = {name: LOADERS[name] for name in ("sampler", "weights", "list")}


def all_fitted():
    options = {"devices": 2, "strategy": "ddp"}
    found = {name: fitted(make(), ".", **options) for name, make in SHARED.items()}
    own = DataLoader(DATA, batch_size=4, sampler=HalfOfProcess())
    found["own"] = fitted(own, ".", **options, use_distributed_sampler=False)
    Path(os.environ["LOCAL_RANK"]).write_text(json.dumps(found))


def test_two_processes_have_the_statistics_of_one(tmp_path):
    Ranks(all_fitted, cwd=tmp_path, ranks=2).succeed()
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found == dict.fromkeys([*SHARED, "own"], expected())
