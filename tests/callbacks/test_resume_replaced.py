"""A run whose training replaced a layer, a function or data that no checkpoint holds does not resume silently."""

import multiprocessing
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from firstlight.callbacks.state import fingerprints
from firstlight.errors import UsageError
from tests.callbacks.test_resume_any import EXACT, Net, Rows, _quiet, fit, loader  # noqa: F401

STOP = 16  # Within the third epoch.


class Loss(Net):
    """A module with a loss function and a loss layer that the third epoch replaces."""

    def __init__(self):
        super().__init__()
        self.loss, self.criterion, self.losses = functional.mse_loss, nn.MSELoss(), [functional.mse_loss]

    def training_step(self, batch, batch_idx):
        outputs, zeros = self.net(batch), torch.zeros(len(batch), 1)
        return sum(loss(outputs, zeros) for loss in (self.loss, self.criterion, self.losses[0])) / 10

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.replace()


def double(rows):
    return torch.stack(rows) * 2


class Doubles(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            trainer.train_dataloader.collate_fn = double


class Transforms(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            trainer.train_dataloader.dataset.draw = zero


def zero():
    return 0.0


def one():
    return 1.0


REPLACED = {
    "criterion": (lambda self: setattr(self, "criterion", nn.L1Loss()), "module criterion became torch.*L1Loss"),
    "loss": (lambda self: setattr(self, "loss", functional.l1_loss), "module.loss became torch.*l1_loss .* is .*mse_l"),
    "partial": (
        lambda self: setattr(self, "loss", partial(functional.mse_loss, reduction="sum")),
        "module.loss became missing or an object during training, and is torch.*mse_loss at the start",
    ),
    "in a list": (lambda self: self.losses.__setitem__(0, functional.l1_loss), "module.losses changed during training"),
    "layer": (lambda self: self.net.__setitem__(1, nn.ReLU()), "module net.1 became torch.*ReLU during training, and"),
    "new layer": (
        lambda self: self.net.append(nn.ReLU()),
        "module net.3 became torch.*ReLU .* is missing or an object at the start",
    ),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_module_that_replaces_a_part_of_itself_is_refused_unless_inexact_is_allowed(kind, tmp_path):
    replace, reason = REPLACED[kind]
    module = type("Replaces", (Loss,), {"replace": replace})
    fit(tmp_path, module=module, stop=STOP)
    with pytest.raises(UsageError, match=rf"^the run cannot resume exactly: {reason}.*--allow_inexact"):
        fit(tmp_path, module=module, resume=True)
    if kind != "new layer":
        fit(tmp_path, module=module, resume=True, exact=False)


class SetAtStart(Loss):
    """A module that sets a function when training starts, and gets a layer of another class from its caller."""

    def on_train_start(self):
        self.loss = functional.l1_loss

    def replace(self):
        pass


def test_function_that_is_set_when_training_starts_is_not_refused(tmp_path):
    whole = fit(tmp_path / "whole", module=SetAtStart)
    fit(tmp_path / "stopped", module=SetAtStart, stop=STOP)
    found = fit(tmp_path / "stopped", module=SetAtStart, resume=True)
    assert all(torch.equal(found[name], each) for name, each in whole.items())


@pytest.mark.parametrize(("callback", "path"), [(Doubles, "collate_fn"), (Transforms, "dataset.draw")])
def test_callback_that_replaces_a_function_of_the_data_is_refused(callback, path, tmp_path):
    def make():
        return loader(Rows(one), shuffle=True)

    fit(tmp_path, make, callbacks=[callback], stop=STOP)
    with pytest.raises(UsageError, match=rf"{path} of the training loader was .*{__name__}.* and is .*--allow_inexact"):
        fit(tmp_path, make, callbacks=[callback], resume=True)


@dataclass
class Sample:
    row: torch.Tensor


class Shared(Dataset):
    """Rows of one class of values, which differ by a shift."""

    def __init__(self, make, shift):
        self.rows, self.values = Rows(), make(shift)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def cell(shift):
    value = multiprocessing.Value("d", 0.0)
    value.value += shift
    return value


CHANGED = {
    "data frame": lambda shift: pandas.DataFrame({"x": np.arange(5000.0), "y": ["a", f"b{shift}"] * 2500}),
    "column name": lambda shift: pandas.DataFrame({f"x{shift}": [1.0]}),
    "series": lambda shift: pandas.Series([[1], [2 + shift]]),
    "objects": lambda shift: [Sample(torch.full((2,), 1.0 + shift)) for _ in range(1200)],
    "pairs": lambda shift: {index: (index, Sample(torch.full((2,), 1.0 + shift))) for index in range(1200)},
    "set": lambda shift: {1, 2 + shift},
    "frozen set of texts": lambda shift: frozenset({"a", f"b{shift}"}),
    "shared value": cell,
    "shared array": lambda shift: multiprocessing.RawArray("i", [1, 2 + shift]),
    "long text": lambda shift: ["a" * 100 + str(shift)],
    "class": lambda shift: [Sample, Shared][shift],
    "object without values": lambda shift: [Rows(zero), Rows(one)][shift],
}


@pytest.mark.parametrize("kind", CHANGED)
def test_values_of_a_data_set_are_compared(kind):
    made = [fingerprints({"dataset": Shared(CHANGED[kind], shift)}) for shift in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("kind", ["data frame", "objects", "shared value", "set"])
def test_run_on_other_training_data_is_refused(kind, tmp_path):
    fit(tmp_path, lambda: loader(Shared(CHANGED[kind], 0)), stop=STOP)
    with pytest.raises(
        UsageError, match=r"^the run cannot resume exactly: dataset\.values.* of the training loader was"
    ):
        fit(tmp_path, lambda: loader(Shared(CHANGED[kind], 1)), resume=True)
    fit(tmp_path, lambda: loader(Shared(CHANGED[kind], 0)), resume=True)


@pytest.mark.parametrize("every", [1, 2])
def test_run_on_other_validation_data_is_refused(every, tmp_path):
    def validation(shift):
        return lambda: loader(Shared(CHANGED["data frame"], shift))

    options = {"check_val_every_n_epoch": every, "max_epochs": 2 + every}
    fit(tmp_path, validation=validation(0), stop=8 if every == 1 else 15, **options)
    with pytest.raises(UsageError, match=r"resume exactly: dataset\.values of the validation loader was"):
        fit(tmp_path, validation=validation(1), resume=True, **options)
    fit(tmp_path, validation=validation(0), resume=True, **options)


def test_description_of_a_large_data_set_stays_small():
    rows = [Sample(torch.ones(2)) for _ in range(100_000)]
    assert len(fingerprints({"dataset": Shared(lambda _: rows, 0)})) < 5000
