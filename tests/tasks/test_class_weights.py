"""Weights of classes and of positive labels, as an option of the tasks."""

import numpy as np
import pytest
import torch
import yaml
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from firstlight.data import Tensors
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.tasks import BinaryClassification, Classification, MultilabelClassification
from firstlight.tasks.training_targets import balanced_weights
from tests.helpers import ROOT, called, newest
from tests.tasks.helpers import loader, parts, trainer

INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
LABELS = (torch.arange(40) % 8 == 0).long() + (torch.arange(40) % 4 == 0).long()
NAMES = ["no", "perhaps", "yes"]
ZERO_ONE = (INPUTS[:, :2] > 0.8).float()


def classification(loss=None, **changes):
    torch.manual_seed(0)
    return Classification(**parts(MLP(4, [], 3), loss or nn.CrossEntropyLoss(), classes=3, **changes))


def data(**options):
    return Tensors(INPUTS, LABELS, NAMES, batch_size=7, **options)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 20.0], {"yes": 20.0, "no": 1.0, "perhaps": 2.0}])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_weights_are_those_of_a_loss_with_weights(weights, precision, tmp_path):
    reference = classification(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 20.0])))
    task = classification(class_weights=weights)
    results = []
    for each in (reference, task):
        run = trainer(tmp_path, max_epochs=2, precision=precision)
        run.fit(each, data())
        results += run.test(each, data(), verbose=False)
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), task.parameters(), strict=True))


def test_balanced_weights_equal_scikit_learn_on_the_training_split(tmp_path):
    task, module = classification(class_weights="balanced"), data()
    trainer(tmp_path, max_epochs=1).fit(task, module)
    labels = module.dataset("train").targets.numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(task.loss.weight, torch.tensor(expected).float())


def test_weights_are_in_the_checkpoint_and_a_resumed_run_takes_the_new_ones(tmp_path):
    task = classification(class_weights="balanced")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classification.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, **parts(MLP(4, [], 3), nn.CrossEntropyLoss())
    )
    assert torch.equal(loaded.loss.weight, task.loss.weight)
    other = classification(class_weights=[1.0, 1.0, 5.0])
    trainer(tmp_path, max_epochs=2).fit(other, data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert other.loss.weight.tolist() == [1, 1, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "must have 3 weights, but has 2"),
        ({"class_weights": [1.0, -2.0, 1.0]}, "each must be at least 0"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "at least one must be above 0"),
        ({"class_weights": "balanced", "loss": nn.MultiMarginLoss(weight=torch.ones(3))}, "has a weight already"),
        ({"class_weights": "balanced", "loss": nn.MSELoss()}, r"MSELoss has no weight: use torch.nn.CrossEntropyLoss"),
    ],
)
def test_wrong_weights_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        classification(**changes)


def test_weights_of_unknown_classes_are_refused_before_the_first_step(tmp_path):
    task = classification(class_weights={"no": 1.0, "yess": 20.0, "perhaps": 2.0})
    with pytest.raises(UsageError, match="a weight for yess, but the classes are no, perhaps, yes; did you mean yes"):
        trainer(tmp_path, max_epochs=1).fit(task, data())
    task = classification(class_weights="balanced")
    few = loader(INPUTS, LABELS.clamp(max=1))
    with pytest.raises(UsageError, match="class 2 has none"):
        trainer(tmp_path, max_epochs=1).fit(task, few, few)


@pytest.mark.parametrize("weights", [3.0, "balanced"])
def test_pos_weight_is_that_of_the_loss(weights, tmp_path):
    targets = ZERO_ONE[:, :1]
    expected = torch.tensor([3.0 if weights == 3.0 else float((targets == 0).sum() / targets.sum())])
    results = []
    for loss, option in ((nn.BCEWithLogitsLoss(pos_weight=expected), None), (nn.BCEWithLogitsLoss(), weights)):
        torch.manual_seed(0)
        task = BinaryClassification(**parts(MLP(4, [], 1), loss, pos_weight=option))
        run = trainer(tmp_path, max_epochs=1)
        run.fit(task, loader(INPUTS, targets), loader(INPUTS, targets))
        results += run.test(task, loader(INPUTS, targets), verbose=False)
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("weights", [[3.0, 5.0], {"b": 5.0, "a": 3.0}, "balanced"])
def test_each_label_has_its_pos_weight(weights, tmp_path):
    module = Tensors(INPUTS, ZERO_ONE, ["a", "b"], batch_size=7)
    task = MultilabelClassification(**parts(MLP(4, [], 2), nn.BCEWithLogitsLoss(), labels=2, pos_weight=weights))
    trainer(tmp_path, max_epochs=1).fit(task, module)
    train = module.dataset("train").targets
    expected = (1 - train).sum(0) / train.sum(0) if weights == "balanced" else torch.tensor([3.0, 5.0])
    torch.testing.assert_close(task.loss.pos_weight, expected)


@pytest.mark.parametrize("given", ["balanced", "[1, 2, 3]", "{A: 1, B: 2, C: 3}"])
def test_weights_are_options_of_the_command_line_and_in_the_configuration(given, tmp_path):
    folder = ROOT / "configs"
    options = [
        f"--model.class_weights={given}",
        "--trainer.max_epochs=1",
        f"--data.path={folder / 'data' / 'wine.csv'}",
    ]
    called("fit", "--config", str(folder / "wine.yaml"), *options, cwd=tmp_path)
    run = newest(tmp_path, "wine")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["class_weights"]
    assert saved == yaml.safe_load(given)
    called("test", "--ckpt", str(run / "checkpoints" / "best.ckpt"), options[-1], cwd=tmp_path)
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]["loss.weight"]
    assert weights.tolist() == pytest.approx([1, 2, 3]) or (given == "balanced" and weights.unique().numel() > 1)


def test_balanced_weights_leave_out_the_ignored_class():
    found = balanced_weights(torch.tensor([50, 3, 1]), NAMES, ignored=0)
    torch.testing.assert_close(found, torch.tensor([1, 2 / 3, 2]).double(), rtol=1e-6, atol=0)
