"""Chapter 6: batch and layer normalisation."""

from functools import partial

import pytest
import torch

from firstlight.data import Digits
from firstlight.networks import MLP
from firstlight.schedules import Constant
from tests.claims.training import UNIFORM_LOSS, descend, samples


def after_first_norm(norm):
    """Return the outputs of the first normalisation layer of an untrained network for a batch of digits."""
    torch.manual_seed(0)
    net = MLP(64, [32, 32], 10, norm=norm)
    inputs, _ = samples(Digits(), "train")
    return net.hidden0[:2](net.flatten(inputs[:64])).detach()


@pytest.mark.parametrize(("norm", "axis"), [("batch", 0), ("layer", 1)])
def test_normalisation_gives_mean_0_and_variance_1_over_batch_or_features(norm, axis):
    outputs = after_first_norm(norm)
    other = 1 - axis
    torch.testing.assert_close(outputs.mean(axis), torch.zeros(outputs.shape[other]), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.var(axis, correction=0), torch.ones(outputs.shape[other]), atol=1e-3, rtol=0)
    assert outputs.mean(other).abs().max() > 0.1


def final_loss(norm, init, lr, seed, steps):
    optimizer = partial(torch.optim.SGD, lr=lr)
    return descend(lambda: MLP(64, [64] * 4, 10, norm=norm, init=init), optimizer, Constant(), seed, steps)


@pytest.mark.parametrize("seed", range(2))
def test_batch_normalisation_trains_at_a_learning_rate_that_diverges_without_it(seed):
    assert not final_loss(None, "kaiming", lr=2.0, seed=seed, steps=150) < UNIFORM_LOSS
    assert final_loss("batch", "kaiming", lr=2.0, seed=seed, steps=150) < 0.3  # measured over ten seeds: at most 0.09


@pytest.mark.parametrize("seed", range(2))
def test_batch_normalisation_learns_within_60_steps_and_the_plain_network_does_not(seed):
    assert final_loss(None, "default", lr=0.05, seed=seed, steps=60) > 0.95 * UNIFORM_LOSS
    assert final_loss("batch", "default", lr=0.05, seed=seed, steps=60) < 0.6  # measured over ten seeds: at most 0.35
