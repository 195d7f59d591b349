"""Each token is predicted from those before it.

Shapes: `B` batch, `T` tokens of the longest sequence, `V` vocabulary.
"""

import math
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import text

from firstlight.errors import UsageError
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.observed import Observed

__all__ = ["BitsPerByte", "LanguageModel", "Perplexity"]


class Perplexity(text.Perplexity):
    """torchmetrics' own, of logits `(N, V)` and targets `(N,)` of which those that are 0 are not scored.

    Nothing waits for the device, and a logarithm is never taken of a probability that is rounded to 0.
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=0)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the negative log-likelihood of the targets, and their number."""
        self.total_log_probs += cross_entropy(preds, target, ignore_index=0, reduction="sum")
        self.count += (target != 0).sum()


class BitsPerByte(Perplexity):
    """The logarithm to base 2 of the perplexity: what a token costs, and a token is a byte."""

    def compute(self) -> Tensor:
        """Return the bits of a mean token."""
        return self.total_log_probs / self.count / math.log(2)


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

    def score(self, outputs: Tensor, targets: Tensor, observed: Observed) -> Tensor:
        """Return the loss of all tokens, and remember what the metrics need."""
        logits, flat = outputs.flatten(0, 1), targets.flatten()
        loss: Tensor = self.loss(logits, flat)
        observed.add(loss, logits, flat, scored=(flat != 0).sum())
        return loss

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse tokens outside the network's vocabulary, a network without a logit a token, and a scored padding."""
        super().check(batch, targets)
        with torch.no_grad():
            logits = self(batch[0][:1])[0, :1]
        self._refuse_unknown(targets, logits.shape[-1])
        one = torch.ones(1, dtype=torch.int64)
        padded = self.loss(logits.repeat(2, 1), torch.cat([one, 0 * one]))
        if not torch.isclose(padded, self.loss(logits, one)):
            raise UsageError(
                f"{type(self.loss).__name__} scores targets that are 0, where nothing is to be scored: "
                "give it ignore_index=0"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse a network without the logits of what follows each token."""
        if outputs.ndim != 3 or outputs.shape[:-1] != targets.shape:
            raise UsageError(
                f"{type(self.network).__name__} gives outputs of shape {tuple(outputs.shape)} for tokens of shape "
                f"{tuple(targets.shape)}: it must give the logits of what follows each token"
            )
        self._refuse_unknown(targets, outputs.shape[-1])

    def _refuse_unknown(self, targets: Tensor, vocabulary: int) -> None:
        if targets.max() >= vocabulary:
            raise UsageError(
                f"{type(self.network).__name__} has a vocabulary of {vocabulary}, so tokens are 0 to "
                f"{vocabulary - 1}, but there is a token {targets.max()}"
            )

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return of each sequence what its scored tokens cost, `bits_per_byte` `(B,)`, and their number, `bytes`."""
        tokens, targets = batch
        nats = cross_entropy(self(tokens).transpose(1, 2), targets, ignore_index=0, reduction="none").sum(1)
        scored = (targets != 0).sum(1)
        return {"bits_per_byte": nats / scored / math.log(2), "bytes": scored}
