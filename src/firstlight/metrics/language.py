"""Perplexity and bits per byte from losses that are computed anyway.

Shapes: `N` batches.
"""

import math

from torch import Tensor
from torchmetrics import text

__all__ = ["BitsPerByte", "Perplexity"]


class Perplexity(text.Perplexity):
    """torchmetrics' own, of what the scored tokens of a batch cost in the mean, `(N,)` nats, and their numbers `(N,)`.

    Logits are not looked at again, nothing waits for the device, and a logarithm is never taken of a probability that
    is rounded to 0.
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=0)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add what the tokens cost, and their number; a batch without any costs nothing."""
        self.total_log_probs += (preds * target).where(target > 0, 0.0).sum()
        self.count += target.sum()


class BitsPerByte(Perplexity):
    """The logarithm to base 2 of the perplexity: what a token costs, and a token is a byte."""

    def compute(self) -> Tensor:
        """Return the bits of a mean token."""
        return self.total_log_probs / self.count / math.log(2)
