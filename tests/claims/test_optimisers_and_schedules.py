"""Chapter 4 and the hyper-parameters: the learning rate, its warm-up, the batch size, and what optimisers remember."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from firstlight.data import Digits
from firstlight.networks import MLP, SimpleNet
from firstlight.schedules import Constant, Cosine, WarmupCosine
from tests.claims.training import GUESS, descend, samples

SEEDS = range(4)


def deep_residual():
    return MLP(64, [64] * 8, 10, residual=True, init="kaiming")


@pytest.mark.parametrize("seed", SEEDS)
def test_warm_up_prevents_a_divergence_that_happens_without_it(seed):
    optimizer = partial(torch.optim.SGD, lr=0.15)
    assert not math.isfinite(descend(deep_residual, optimizer, Cosine(), seed))
    assert (
        descend(deep_residual, optimizer, WarmupCosine(warmup=0.3), seed) < 0.2
    )  # measured over ten seeds: at most 0.08


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("optimizer", "low", "right", "high"),
    [(torch.optim.SGD, 1e-4, 0.3, 10.0), (torch.optim.Adam, 1e-5, 3e-3, 1.0)],
)
def test_too_high_a_learning_rate_diverges_and_too_low_a_one_stalls(optimizer, low, right, high, seed):
    stalled, learned, diverged = (
        descend(lambda: MLP(64, [128, 64], 10), partial(optimizer, lr=lr), Constant(), seed)
        for lr in (low, right, high)
    )
    assert learned < 0.3  # measured over ten seeds: at most 0.08
    assert 0.95 * GUESS < stalled < 1.05 * GUESS
    assert not diverged < 0.99 * GUESS  # of what has diverged to one class, the loss is that of a guess


def test_a_batch_sixteen_times_as_large_has_a_gradient_about_four_times_as_smooth():
    torch.manual_seed(0)
    net = MLP(64, [32], 10)
    inputs, targets = samples(Digits(), "train")

    def gradient(chosen):
        net.zero_grad()
        cross_entropy(net(inputs[chosen]), targets[chosen]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])

    mean = gradient(torch.arange(len(inputs)))

    def spread(batch_size):
        distances = [(gradient(torch.randint(len(inputs), (batch_size,))) - mean).norm() for _ in range(100)]
        return torch.stack(distances).square().mean().sqrt().item()

    assert spread(8) / spread(128) == pytest.approx(4, rel=0.15)


def test_adam_remembers_two_numbers_a_weight_and_adafactor_a_few_a_row_and_column():
    def remembered(optimizer):
        net = SimpleNet()
        optimizer = optimizer(net.parameters(), lr=1e-3)
        net(torch.randn(2, 784)).sum().backward()
        optimizer.step()
        numbers = sum(value.numel() for state in optimizer.state.values() for value in state.values())
        return numbers / sum(parameter.numel() for parameter in net.parameters())

    assert remembered(torch.optim.Adam) == pytest.approx(2, abs=0.01)
    assert remembered(torch.optim.Adafactor) < 0.02
