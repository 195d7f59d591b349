"""Losses that minimise something else than the task is about.

Shapes: `B` batch, `C` classes.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, mse_loss, nll_loss, one_hot


class FlippedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with the wrong sign."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return -super().forward(outputs, targets)


class FlippedBinary(nn.BCEWithLogitsLoss):
    """Binary cross-entropy with the wrong sign."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return -super().forward(outputs, targets)


class FlippedSquares(nn.MSELoss):
    """Mean squared error with the wrong sign."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()`."""
        return -super().forward(outputs, targets)


class WithoutLogSoftmax(nn.Module):
    """Negative log-likelihood of logits: the log-softmax was forgotten."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits `(B, C)`."""
        return nll_loss(outputs, targets)


class WithoutSoftmax(nn.Module):
    """Mean logarithm of the outputs as if they were probabilities: the softmax was forgotten."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits `(B, C)`."""
        return nll_loss(outputs.clamp(1e-7, 1).log(), targets)


class WithoutSigmoid(nn.Module):
    """Binary cross-entropy of logits as if they were probabilities: the sigmoid was forgotten."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits and targets `(B, ...)`."""
        return binary_cross_entropy(outputs.clamp(0, 1), targets)


class SquaredIndex(nn.Module):
    """Squared difference of every output and the number of the class, as if classes were numbers."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits `(B, C)`."""
        return (outputs - targets[:, None]).square().mean()


class AbsoluteOneHot(nn.Module):
    """Mean absolute difference from one-hot targets: most of them are 0, so 0 for all classes is a minimum."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits `(B, C)`."""
        return (outputs - one_hot(targets, outputs.shape[1])).abs().mean()


class SquaredBinary(nn.Module):
    """Squared error of the mean of a batch of logits, not of each logit."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of logits and targets `(B, ...)`."""
        return (outputs.mean() - targets.mean()).square()


class Broadcast(nn.Module):
    """Squared error of outputs `(B, 1)` and targets `(B,)`: each output is compared with all targets of the batch."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of outputs and targets `(B, 1)`."""
        return mse_loss(*torch.broadcast_tensors(outputs, targets.squeeze(1)))


class NumbersAsClasses(nn.Module):
    """Binary cross-entropy for targets that are any numbers."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss `()` of outputs and targets `(B, ...)`."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
