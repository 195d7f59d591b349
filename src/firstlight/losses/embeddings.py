"""What the losses of embeddings share.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor

from firstlight.errors import UsageError

__all__ = ["prepared"]


def prepared(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return embeddings `(B, D)` that belong to labels `(B,)`, as float32 where they are of lower precision.

    Raises:
        UsageError: When the shapes do not fit: labels `(B, 1)` would broadcast to a wrong number.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise UsageError(
            f"the loss was given embeddings of shape {tuple(embeddings.shape)} and labels of shape "
            f"{tuple(labels.shape)}: they are (B, D) and (B,)"
        )
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
