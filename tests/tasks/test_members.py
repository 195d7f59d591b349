"""Networks with members, each of which has its own loss while training."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, huber_loss, mse_loss

from firstlight.errors import UsageError
from firstlight.losses import SupervisedContrastiveLoss
from firstlight.networks import MLP, TabM
from firstlight.tasks import (
    BinaryClassification,
    Classification,
    Embedding,
    MultilabelClassification,
    Regression,
)
from tests.tasks.helpers import loader, parts, trainer

INPUTS = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
CLASSES = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0.5)
ONES = (INPUTS[:, :1] > 0).float()
LABELS = (INPUTS[:, :3] > 0.2).float()
NUMBERS = (100 + 20 * INPUTS[:, :2] + INPUTS[:, 2:4] ** 2).double()
STANDARDISED = ((NUMBERS - NUMBERS.mean(0)) / NUMBERS.std(0, correction=0)).float()
WEIGHT = torch.tensor([1.0, 2.0, 5.0])

# For each: the task, its options, its targets, and the loss of one member by hand for some rows.
CASES = {
    "classification": (
        partial(Classification, classes=3), nn.CrossEntropyLoss(), CLASSES, 3,
        lambda outputs, rows: cross_entropy(outputs, CLASSES[rows]),
    ),
    "class weights": (
        partial(Classification, classes=3), nn.CrossEntropyLoss(weight=WEIGHT), CLASSES, 3,
        lambda outputs, rows: cross_entropy(outputs, CLASSES[rows], WEIGHT),
    ),
    "binary": (
        BinaryClassification, nn.BCEWithLogitsLoss(), ONES, 1,
        lambda outputs, rows: binary_cross_entropy_with_logits(outputs, ONES[rows]),
    ),
    "multilabel": (
        partial(MultilabelClassification, labels=3), nn.BCEWithLogitsLoss(), LABELS, 3,
        lambda outputs, rows: binary_cross_entropy_with_logits(outputs, LABELS[rows]),
    ),
    "regression": (
        partial(Regression, outputs=2), nn.MSELoss(), NUMBERS, 2,
        lambda outputs, rows: mse_loss(outputs, STANDARDISED[rows]),
    ),
    "huber": (
        partial(Regression, outputs=2), nn.HuberLoss(), NUMBERS, 2,
        lambda outputs, rows: huber_loss(outputs, STANDARDISED[rows]),
    ),
}  # fmt: skip
every_task = pytest.mark.parametrize("case", CASES)


def network_for(outputs):
    torch.manual_seed(0)
    return TabM(5, outputs, [6], numeric_features=3, members=4, dropout=0.0)


def fitted(tmp_path, case, batch_size, network=None, **options):
    """Return the task after a step of SGD with learning rate 1, which changes parameters by their gradient."""
    make, loss, targets, outputs, _ = CASES[case]
    network = network or network_for(outputs)
    task = make(**{**parts(network, loss), "optimizer": partial(torch.optim.SGD, lr=1.0)})
    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path), **options)
    run.fit(task, loader(INPUTS, targets, batch_size), loader(INPUTS, targets, batch_size))
    return task, run.logged_metrics


@every_task
@pytest.mark.parametrize(("batch_size", "accumulated"), [(24, 1), (10, 3)])
def test_loss_and_step_are_those_of_a_loop_over_the_members(tmp_path, case, batch_size, accumulated):
    _, _, _, outputs, loss_by_hand = CASES[case]
    network = network_for(outputs)
    rows = slice(None)
    losses = [loss_by_hand(network.train()(INPUTS)[:, member], rows) for member in range(4)]
    expected = sum(losses) / 4
    expected.backward()
    task, logged = fitted(tmp_path, case, batch_size, accumulate_grad_batches=accumulated)
    assert logged["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, before in network.named_parameters():
        after = task.network.get_parameter(name)
        torch.testing.assert_close(before - before.grad, after, rtol=1e-4, atol=1e-6)


@every_task
def test_validation_has_the_loss_of_the_mean_outputs(tmp_path, case):
    *_, outputs, loss_by_hand = CASES[case]
    task, logged = fitted(tmp_path, case, 24)
    expected = loss_by_hand(task.network.eval()(INPUTS), slice(None))
    assert task.network(INPUTS).shape == (24, outputs)
    assert logged["val/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_metrics_take_the_mean_outputs(tmp_path):
    network = network_for(3)
    right = network.train()(INPUTS).mean(1).argmax(1) == CLASSES
    _, logged = fitted(tmp_path, "classification", 24, copy.deepcopy(network))
    assert logged["train/accuracy"].item() == pytest.approx(right.float().mean().item())


def test_attribute_members_of_another_network_is_explained(tmp_path):
    network = MLP(5, [4], 3)
    network.members = 4
    with pytest.raises(UsageError, match=r"MLP has members=4, so while training it must return \(24, 4, \.\.\.\)"):
        fitted(tmp_path, "classification", 24, network)


def test_attribute_members_that_is_no_integer_means_nothing(tmp_path):
    network = MLP(5, [4], 3)
    network.members = "all"
    assert fitted(tmp_path, "classification", 24, network)[0].members == 0


def test_embedding_task_refuses_a_network_with_members():
    with pytest.raises(UsageError, match="TabM has members=4, which have a loss each"):
        Embedding(**parts(network_for(8), SupervisedContrastiveLoss()))
