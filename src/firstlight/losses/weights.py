"""What a loss averages over: the weight of a batch in every mean over batches, processes and accumulated steps.

Shapes: `B` batch, `C` classes, `...` further axes of targets.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Averaged = Literal["samples", "elements", "targets", "own"]

_ELEMENTWISE = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


def averages_over(loss: Any) -> Averaged:
    """Return what the loss of a batch averages over.

    Returns:
        `"own"` if the loss has a method `batch_weight(targets)`; `"targets"` if it leaves out targets or weighs them by
        their class; `"elements"` if it is a mean over all numbers; otherwise `"samples"`.

    >>> averages_over(nn.CrossEntropyLoss()), averages_over(nn.MSELoss()), averages_over(nn.MultiMarginLoss())
    ('targets', 'elements', 'samples')
    """
    if callable(getattr(loss, "batch_weight", None)):
        return "own"
    if getattr(loss, "reduction", None) == "mean":
        if _is_likelihood(loss):
            return "targets"
        if _is_one_of(loss, _ELEMENTWISE):
            return "elements"
    return "samples"


def ignore_index(loss: Any) -> int | None:
    """Return the target that a cross-entropy or NLL loss ignores, or None."""
    return loss.ignore_index if _is_likelihood(loss) else None


def batch_weight(loss: Any, targets: Tensor) -> Tensor | int:
    """Return what a cross-entropy or likelihood divides its sum over a batch by, `()`: its mean is over this weight.

    Args:
        loss: `CrossEntropyLoss` or `NLLLoss`.
        targets: Class indices `(B, ...)`, or class probabilities `(B, C, ...)`.

    >>> targets = torch.tensor([0, 1, 1, 2])
    >>> batch_weight(nn.CrossEntropyLoss(ignore_index=2), targets)
    tensor(3)
    >>> batch_weight(nn.CrossEntropyLoss(torch.tensor([1.0, 10.0, 5.0])), targets)
    tensor(26.)
    """
    if targets.is_floating_point():
        return targets.numel() // targets.shape[1]
    return target_weights(loss, targets).sum()


def target_weights(loss: Any, targets: Tensor) -> Tensor:
    """Return the weight of each target `(B, ...)` in the mean of a cross-entropy or likelihood; 0 if it is ignored.

    >>> target_weights(nn.CrossEntropyLoss(torch.tensor([1.0, 10.0]), ignore_index=0), torch.tensor([0, 1]))
    tensor([ 0., 10.])
    """
    is_scored: Tensor = targets != loss.ignore_index
    return is_scored if loss.weight is None else loss.weight[targets.where(is_scored, 0)] * is_scored


def mean_loss(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of a cross-entropy or likelihood `()`, and 0 with a gradient of 0 if nothing is scored.

    torch divides 0 by 0 if all targets are ignored, or have the class weight 0.
    """
    if targets.is_floating_point():
        return loss(outputs, targets)  # type: ignore[no-any-return]
    weight = torch.as_tensor(batch_weight(loss, targets))
    is_plain = loss.weight is None and not getattr(loss, "label_smoothing", 0)  # torch's gradient is 0 then.
    if is_plain or not torch.is_grad_enabled():
        return torch.where(weight > 0, loss(outputs, targets), 0.0)
    options = {"weight": loss.weight, "ignore_index": loss.ignore_index, "reduction": "none"}
    if isinstance(loss, nn.NLLLoss):
        losses = F.nll_loss(outputs, targets, **options)
    else:
        losses = F.cross_entropy(outputs, targets, label_smoothing=loss.label_smoothing, **options)
    return losses.sum() / weight.where(weight > 0, 1)


def _is_likelihood(loss: Any) -> bool:
    return _is_one_of(loss, (nn.CrossEntropyLoss, nn.NLLLoss))


def _is_one_of(loss: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a loss is one of torch's. A subclass with its own `forward` is not."""
    return any(isinstance(loss, kind) and type(loss).forward is kind.forward for kind in kinds)
