"""Retrieval metrics: how well the nearest neighbours of an embedding share its label.

Shapes: `N` all embeddings of a split, `D` their width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from firstlight.errors import check_range
from firstlight.metrics.whole_split import WholeSplitMetric, exact

_MAX_ELEMENTS = 2**23  # Similarities in memory at once: 64 MiB.


def recall_at_k(embeddings: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the share of queries with a relevant sample among the `k` nearest.

    Each sample is a query. The nearest of the other samples are those with the largest cosine similarity; relevant are
    those with the label of the query. `k=1` gives the nearest-neighbour accuracy. Source: Oh Song et al., "Deep Metric
    Learning via Lifted Structured Feature Embedding", 2016. (`torchmetrics.retrieval.RetrievalRecall` divides by the
    number of relevant samples instead.)

    Args:
        embeddings: `(N, D)`.
        labels: `(N,)`.
        k: Retrieved samples per query, at least 1; if there are fewer others, all of them.

    Returns:
        The recall `()` in [0, 1]. A query whose label occurs only once counts as a miss.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.8]])
    >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 0]), k=1)
    tensor(0.5000)
    """
    directions = normalize(exact(embeddings), dim=1)
    total = len(labels)
    chunk = max(1, _MAX_ELEMENTS // total)
    hits = []
    for start in range(0, total, chunk):
        similarities = directions[start : start + chunk] @ directions.T
        similarities.diagonal(start).fill_(-torch.inf)  # A query does not retrieve itself.
        nearest = similarities.topk(min(k, total - 1)).indices
        hits.append((labels[nearest] == labels[start : start + chunk].unsqueeze(1)).any(dim=1))
    return torch.cat(hits).float().mean()


class RecallAtK(WholeSplitMetric):
    """`recall_at_k` over all embeddings `(B, D)` and labels `(B,)` of a split; NaN if no two samples share a label.

    Args:
        k: Retrieved samples per query, at least 1.
        **options: Arguments of `torchmetrics.Metric`.
    """

    def __init__(self, k: int = 1, **options: Any) -> None:
        super().__init__(**options)
        check_range("RecallAtK", "[1, inf)", k=k)
        self.k = k

    def undefined(self, targets: Tensor) -> str:
        """Return why the recall is undefined, or `""`."""
        is_alone = len(torch.unique(targets)) == len(targets)
        return super().undefined(targets) or ("no two samples have the same label" if is_alone else "")

    def function(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the recall `()`."""
        return recall_at_k(predictions, targets, self.k)
