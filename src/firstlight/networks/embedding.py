"""Networks that map inputs to embeddings, which retrieval and contrastive losses compare.

Shapes: `B` batch, `D` dimensions of an embedding.
"""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import normalize

from firstlight.errors import check_range


class EmbeddingNet(nn.Module):
    """A backbone, a projection head of linear, ReLU, linear, and L2 normalisation (Chen et al., "SimCLR", 2020).

    The backbone defines the shape of the inputs. Outputs are `(B, dimensions)`, each with a Euclidean norm of 1.

    Args:
        backbone: Maps inputs to `(B, features)`.
        features: Number of outputs of the backbone and width of the head's hidden layer.
        dimensions: Size of an embedding, at least 2: one number of length 1 keeps only its sign.

    Raises:
        UsageError: If a number is too small.
    """

    def __init__(self, backbone: nn.Module, features: int, dimensions: int) -> None:
        check_range(type(self).__name__, "[1, inf)", features=features)
        check_range(type(self).__name__, "[2, inf)", dimensions=dimensions)
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dimensions))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the embeddings `(B, dimensions)` of `inputs`."""
        return normalize(cast(Tensor, self.head(self.backbone(inputs))), dim=1)
