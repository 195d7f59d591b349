"""Calibration is that of torchmetrics, and a temperature undoes the one that was put in."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from firstlight.insight.calibration import calibration, scaled, temperature


def sampled(heat, seed, samples=4_000, classes=4):
    """Return probabilities whose logits are divided by `heat`, and targets drawn from the undivided ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, classes)) * 2
    targets = np.array([rng.choice(classes, p=row) for row in softmax(logits, axis=1)])
    return softmax(logits / heat, axis=1), targets


@pytest.mark.parametrize("seed", range(5))
def test_error_is_that_of_torchmetrics(seed):
    probabilities, targets = sampled(0.6, seed)
    expected = multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(targets), 4, n_bins=15, norm="l1")
    assert calibration(probabilities, targets).error == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("heat", [0.3, 1.0, 2.5])
def test_temperature_undoes_the_one_that_was_put_in(heat):
    probabilities, targets = sampled(heat, 0)
    found = temperature(probabilities, targets)
    assert found == pytest.approx(1 / heat, rel=0.06)
    assert calibration(scaled(probabilities, found), targets).error < 0.03


def test_probabilities_of_zero_and_one_have_a_temperature():
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert np.isfinite(temperature(probabilities, np.array([0, 1, 1])))
