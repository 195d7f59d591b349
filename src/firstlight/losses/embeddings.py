"""Check the inputs of losses that compare embeddings.

Shapes: `B` batch, `D` width of an embedding.
"""

import torch
from torch import Tensor

from firstlight.errors import UsageError


def check_embeddings(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return embeddings `(B, D)` in float32 or better, after a check that they fit labels `(B,)`.

    Raises:
        UsageError: If the shapes do not fit. Labels `(B, 1)` would broadcast to a wrong loss.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise UsageError(
            f"the loss was given embeddings of shape {tuple(embeddings.shape)} and labels of shape "
            f"{tuple(labels.shape)}: they must be (B, D) and (B,)"
        )
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
