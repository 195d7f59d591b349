"""Chapter 2: back-propagation by hand, and vanishing gradients in deep networks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from firstlight.callbacks.gradient_norm import blocks, norms
from firstlight.data import Digits
from firstlight.networks import MLP
from tests.claims.training import samples


def test_back_propagation_by_hand_equals_autograd():
    torch.manual_seed(0)
    net = MLP(64, [32], 10).double()
    inputs, targets = (tensor[:50] for tensor in samples(Digits(), "train"))
    x = inputs.flatten(1).double()
    cross_entropy(net(x), targets).backward()
    hidden, output = net.hidden0[0], net.output
    with torch.no_grad():
        z = x @ hidden.weight.T + hidden.bias
        h = z.clamp(min=0)
        logits = h @ output.weight.T + output.bias
        d_logits = (logits.softmax(dim=1) - one_hot(targets, 10)) / len(x)
        d_z = d_logits @ output.weight * (z > 0)
    by_hand = {
        hidden.weight: d_z.T @ x,
        hidden.bias: d_z.sum(dim=0),
        output.weight: d_logits.T @ h,
        output.bias: d_logits.sum(dim=0),
    }
    assert by_hand.keys() == set(net.parameters())
    for parameter, gradient in by_hand.items():
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-14, rtol=1e-10)


def test_sgd_step_subtracts_learning_rate_times_gradient():
    weight = nn.Parameter(torch.randn(3, 4))
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * 2 * before)


def gradient_ratio(seed, **options):
    """Return the gradient norm of the first of 20 hidden layers, divided by that of the output layer."""
    torch.manual_seed(seed)
    net = MLP(64, [64] * 20, 10, **options)
    inputs, targets = (tensor[:256] for tensor in samples(Digits(), "train"))
    cross_entropy(net(inputs), targets).backward()
    found = norms({name: [parameter.grad for parameter in block.parameters()] for name, block in blocks(net).items()})
    return found["hidden0"] / found["output"]


@pytest.mark.parametrize("seed", range(3))
def test_gradient_vanishes_in_20_sigmoid_layers(seed):
    assert gradient_ratio(seed, activation=nn.Sigmoid) < 1e-6  # measured: 2e-17 to 4e-17


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [{"residual": True}, {"norm": "batch"}, {"init": "kaiming"}],  # measured: 0.05 to 0.09, 28 to 46, 0.5 to 1.4
    ids=["residual", "batch normalisation", "kaiming"],
)
def test_gradient_of_20_relu_layers_survives_with_residuals_batch_norm_or_kaiming(options, seed):
    assert gradient_ratio(seed, **options) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_gradient_vanishes_in_20_relu_layers_with_default_initialisation(seed):
    assert gradient_ratio(seed) < 1e-5  # measured: 1e-7 to 4e-7
