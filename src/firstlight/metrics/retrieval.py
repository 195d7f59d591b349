"""How often the nearest neighbours of an embedding have its label.

Shapes: `N` all embeddings that were seen, `D` their width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["RecallAtK", "recall_at_k"]

_MOST_ELEMENTS = 2**24
"""Cosines held at once: 64 MiB."""


def recall_at_k(embeddings: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the share of samples of which one of the `k` nearest neighbours has the label.

    Neighbours are the other samples, the nearest the one with the largest cosine. A sample whose label no other has
    cannot be right. It is the recall@k of metric learning (Oh Song et al., "Deep Metric Learning via Lifted Structured
    Feature Embedding", 2016).

    Args:
        embeddings: `(N, D)`.
        labels: `(N,)`.
        k: Neighbours that count, at least 1; all others where there are fewer.

    Returns:
        The share `()` in [0, 1].

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 0.8]])
    >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 0]), k=1)
    tensor(0.5000)
    """
    directions = normalize(embeddings.float(), dim=1)
    total = len(labels)
    size = max(1, _MOST_ELEMENTS // total)
    found = []
    for start in range(0, total, size):
        cosines = directions[start : start + size] @ directions.T
        cosines.diagonal(start).fill_(-torch.inf)  # Itself.
        nearest = cosines.topk(min(k, total - 1)).indices
        found.append((labels[nearest] == labels[start : start + size].unsqueeze(1)).any(dim=1))
    return torch.cat(found).float().mean()


class RecallAtK(Metric):
    """`recall_at_k` of all embeddings `(B, D)` and labels `(B,)` that it was given.

    Args:
        k: Neighbours that count, at least 1.
        **options: What every `torchmetrics.Metric` takes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(self, k: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.k = k
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Remember a batch."""
        self.embeddings.append(embeddings)
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the share `()`."""
        return recall_at_k(dim_zero_cat(self.embeddings), dim_zero_cat(self.labels), self.k)
