"""The loss of Khosla et al., "Supervised Contrastive Learning", 2020.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor, nn

from firstlight.errors import check_range
from firstlight.losses.embeddings import check_embeddings


def supervised_contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy of picking, for each sample, the samples with its label among the rest of the batch.

    This is equation 2 of the paper, `L_out`, on cosine similarities. Deviations: it is the mean over the samples, not
    the sum, and samples without a positive pair are left out of the mean. Without any positive pair the loss is 0.

    Args:
        embeddings: `(B, D)`; their norms do not matter.
        labels: `(B,)`.
        temperature: Divisor of the cosine similarities, above 0. A small one gives near samples more weight.

    Returns:
        The loss `()`, at least 0, in float32 or better.

    Raises:
        UsageError: If the shapes do not fit.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> supervised_contrastive_loss(embeddings, torch.tensor([0, 0, 1]), temperature=1.0)  # log(e + 1) - 1
    tensor(0.3133)
    """
    # Autocast would multiply in 16 bits, and dividing by the temperature would amplify the rounding.
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = nn.functional.normalize(check_embeddings(embeddings, labels), dim=1)
        logits = directions @ directions.T / temperature
    is_self = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_probabilities = logits - logits.masked_fill(is_self, -torch.inf).logsumexp(dim=1, keepdim=True)
    positives = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~is_self
    counts = positives.sum(dim=1)
    per_sample = torch.where(positives, log_probabilities, 0).sum(dim=1) / counts.clamp(min=1)
    return -per_sample.sum() / (counts > 0).sum().clamp(min=1)


class SupervisedContrastiveLoss(nn.Module):
    """`supervised_contrastive_loss` of embeddings `(B, D)` and labels `(B,)`.

    Args:
        temperature: Divisor of the cosine similarities, above 0. A small one gives near samples more weight.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_range(type(self).__name__, "(0, inf)", temperature=temperature)
        self.temperature = temperature

    def batch_weight(self, labels: Tensor) -> Tensor:
        """Return the number of samples with a positive pair `()`, over which the loss is a mean."""
        return (labels.unsqueeze(0) == labels.unsqueeze(1)).sum(dim=1).gt(1).sum()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `()`."""
        return supervised_contrastive_loss(embeddings, labels, self.temperature)
