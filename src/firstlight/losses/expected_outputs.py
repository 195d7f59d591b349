"""How each loss of torch reads the outputs of a network.

`docs/losses.md` lists the pairs of tasks and losses.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from firstlight.errors import UsageError
from firstlight.losses.contrastive import ContrastiveLoss
from firstlight.losses.supervised_contrastive import SupervisedContrastiveLoss

Outputs = Literal[
    "logits", "log_probabilities", "probabilities", "scores", "standardised", "log_rates", "rates", "raw", "embeddings"
]
"""How a task reads outputs. Scores can be compared, but are not logits. Rates are expected counts. Raw outputs have the
units of the targets."""

Pairs = Mapping[type[nn.Module], Outputs]

TOKENS: Pairs = {nn.CrossEntropyLoss: "logits", nn.NLLLoss: "log_probabilities"}
CLASSES: Pairs = {**TOKENS, nn.MultiMarginLoss: "scores"}
ZEROS_AND_ONES: Pairs = {
    nn.BCEWithLogitsLoss: "logits",
    nn.BCELoss: "probabilities",
    nn.MultiLabelSoftMarginLoss: "logits",
}
NUMBERS: Pairs = {
    nn.MSELoss: "standardised",
    nn.L1Loss: "standardised",
    nn.SmoothL1Loss: "standardised",
    nn.HuberLoss: "standardised",
    nn.PoissonNLLLoss: "log_rates",
}
EMBEDDINGS: Pairs = {SupervisedContrastiveLoss: "embeddings", ContrastiveLoss: "embeddings"}

_NEEDS: Mapping[str, str] = {
    "BCELoss": "probabilities and targets that are 0 or 1",
    "BCEWithLogitsLoss": "logits and targets that are 0 or 1",
    "CTCLoss": "sequences and their lengths",
    "CosineEmbeddingLoss": "pairs of embeddings",
    "CrossEntropyLoss": "logits and class indices",
    "GaussianNLLLoss": "a variance beside each output",
    "HingeEmbeddingLoss": "distances and targets that are -1 or 1",
    "KLDivLoss": "log-probabilities and distributions as targets",
    "MarginRankingLoss": "pairs of outputs",
    "MultiLabelMarginLoss": "lists of class indices as targets",
    "MultiLabelSoftMarginLoss": "logits and targets that are 0 or 1",
    "MultiMarginLoss": "scores and class indices",
    "NLLLoss": "log-probabilities and class indices",
    "PoissonNLLLoss": "rates and counts",
    "SoftMarginLoss": "targets that are -1 or 1",
    "TripletMarginLoss": "triplets of embeddings",
    "TripletMarginWithDistanceLoss": "triplets of embeddings",
}


def expected_outputs(owner: str, loss: Any, pairs: Pairs) -> Outputs:
    """Return how a loss reads outputs, or refuse a loss of torch or firstlight that does not fit the task.

    A loss of the user reads them as its attribute `expects` says. Without it, it reads them as the class of torch that
    it extends, or as the first loss of the pairs.

    Args:
        owner: Name of the task.
        loss: Any callable.
        pairs: The losses that the task takes; the first one is the usual one.

    Raises:
        UsageError: If the task cannot take the loss.

    >>> expected_outputs("Classification", nn.NLLLoss(), CLASSES)
    'log_probabilities'
    """
    usual = next(iter(pairs))
    expects: Outputs | None = getattr(loss, "expects", None)
    if expects is not None:
        known = [*dict.fromkeys(pairs.values()), *(("rates", "raw") if "log_rates" in pairs.values() else ())]
        if expects not in known:
            raise UsageError(
                f"{type(loss).__name__}.expects is {expects}: for {owner}, it must be {' or '.join(known)}"
            )
        return expects
    if isinstance(loss, nn.PoissonNLLLoss) and nn.PoissonNLLLoss in pairs:
        return "log_rates" if loss.log_input else "rates"
    for kind, outputs in pairs.items():
        if isinstance(loss, kind):
            return outputs
    forward = getattr(type(loss), "forward", None)
    is_of_torch = getattr(forward, "__module__", "").startswith("torch.")
    if is_of_torch or any(forward is kind.forward for kind in EMBEDDINGS):
        name = type(loss).__name__
        expected = f", which expects {_NEEDS[name]}" if name in _NEEDS else ""
        example = f"{usual.__module__.replace('torch.nn.modules.loss', 'torch.nn')}.{usual.__name__}"
        raise UsageError(f"{owner} cannot take {name}{expected}: use {example}")
    return pairs[usual]
