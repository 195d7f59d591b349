"""Perplexity and bits per byte, computed from the losses of `N` batches instead of logits."""

import math

import torch
from torch import Tensor
from torchmetrics import text


class Perplexity(text.Perplexity):
    """torchmetrics' perplexity, updated with the mean cross-entropies `(N,)` of batches and their token counts `(N,)`.

    The logits are not read a second time and nothing waits for the device. torchmetrics takes the logarithm of a
    probability, which may have been rounded to 0; a cross-entropy stays finite.
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=0)
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the mean cross-entropies of batches, in nats, and their token counts; a batch without tokens adds 0."""
        self.total_log_probs += (preds * target).where(target > 0, 0.0).sum()
        self.count += target.sum()


class BitsPerByte(Perplexity):
    """Binary logarithm of the perplexity: the mean cost of a token in bits, where each token is a byte."""

    def compute(self) -> Tensor:
        """Return the bits per byte `()`."""
        return self.total_log_probs / self.count / math.log(2)
