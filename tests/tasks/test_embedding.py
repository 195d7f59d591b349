import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from firstlight.errors import UsageError
from firstlight.losses import ContrastiveLoss, SupervisedContrastiveLoss
from firstlight.metrics.retrieval import RecallAtK, recall_at_k
from firstlight.networks import MLP
from firstlight.tasks import Embedding
from tests.tasks.helpers import loader, parts, predicted, trainer

LABELS = torch.arange(60) % 4
INPUTS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + nn.functional.one_hot(LABELS, 5)


def embedding(**changes):
    torch.manual_seed(0)
    return Embedding(**{**parts(MLP(5, [8], 3), SupervisedContrastiveLoss()), **changes})


def by_scikit_learn(embeddings, labels, k):
    search = NearestNeighbors(n_neighbors=k, metric="cosine").fit(embeddings)
    nearest = search.kneighbors(return_distance=False)  # Without data to ask for, a sample is not its own neighbour.
    labels = np.asarray(labels)
    return (labels[nearest] == labels[:, None]).any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("most", [1, 130, 2**24], ids=["row by row", "in chunks", "at once"])
def test_neighbour_recall_equals_scikit_learns_neighbours(k, most, monkeypatch):
    monkeypatch.setattr("firstlight.metrics.retrieval._MOST_ELEMENTS", most)
    assert recall_at_k(INPUTS, LABELS, k).item() == pytest.approx(by_scikit_learn(INPUTS, LABELS, k))


def test_the_length_of_an_embedding_does_not_count():
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert recall_at_k(INPUTS * lengths, LABELS, 3) == recall_at_k(INPUTS, LABELS, 3)


@pytest.mark.parametrize("k", [1, 5])
def test_few_samples_have_few_neighbours(k):
    assert recall_at_k(INPUTS[:1], LABELS[:1], k) == 0
    assert recall_at_k(INPUTS[:2], torch.tensor([3, 3]), k) == 1
    assert recall_at_k(INPUTS[:2], torch.tensor([3, 2]), k) == 0


def test_the_metric_sees_the_samples_of_all_batches():
    metric = RecallAtK(3)
    for part in torch.arange(60).split(7):
        metric.update(INPUTS[part], LABELS[part])
    assert metric.compute() == recall_at_k(INPUTS, LABELS, 3)


def test_test_metrics_equal_scikit_learns_of_the_predictions(tmp_path):
    task, batches = embedding(k=4), loader(INPUTS, LABELS, batch_size=7)
    (found,) = trainer(tmp_path).test(task, batches, verbose=False)
    predictions = predicted(task, batches, tmp_path)
    assert predictions["embedding"].shape == (60, 3)
    assert torch.equal(predictions["target"], LABELS)
    assert found["test/nn_accuracy"] == pytest.approx(by_scikit_learn(predictions["embedding"], LABELS, 1))
    assert found["test/recall_at_k"] == pytest.approx(by_scikit_learn(predictions["embedding"], LABELS, 4))
    losses = [task.loss(predictions["embedding"][part], LABELS[part]).item() for part in torch.arange(60).split(7)]
    expected = np.average(losses, weights=[len(part) for part in torch.arange(60).split(7)])
    assert found["test/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [ContrastiveLoss, SupervisedContrastiveLoss])
def test_training_brings_equal_labels_together(loss, tmp_path):
    task, run = embedding(loss=loss()), trainer(tmp_path, max_epochs=60)
    (before,) = run.validate(task, loader(INPUTS, LABELS), verbose=False)
    run.fit(task, loader(INPUTS, LABELS, batch_size=30, shuffle=True), loader(INPUTS, LABELS))
    (after,) = run.validate(task, loader(INPUTS, LABELS), verbose=False)
    assert after["val/nn_accuracy"] > before["val/nn_accuracy"] + 0.1


def test_the_check_refuses_what_does_not_fit():
    for wrong in (LABELS.float(), LABELS.unsqueeze(1)):
        with pytest.raises(UsageError, match=r"they are \(60,\) int64"):
            embedding().check((INPUTS[:3], wrong[:3]), wrong)
    with pytest.raises(UsageError, match=r"outputs of shape \(3, 5, 1\): Embedding needs"):
        embedding(network=nn.Unflatten(1, (5, 1))).check((INPUTS[:3], LABELS[:3]), LABELS)


def test_no_neighbour_is_refused():
    with pytest.raises(UsageError, match="k=0"):
        embedding(k=0)
