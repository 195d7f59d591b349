import numpy as np
import pytest
import torch
from torch import nn

from firstlight.errors import UsageError
from firstlight.losses import ContrastiveLoss, SupervisedContrastiveLoss
from firstlight.networks import MLP
from firstlight.preflight.probe import probe
from firstlight.tasks import Embedding
from tests.metrics.test_retrieval import INPUTS, LABELS, recall_by_scikit_learn
from tests.tasks.helpers import loader, parts, predicted, trainer


def embedding(**changes):
    torch.manual_seed(0)
    return Embedding(**{**parts(MLP(5, [8], 3), SupervisedContrastiveLoss()), **changes})


def test_test_metrics_equal_scikit_learns_of_the_predictions(tmp_path):
    task, batches = embedding(k=4), loader(INPUTS, LABELS, batch_size=7)
    (found,) = trainer(tmp_path).test(task, batches, verbose=False)
    predictions = predicted(task, batches, tmp_path)
    assert predictions["embedding"].shape == (60, 3)
    assert torch.equal(predictions["target"], LABELS)
    assert found["test/nn_accuracy"] == pytest.approx(recall_by_scikit_learn(predictions["embedding"], LABELS, 1))
    assert found["test/recall_at_k"] == pytest.approx(recall_by_scikit_learn(predictions["embedding"], LABELS, 4))
    parts_of_7 = torch.arange(60).split(7)
    losses = [task.loss(predictions["embedding"][part], LABELS[part]).item() for part in parts_of_7]
    with_positive = [sum((LABELS[part] == label).sum() > 1 for label in LABELS[part]) for part in parts_of_7]
    expected = np.average(losses, weights=with_positive)
    assert found["test/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [ContrastiveLoss, SupervisedContrastiveLoss])
def test_training_brings_equal_labels_together(loss, tmp_path):
    task, run = embedding(loss=loss()), trainer(tmp_path, max_epochs=60)
    (before,) = run.validate(task, loader(INPUTS, LABELS), verbose=False)
    run.fit(task, loader(INPUTS, LABELS, batch_size=30, shuffle=True), loader(INPUTS, LABELS))
    (after,) = run.validate(task, loader(INPUTS, LABELS), verbose=False)
    assert after["val/nn_accuracy"] > before["val/nn_accuracy"] + 0.1


def test_probe_refuses_wrong_labels_and_outputs():
    for wrong in (LABELS.float(), LABELS.unsqueeze(1)):
        with pytest.raises(UsageError, match=r"they must be \(60,\) int64"):
            probe(embedding(), (INPUTS[:3], wrong[:3]), wrong)
    with pytest.raises(UsageError, match=r"outputs of shape \(3, 5, 1\): Embedding needs"):
        probe(embedding(network=nn.Unflatten(1, (5, 1))), (INPUTS[:3], LABELS[:3]), LABELS)


def test_k_below_one_is_refused():
    with pytest.raises(UsageError, match="Embedding was given k=0: it must be at least 1"):
        embedding(k=0)
