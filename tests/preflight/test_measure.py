import math

import pytest
import torch
from torch import nn

from firstlight.callbacks.facts.outputs import mixed_samples
from firstlight.preflight.measure import gradients, overfit


def test_overfitting_ends_when_the_loss_is_a_hundredth():
    assert overfit(iter([1.0, 0.5, 0.02, 0.01, 0.001]).__next__, steps=9, seconds=60) == [1.0, 0.5, 0.02, 0.01]


def test_overfitting_ends_after_the_steps_or_the_seconds():
    assert overfit(lambda: 1.0, steps=7, seconds=60) == [1.0] * 7
    assert overfit(lambda: 1.0, steps=7, seconds=-1) == [1.0]


def test_overfitting_ends_when_the_loss_is_not_finite():
    losses = overfit(iter([1.0, math.inf, 0.5]).__next__, steps=9, seconds=60)
    assert losses == [1.0, math.inf]


def test_parameters_without_a_gradient_and_with_a_gradient_of_zero_are_named():
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "zero": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    module["used"].bias.requires_grad = False
    inputs = torch.ones(3, 2)
    loss = (module["used"](inputs) + 0 * module["zero"](inputs)).sum()
    unused, sizes, zero = gradients(module, loss)
    assert sizes == {"used.weight": 3}
    assert unused == ["unused.weight", "unused.bias"]
    assert zero == ["zero.weight", "zero.bias"]


class Mean(nn.Module):
    """Adds a tenth of the batch's mean to each sample."""

    def forward(self, inputs):
        return inputs + inputs.mean(0) / 10


def test_leak_is_the_largest_change_relative_to_the_largest_output():
    inputs = torch.tensor([[1.0], [2.0], [4.0]])
    assert mixed_samples(nn.Identity(), inputs, reorders=True) == (0, 0)
    # The second sample replaces the first: the mean rises by 1/3, each output by 1/30; the largest was 4 + 7/30.
    assert mixed_samples(Mean(), inputs) == (pytest.approx((1 / 30) / (4 + 7 / 30), rel=1e-4), 0)


def test_network_that_reads_the_place_in_the_batch_depends_on_the_order_only():
    inputs = torch.tensor([[1.0], [2.0], [4.0]])
    replaced, reordered = mixed_samples(lambda given: given + torch.arange(3.0)[:, None], inputs, reorders=True)
    assert replaced == 0 and reordered == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("network", "inputs", "reason"),
    [
        (nn.Identity(), torch.ones(4, 2), "the batch has no two different samples"),
        (nn.Flatten(0), torch.rand(4, 2), "the network gives 8 outputs for 4 samples"),
    ],
)
def test_leak_that_cannot_be_measured_is_refused(network, inputs, reason):
    with pytest.raises(ValueError, match=reason):
        mixed_samples(network, inputs)
