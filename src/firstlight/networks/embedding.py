"""Networks whose outputs are compared with each other.

Shapes: `B` batch, `D` dimensions of an embedding.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import normalize

from firstlight.errors import UsageError
from firstlight.networks.layers import check_sizes

__all__ = ["EmbeddingNet"]


class EmbeddingNet(nn.Module):
    """A backbone and a projection head of linear, ReLU, linear, scaled to length 1 (Chen et al., "SimCLR", 2020).

    Inputs are what the backbone takes; outputs are `(B, dimensions)`, each with a Euclidean norm of 1.

    Args:
        backbone: Maps inputs to `(B, features)`.
        features: Number of outputs of the backbone, and the width of the head's hidden layer.
        dimensions: Numbers in an embedding, at least 2: with one, nothing but its sign would be left.

    Raises:
        UsageError: When a number is too small.
    """

    def __init__(self, backbone: nn.Module, features: int, dimensions: int) -> None:
        check_sizes(type(self).__name__, features=features)
        if dimensions < 2:
            raise UsageError(f"{type(self).__name__} was given dimensions={dimensions}: an embedding has at least 2")
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dimensions))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the embeddings `(B, dimensions)` of `inputs`."""
        return normalize(cast(Tensor, self.head(self.backbone(inputs))), dim=1)
