"""Chapter 8: the likeliest cause that firstlight names is the fault that was planted."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_breast_cancer, make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from firstlight.callbacks import GradientNorm, Insight, LearningRate
from firstlight.data import Digits, Tensors
from firstlight.loggers import History
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.claims.training import SMALL

pytestmark = pytest.mark.slow

NET = partial(MLP, 64, [64, 64], 10)


def digits(**options):
    return [Digits(**options)]


def shuffled_digits():
    data = Digits()
    data.setup()
    samples = data.dataset("train")
    return [Tensors(samples.inputs, samples.targets[torch.randperm(len(samples))])]


def moons():
    points, moon = make_moons(1000, noise=0.15, random_state=0)
    return [Tensors(points.astype("float32"), moon)]


def unscaled_cells():
    cells = load_breast_cancer()
    rows = TensorDataset(torch.tensor(cells.data, dtype=torch.float32), torch.tensor(cells.target))
    train, val = random_split(rows, [400, 169])
    return [DataLoader(train, 32, shuffle=True), DataLoader(val, 32)]


FAULTS = {
    "": (NET, 1e-3, digits, 12),
    "learning_rate_too_high": (NET, 0.3, digits, 12),
    "learning_rate_too_low": (NET, 1e-6, digits, 12),
    "vanishing_gradient": (partial(MLP, 64, [64] * 20, 10, activation=nn.Sigmoid), 1e-3, digits, 10),
    "missing_nonlinearity": (partial(MLP, 2, [32, 32], 2, activation=nn.Identity), 1e-3, moons, 20),
    "wrong_loss": (lambda: nn.Sequential(NET(), nn.Softmax(dim=1)), 1e-3, digits, 12),
    "label_noise": (NET, 1e-3, shuffled_digits, 40),
    "unscaled_inputs": (partial(MLP, 30, [64, 64], 2), 1e-3, unscaled_cells, 20),
    "over_regularised": (partial(NET, dropout=0.9), 1e-3, digits, 12),
    "stopped_too_early": (NET, 3e-4, digits, 4),
    "overfitting": (NET, 3e-3, partial(digits, **SMALL), 60),
}


def first_finding(network, lr, data, epochs, seed):
    """Return the name of the likeliest cause, or "" if nothing is found."""
    torch.manual_seed(seed)
    net, loaders, optimizer = network(), data(), partial(torch.optim.Adam, lr=lr)
    classes = [*net.parameters()][-1].numel()
    task = Classification(net, nn.CrossEntropyLoss(), optimizer, Constant(), classes=classes)
    insight = Insight()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=5,
        logger=History(),
        callbacks=[GradientNorm(), LearningRate(), insight],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, *loaders)
    found = insight.finish(trainer)
    return found[0].name if found else ""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch.utils.data")
def test_the_first_finding_names_the_planted_fault(fault):
    said = [first_finding(*FAULTS[fault], seed) for seed in (1, 2)]
    # Measured: all but one. With shuffled labels, `overfitting` may stand first.
    assert said.count(fault) >= (1 if fault == "label_noise" else 2), said
