"""The contrastive loss of Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor, nn

from firstlight.errors import UsageError
from firstlight.losses.embeddings import prepared

__all__ = ["ContrastiveLoss", "contrastive_loss"]


def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Pull embeddings of one label together, and push those of different labels apart until they are `margin` apart.

    For a pair at the Euclidean distance `d` it is equation 4 of the paper: `d**2 / 2` when the labels are equal,
    `max(0, margin - d)**2 / 2` when they are not. The paper sums over given pairs; here all pairs of the batch are
    taken, and the mean over the equal ones and the mean over the others are added, so that the more numerous kind does
    not outweigh the other. A batch without pairs of a kind has 0 for their mean. At `d = 0`, where the distance has
    no gradient, 0 is taken.

    Args:
        embeddings: `(B, D)`, taken as they are, not normalised.
        labels: `(B,)`.
        margin: Distance from which on a pair of different labels costs nothing, above 0.

    Returns:
        The loss `()`, at least 0, in float32 or better.

    Raises:
        UsageError: When the shapes do not fit.

    >>> embeddings = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.4]])
    >>> contrastive_loss(embeddings[:2], torch.tensor([0, 0])).item()  # 0.6 ** 2 / 2
    0.18000000715255737
    >>> contrastive_loss(embeddings[::2], torch.tensor([0, 1])).item()  # (1 - 0.4) ** 2 / 2
    0.18000000715255737
    """
    distances = nn.functional.pdist(prepared(embeddings, labels))
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    equal = labels[first] == labels[second]
    pulled = torch.where(equal, distances.square(), 0).sum() / equal.sum().clamp(min=1)
    pushed = torch.where(equal, 0, (margin - distances).relu().square()).sum() / (~equal).sum().clamp(min=1)
    return (pulled + pushed) / 2


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` of embeddings `(B, D)` and labels `(B,)`.

    Args:
        margin: Distance from which on a pair of different labels costs nothing, above 0. Normalised embeddings are at
            most 2 apart.

    Raises:
        UsageError: When `margin` is not above 0.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        if not margin > 0:
            raise UsageError(f"ContrastiveLoss was given margin={margin}: it is above 0")
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `()`."""
        return contrastive_loss(embeddings, labels, self.margin)
