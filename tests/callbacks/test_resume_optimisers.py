"""A resume restores pending gradients, and says what optimisers and schedules keep or cannot load."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader

from firstlight.errors import UsageError
from tests.callbacks.test_resume_any import EXACT, Net, Stream, _quiet, assert_resumes_exactly, fit, loader  # noqa: F401


class Manual(Net):
    """Two optimisers that step every second and every third batch, so that one of them always has a gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx) / 4)
        for every, optimizer in zip((2, 3), self.optimizers(), strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.1, momentum=0.9) for index in (0, 2)]


class ClearsSeldom(Net):
    """A module whose gradients are cleared in each third batch only."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 3 == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class Keeps(torch.optim.SGD):
    """An optimiser that halves its gradients in place of clearing them."""

    def zero_grad(self, set_to_none=True):
        for each in self.param_groups[0]["params"]:
            if each.grad is not None:
                each.grad *= 0.5


class KeepsGradients(Net):
    def configure_optimizers(self):
        return Keeps(self.parameters(), lr=0.05)


@pytest.mark.parametrize(("module", "stops"), [(Manual, (8, 12)), (ClearsSeldom, (9, 10)), (KeepsGradients, (9,))])
def test_gradients_that_wait_for_a_step_resume_with_the_same_bits(module, stops, tmp_path):
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], module, stops=stops)


def test_checkpoint_of_plain_automatic_optimisation_holds_no_gradients(tmp_path):
    fit(tmp_path, stop=8)
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["random_state"]
    assert state["gradients"] == {}


class Unfreezes(Net):
    """A module that trains its first layer from the third epoch on."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.optimizers().optimizer.add_param_group({"params": [*self.net[0].parameters()]})


class Exchanges(Net):
    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), lr=0.01)]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Unfreezes, "training ended with parameter groups of 2, 2 parameters, and the optimiser has groups of 2 at"),
        (Exchanges, r"training ended with the optimiser torch.optim.adam.Adam, and torch.optim.sgd.SGD is made"),
    ],
)
def test_optimiser_that_changed_during_training_is_refused_in_one_line(module, reason, tmp_path):
    fit(tmp_path, module=module, stop=16)
    for exact in (True, False):
        with pytest.raises(UsageError, match=f"^cannot resume: {reason}[^\n]*$"):
            fit(tmp_path, module=module, resume=True, exact=exact)


class Configured(Net):
    """A module with options of its own."""

    def __init__(self, lr=0.1, weight_decay=0.0, gamma=0.9):
        super().__init__()
        self.lr, self.weight_decay, self.gamma = lr, weight_decay, gamma

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"lr": 0.5}, "optimiser 0 group 0 lr 0.1, not 0.5\n"),
        ({"weight_decay": 0.2}, "optimiser 0 group 0 weight_decay 0.0, not 0.2\n"),
        ({"gamma": 0.5}, "schedule 0 gamma 0.9, not 0.5\n"),
    ],
)
def test_changed_option_that_the_checkpoint_replaces_is_told_at_each_resume(option, line, tmp_path, capsys):
    fit(tmp_path, module=Configured, stop=8)
    for stop in (13, None):
        fit(tmp_path, module=lambda: Configured(**option), resume=True, stop=stop)
        printed = capsys.readouterr().out
        assert printed == f"keep   what the checkpoint holds stays, and the change does not act: {line}"


def test_unchanged_options_tell_nothing(tmp_path, capsys):
    fit(tmp_path, module=Configured, stop=8)
    fit(tmp_path, module=Configured, resume=True)
    assert capsys.readouterr().out == ""


def test_loader_without_a_length_that_was_used_up_within_the_epoch_is_refused(tmp_path):
    def make():
        return CombinedLoader({"a": loader(Stream()), "b": loader(Stream(), batch_size=9)}, "max_size_cycle")

    fit(tmp_path, make, stop=12)
    with pytest.raises(UsageError, match="a loader without a length was used up and started again within the epoch"):
        fit(tmp_path, make, resume=True)
    fit(tmp_path, make, resume=True, exact=False)
    whole = fit(tmp_path / "whole", make)
    fit(tmp_path / "early", make, stop=8)
    found = fit(tmp_path / "early", make, resume=True)
    assert all(torch.equal(found[name], each) for name, each in whole.items())
