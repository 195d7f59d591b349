"""Each token is predicted from those before it.

Shapes: `B` batch, `T` tokens of the longest sequence, `V` vocabulary.
"""

import math
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from firstlight.errors import UsageError
from firstlight.metrics import BitsPerByte, Perplexity
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task

__all__ = ["LanguageModel"]


class LanguageModel(Task):
    """Logits `(B, T, V)` against the tokens that follow, `(B, T)` int64; metrics: `perplexity`, `bits_per_byte`.

    Targets are the tokens shifted by one, and 0 where nothing is scored. The loss is given logits `(B * T, V)` and
    targets `(B * T,)`, and the mean over a split is one over its scored tokens.

    Args:
        network: Maps tokens `(B, T)` to logits.
        loss: For example `torch.nn.CrossEntropyLoss(ignore_index=0)`.
        optimizer: See `Task`.
        schedule: See `Task`.
        **options: See `Task`; `monitor` is `val/loss`, `val/perplexity` or `val/bits_per_byte`.

    Raises:
        UsageError: As `Task` does.
    """

    def __init__(
        self, network: nn.Module, loss: nn.Module, optimizer: OptimizerCallable, schedule: Schedule, **options: Any
    ) -> None:
        metrics = {"perplexity": Perplexity(), "bits_per_byte": BitsPerByte()}
        super().__init__(network, loss, optimizer, schedule, metrics, **options)

    def compute_loss(self, outputs: Tensor, targets: Tensor, split_metrics: SplitMetrics) -> Tensor:
        """Return the loss of all tokens, and remember what the metrics need."""
        logits, flat = outputs.flatten(0, 1), targets.flatten()
        loss: Tensor = self.loss(logits, flat)
        scored = (flat != 0).sum()
        nats = loss if _is_likelihood(self.loss) else cross_entropy(logits.detach(), flat, ignore_index=0)
        split_metrics.update(loss, nats[None], scored[None], scored=scored)
        return loss

    def check_outputs(self, outputs: Tensor, few: Tensor, targets: Tensor) -> None:
        """Refuse a network without a logit for each token that may follow, and a loss that scores padding."""
        network, loss = type(self.network).__name__, type(self.loss).__name__
        if outputs.ndim != 3 or outputs.shape[:-1] != few.shape:
            raise UsageError(
                f"{network} gives outputs of shape {tuple(outputs.shape)} for tokens of shape {tuple(few.shape)}: it "
                "must give the logits of what follows each token"
            )
        vocabulary = outputs.shape[-1]
        if targets.max() >= vocabulary:
            raise UsageError(
                f"{network} has a vocabulary of {vocabulary}, so tokens are 0 to {vocabulary - 1}, but there is a "
                f"token {targets.max()}"
            )
        one, logits = torch.ones(1, dtype=torch.int64), outputs[0, :1]
        padded = self.loss(logits.repeat(2, 1), torch.cat([one, 0 * one]))
        if not torch.isclose(padded, self.loss(logits, one)):
            raise UsageError(f"{loss} scores targets that are 0, where nothing is to be scored: give it ignore_index=0")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return of each sequence what its scored tokens cost, `bits_per_byte` `(B,)`, and their number, `bytes`."""
        tokens, targets = batch
        nats = cross_entropy(self(tokens).transpose(1, 2), targets, ignore_index=0, reduction="none").sum(1)
        scored = (targets != 0).sum(1)
        return {"bits_per_byte": nats / scored / math.log(2), "bytes": scored}


def _is_likelihood(loss: nn.Module) -> bool:
    """Tell whether a loss is what a scored token costs in the mean, so that it need not be computed again."""
    if not isinstance(loss, nn.CrossEntropyLoss) or type(loss).forward is not nn.CrossEntropyLoss.forward:
        return False
    counts_all_alike = loss.weight is None and not loss.label_smoothing and loss.reduction == "mean"
    return counts_all_alike and loss.ignore_index == 0
