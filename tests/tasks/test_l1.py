import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from firstlight.networks import MLP
from firstlight.schedules import Cosine
from firstlight.tasks import Classification, Regression
from tests.tasks.helpers import loader, parts, trainer

INPUTS = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS[:, 0] > 0).long()


def one_step(tmp_path, network, **options):
    """Return the task after a step of SGD with learning rate 1, which changes weights by their gradient."""
    given = parts(copy.deepcopy(network), nn.CrossEntropyLoss(), classes=2)
    task = Classification(**{**given, "optimizer": partial(torch.optim.SGD, lr=1.0), **options})
    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path))
    run.fit(task, loader(INPUTS, LABELS, batch_size=64), loader(INPUTS, LABELS))
    return task, run.logged_metrics["train/loss"]


def test_penalty_changes_the_gradient_by_the_signs_of_the_weights_and_not_the_logged_loss(tmp_path):
    torch.manual_seed(0)
    network = MLP(20, [6], 2, norm="layer")
    before = {name: value.clone() for name, value in network.named_parameters()}
    before["output.weight"][0, 0] = network.output.weight.data[0, 0] = 0.0
    (plain, plain_loss), (penalised, loss) = one_step(tmp_path, network), one_step(tmp_path, network, l1=0.01)
    unpenalised = dict(plain.network.named_parameters())
    for name, value in penalised.network.named_parameters():
        expected = 0.01 * before[name].sign() if value.ndim >= 2 else torch.zeros_like(value)
        torch.testing.assert_close(unpenalised[name] - value, expected, atol=1e-7, rtol=0)
    assert loss == plain_loss


def test_frozen_weights_are_not_counted_and_a_network_without_weights_trains(tmp_path):
    frozen = MLP(20, [6], 2)
    frozen.hidden0[0].weight.requires_grad_(False)
    task, _ = one_step(tmp_path, frozen, l1=0.01)
    assert torch.equal(task.network.hidden0[0].weight, frozen.hidden0[0].weight)
    one_step(tmp_path, nn.Sequential(nn.LayerNorm(20), nn.Flatten(), nn.AdaptiveAvgPool1d(2)), l1=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_l1_brings_more_weights_near_zero_than_weight_decay(tmp_path, seed):
    torch.manual_seed(seed)
    network, near_zero, errors = MLP(20, [], 1), [], []
    targets = INPUTS[:, :1] - INPUTS[:, 1:2] + 0.2 * torch.randn(64, 1)
    for l1, decay in ((0.0, 0.0), (0.0, 0.1), (0.1, 0.0)):
        optimizer = partial(torch.optim.SGD, lr=0.1, weight_decay=decay)
        task = Regression(copy.deepcopy(network), nn.MSELoss(), optimizer, Cosine(), l1=l1)
        run = trainer(tmp_path, max_steps=200, check_val_every_n_epoch=200, log_every_n_steps=0)
        run.fit(task, loader(INPUTS, targets, batch_size=64), loader(INPUTS, targets))
        near_zero.append((task.network.output.weight.abs() < 1e-3).sum().item())
        errors.append((task(INPUTS) * task.target_std + task.target_mean - targets).square().mean().item())
    assert near_zero[2] >= 16 and max(near_zero[:2]) < 9
    assert max(errors) < 0.1 * targets.var()
