"""Chapter 1: linear maps and activations."""

import pytest
import torch
from torch import nn

from firstlight.networks import MLP, SimpleNet

GRID = torch.linspace(-12, 12, 240_001, dtype=torch.float64)


def test_softmax_of_the_logits_sums_to_one():
    torch.manual_seed(0)
    logits = SimpleNet()(torch.randn(32, 1, 28, 28) * 100)
    probabilities = logits.double().softmax(dim=1)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(32, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (probabilities >= 0).all()


@pytest.mark.parametrize(
    ("activation", "lower", "upper"),
    [
        (nn.ReLU, 0, 12),
        (nn.Sigmoid, 0, 1),
        (nn.Tanh, -1, 1),
        (nn.GELU, -0.16997, 12),
        (nn.SiLU, -0.27846, 12),
    ],
)
def test_activations_reach_the_bounds_of_their_range_and_stay_inside(activation, lower, upper):
    outputs = activation()(GRID)
    assert outputs.min().item() == pytest.approx(lower, abs=1e-4)
    assert outputs.max().item() == pytest.approx(upper, abs=1e-4)


def test_minimum_of_gelu_is_minus_0_17_at_minus_0_75():
    outputs = nn.GELU()(GRID)
    assert outputs.min().item() == pytest.approx(-0.17, abs=5e-4)
    assert GRID[outputs.argmin()].item() == pytest.approx(-0.7518, abs=1e-3)


def test_network_is_linear_without_activations_and_nonlinear_with_them():
    torch.manual_seed(0)
    inputs, zero = torch.randn(64, 12, dtype=torch.float64), torch.zeros(1, 12, dtype=torch.float64)

    def curvature(activation):
        net = MLP(12, [32, 32], 3, activation=activation).double()
        return (net(2 * inputs) - 2 * net(inputs) + net(zero)).abs().max().item()

    assert curvature(nn.Identity) < 1e-12
    assert curvature(nn.ReLU) > 1e-3
