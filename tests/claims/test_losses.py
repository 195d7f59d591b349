"""Chapter 3: what each loss measures."""

import pytest
import torch
from torch import nn

from firstlight.losses import ContrastiveLoss


def test_cross_entropy_of_logits_is_minus_the_log_of_the_softmax():
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 10), torch.randint(10, (8,))
    by_hand = -logits.softmax(dim=1)[torch.arange(8), targets].log().mean()
    torch.testing.assert_close(nn.CrossEntropyLoss()(logits, targets), by_hand)


def test_cross_entropy_of_probabilities_instead_of_logits_stays_above_1_4():
    certain = torch.eye(10)
    assert nn.CrossEntropyLoss()(100 * certain, torch.arange(10)) < 1e-6
    assert nn.CrossEntropyLoss()(certain, torch.arange(10)) > 1.4  # log(e + 9) - 1


def test_binary_cross_entropy_is_cross_entropy_of_the_logits_0_and_z():
    logits, targets = torch.linspace(-5, 5, 11), torch.arange(11) % 2
    both = torch.stack([torch.zeros(11), logits], dim=1)
    torch.testing.assert_close(nn.BCEWithLogitsLoss()(logits, targets.float()), nn.CrossEntropyLoss()(both, targets))


@pytest.mark.parametrize(("error", "expected"), [(0.5, 0.5**2 / 2), (3.0, 3.0 - 0.5), (30.0, 30.0 - 0.5)])
def test_huber_loss_is_quadratic_for_small_errors_and_linear_for_large_ones(error, expected):
    assert nn.HuberLoss()(torch.tensor(error), torch.tensor(0.0)).item() == pytest.approx(expected)


def test_outlier_moves_the_best_constant_of_mse_but_not_that_of_huber():
    targets = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([1000.0])])

    def best_constant(loss):
        value = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([value], max_iter=100)

        def closure():
            optimizer.zero_grad()
            error = loss(value.expand_as(targets), targets)
            error.backward()
            return error

        optimizer.step(closure)
        return value.item()

    assert best_constant(nn.MSELoss()) == pytest.approx(10, rel=1e-3)
    assert abs(best_constant(nn.HuberLoss())) < 0.05


@pytest.mark.parametrize(("labels", "sign"), [([0, 0], -1), ([0, 1], 1)])
def test_contrastive_loss_pulls_equal_labels_together_and_pushes_others_apart(labels, sign):
    embeddings = torch.tensor([[0.0, 0.0], [0.3, 0.4]], requires_grad=True)
    ContrastiveLoss(margin=1.0)(embeddings, torch.tensor(labels)).backward()
    moved = embeddings.detach() - 0.1 * embeddings.grad
    assert sign * (moved[0] - moved[1]).norm() > sign * 0.5


def test_contrastive_loss_has_no_gradient_beyond_the_margin():
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    ContrastiveLoss(margin=1.0)(embeddings, torch.tensor([0, 1])).backward()
    assert not embeddings.grad.any()
