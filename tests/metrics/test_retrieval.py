import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from firstlight.errors import UsageError
from firstlight.metrics import RecallAtK, recall_at_k

LABELS = torch.arange(60) % 4
INPUTS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + nn.functional.one_hot(LABELS, 5)


def recall_by_scikit_learn(embeddings, labels, k):
    search = NearestNeighbors(n_neighbors=k, metric="cosine").fit(embeddings)
    nearest = search.kneighbors(return_distance=False)  # Without queries, a sample is not its own neighbour.
    labels = np.asarray(labels)
    return (labels[nearest] == labels[:, None]).any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("most", [1, 130, 2**24], ids=["row by row", "in chunks", "at once"])
def test_recall_equals_the_recall_of_scikit_learns_neighbours(k, most, monkeypatch):
    monkeypatch.setattr("firstlight.metrics.retrieval._MAX_ELEMENTS", most)
    assert recall_at_k(INPUTS, LABELS, k).item() == pytest.approx(recall_by_scikit_learn(INPUTS, LABELS, k))


def test_recall_does_not_depend_on_the_length_of_embeddings():
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert recall_at_k(INPUTS * lengths, LABELS, 3) == recall_at_k(INPUTS, LABELS, 3)


@pytest.mark.parametrize("k", [1, 5])
def test_k_may_exceed_the_number_of_samples(k):
    assert recall_at_k(INPUTS[:1], LABELS[:1], k) == 0
    assert recall_at_k(INPUTS[:2], torch.tensor([3, 3]), k) == 1
    assert recall_at_k(INPUTS[:2], torch.tensor([3, 2]), k) == 0


def test_metric_retrieves_from_the_samples_of_all_batches():
    metric = RecallAtK(3)
    for part in torch.arange(60).split(7):
        metric.update(INPUTS[part], LABELS[part])
    assert metric.compute() == recall_at_k(INPUTS, LABELS, 3)


def test_k_below_one_is_refused():
    with pytest.raises(UsageError, match=r"RecallAtK was given k=0: it must be at least 1"):
        RecallAtK(0)
