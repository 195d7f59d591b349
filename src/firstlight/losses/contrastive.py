"""The contrastive loss of Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor, nn

from firstlight.errors import check_range
from firstlight.losses.embeddings import check_embeddings


def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Return a loss that pulls equal labels together and pushes different labels at least `margin` apart.

    A pair at the Euclidean distance `d` costs `d**2 / 2` if its labels are equal and `max(0, margin - d)**2 / 2` if
    not (equation 4 of the paper). Deviation: the paper sums over given pairs. Here the loss is the mean over all
    positive pairs of the batch plus the mean over all negative pairs. So the larger group does not dominate. The mean
    of an empty group is 0. The gradient at `d = 0`, where the distance is not differentiable, is 0.

    Args:
        embeddings: `(B, D)`; they are not normalised here.
        labels: `(B,)`.
        margin: Distance above which a negative pair costs nothing, above 0.

    Returns:
        The loss `()`, at least 0, in float32 or better.

    Raises:
        UsageError: If the shapes do not fit.

    >>> embeddings = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.4]])
    >>> contrastive_loss(embeddings[:2], torch.tensor([0, 0])).item()  # 0.6 ** 2 / 2
    0.18000000715255737
    >>> contrastive_loss(embeddings[::2], torch.tensor([0, 1])).item()  # (1 - 0.4) ** 2 / 2
    0.18000000715255737
    """
    distances = nn.functional.pdist(check_embeddings(embeddings, labels))
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    equal = labels[first] == labels[second]
    pulled = torch.where(equal, distances.square(), 0).sum() / equal.sum().clamp(min=1)
    pushed = torch.where(equal, 0, (margin - distances).relu().square()).sum() / (~equal).sum().clamp(min=1)
    return (pulled + pushed) / 2


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` of embeddings `(B, D)` and labels `(B,)`.

    Args:
        margin: Distance above which a negative pair costs nothing, above 0. Normalised embeddings are at most 2 apart.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        check_range(type(self).__name__, "(0, inf)", margin=margin)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `()`."""
        return contrastive_loss(embeddings, labels, self.margin)
