"""The loss of Khosla et al., "Supervised Contrastive Learning", 2020.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor, nn

from firstlight.errors import UsageError
from firstlight.losses.embeddings import prepared

__all__ = ["SupervisedContrastiveLoss", "supervised_contrastive_loss"]


def supervised_contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of finding, for each sample, the others of its label among all others of the batch.

    It is equation 2 of the paper, `L_out`, on the cosines between embeddings, with two deviations: the mean over the
    samples is taken and not their sum, and a sample whose label no other has counts neither in it nor as 0. A batch
    in which no two labels are equal has the loss 0.

    Args:
        embeddings: `(B, D)`; only their directions count.
        labels: `(B,)`.
        temperature: Divides the cosines, above 0; the smaller, the more the nearest others count.

    Returns:
        The loss `()`, at least 0, in float32 or better.

    Raises:
        UsageError: When the shapes do not fit.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> supervised_contrastive_loss(embeddings, torch.tensor([0, 0, 1]), temperature=1.0)  # log(e + 1) - 1
    tensor(0.3133)
    """
    # Mixed precision would multiply in 16 bits, whose rounding the temperature enlarges.
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = nn.functional.normalize(prepared(embeddings, labels), dim=1)
        logits = directions @ directions.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_probabilities = logits - logits.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    positives = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    counts = positives.sum(dim=1)
    per_sample = torch.where(positives, log_probabilities, 0).sum(dim=1) / counts.clamp(min=1)
    return -per_sample.sum() / (counts > 0).sum().clamp(min=1)


class SupervisedContrastiveLoss(nn.Module):
    """`supervised_contrastive_loss` of embeddings `(B, D)` and labels `(B,)`.

    Args:
        temperature: Divides the cosines, above 0; the smaller, the more the nearest others count.

    Raises:
        UsageError: When `temperature` is not above 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise UsageError(f"SupervisedContrastiveLoss was given temperature={temperature}: it is above 0")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `()`."""
        return supervised_contrastive_loss(embeddings, labels, self.temperature)
