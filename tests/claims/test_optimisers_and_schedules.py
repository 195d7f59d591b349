"""Chapter 4 and hyper-parameters: learning rate, warm-up, batch size and the state of optimisers."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from firstlight.data import Digits
from firstlight.networks import MLP, SimpleNet
from firstlight.schedules import Constant, Cosine, WarmupCosine
from tests.claims.training import UNIFORM_LOSS, descend, samples

SEEDS = range(2)


def deep_residual():
    return MLP(64, [64] * 8, 10, residual=True, init="kaiming")


@pytest.mark.parametrize("seed", SEEDS)
def test_warm_up_prevents_divergence(seed):
    optimizer = partial(torch.optim.SGD, lr=0.15)
    assert not math.isfinite(descend(deep_residual, optimizer, Cosine(), seed))
    with_warmup = descend(deep_residual, optimizer, WarmupCosine(warmup=0.3), seed)
    assert with_warmup < 0.2  # measured over ten seeds: at most 0.08


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("optimizer", "low", "right", "high"),
    [(torch.optim.SGD, 1e-4, 0.3, 10.0), (torch.optim.Adam, 1e-5, 3e-3, 1.0)],
)
def test_high_learning_rate_diverges_and_low_one_stalls(optimizer, low, right, high, seed):
    stalled, learned, diverged = (
        descend(lambda: MLP(64, [128, 64], 10), partial(optimizer, lr=lr), Constant(), seed)
        for lr in (low, right, high)
    )
    assert learned < 0.3  # measured over ten seeds: at most 0.08
    assert 0.95 * UNIFORM_LOSS < stalled < 1.05 * UNIFORM_LOSS
    assert not diverged < 0.99 * UNIFORM_LOSS  # A diverged network may give all digits equal probabilities.


def test_gradient_noise_falls_with_the_square_root_of_the_batch_size():
    torch.manual_seed(0)
    net = MLP(64, [32], 10)
    inputs, targets = samples(Digits(), "train")

    def gradient(indices):
        net.zero_grad()
        cross_entropy(net(inputs[indices]), targets[indices]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    mean = gradient(torch.arange(len(inputs)))

    def spread(batch_size):
        distances = [(gradient(torch.randint(len(inputs), (batch_size,))) - mean).norm() for _ in range(100)]
        return torch.stack(distances).square().mean().sqrt().item()

    assert spread(8) / spread(128) == pytest.approx(4, rel=0.15)


def test_adam_stores_two_numbers_per_weight_and_adafactor_less_than_0_02():
    def stored_per_weight(optimizer):
        net = SimpleNet()
        optimizer = optimizer(net.parameters(), lr=1e-3)
        net(torch.randn(2, 784)).sum().backward()
        optimizer.step()
        numbers = sum(value.numel() for state in optimizer.state.values() for value in state.values())
        return numbers / sum(parameter.numel() for parameter in net.parameters())

    assert stored_per_weight(torch.optim.Adam) == pytest.approx(2, abs=0.01)
    assert stored_per_weight(torch.optim.Adafactor) < 0.02
