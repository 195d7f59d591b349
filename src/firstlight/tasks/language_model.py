"""Language modelling: predict each token from those before it.

Shapes: `B` batch, `T` tokens of the longest sequence, `V` vocabulary.
"""

import math
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from firstlight.errors import UsageError
from firstlight.losses.expected_outputs import TOKENS
from firstlight.metrics import BitsPerByte, Perplexity
from firstlight.metrics.whole_split import exact
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import at_least_float32
from firstlight.tasks.gradient_weights import may_hold


class LanguageModel(Task):
    """Logits `(B, T, V)` against the next tokens, `(B, T)` int64; metrics: `perplexity`, `bits_per_byte`.

    Targets are the tokens shifted by one, and 0 where nothing is scored. The loss gets logits `(B * T, V)` and targets
    `(B * T,)`. All means weigh a batch by its scored tokens.

    Args:
        network: Maps tokens `(B, T)` to logits.
        loss: For example `torch.nn.CrossEntropyLoss(ignore_index=0)`.
        optimizer: See `Task`.
        schedule: See `Task`.
        **options: See `Task`; `monitor` is `val/loss`, `val/perplexity` or `val/bits_per_byte`.
    """

    losses = TOKENS

    def __init__(
        self, network: nn.Module, loss: nn.Module, optimizer: OptimizerCallable, schedule: Schedule, **options: Any
    ) -> None:
        metrics = {"perplexity": Perplexity(), "bits_per_byte": BitsPerByte()}
        super().__init__(network, optimizer, schedule, loss, metrics=metrics, **options)
        self._scores_all = False  # Whether no training target is padding.

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the loss over all tokens of the batch."""
        return super().compute_loss(outputs.flatten(0, 1), targets.flatten())

    def metric_inputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the cross-entropy `(1,)` and the token count `(1,)` of a batch; `None` if they are loss and weight."""
        if self._minimises_likelihood():
            return None
        nats = cross_entropy(at_least_float32(outputs.detach()).flatten(0, 1), targets.flatten(), ignore_index=0)
        return nats[None], (targets != 0).sum()[None]

    def on_train_start(self) -> None:
        """Count scored tokens at each step, which several processes tell each other, only if there is padding."""
        is_count = self.averages_over == "samples" or (
            self.averages_over == "targets" and self.loss.weight is None and self.loss.ignore_index == 0
        )
        is_own = any(map(self.is_overridden, ("training_step", "shared_step", "batch_weight")))
        self._scores_all = is_count and not is_own and not may_hold(self.trainer.train_dataloader, 0)
        super().on_train_start()

    def batch_weight(self, targets: Tensor) -> Tensor | int:
        """Return the number of scored tokens, or the sum of their class weights."""
        if self._scores_all and self.training:
            return targets.numel()
        return (targets != 0).sum() if self.averages_over == "samples" else super().batch_weight(targets)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `bits_per_byte` `(B,)`, the mean over the scored tokens of a sequence, and their number, `bytes`."""
        tokens, targets = batch
        logits = exact(self.predict_outputs(tokens)).transpose(1, 2)
        nats = cross_entropy(logits, targets, ignore_index=0, reduction="none").sum(1)
        scored = (targets != 0).sum(1)
        return {"bits_per_byte": nats / scored / math.log(2), "bytes": scored}

    def export_step(self, inputs: Any) -> dict[str, Tensor]:
        """Return `logits` `(B, T, V)` of the token after each token."""
        return {"logits": self.predict_outputs(inputs)}

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs without a logit for each possible next token, and a loss that scores padding."""
        network = type(self.network).__name__
        if outputs.ndim != 3 or outputs.shape[1:-1] != targets.shape[1:]:
            raise UsageError(
                f"{network} returns outputs of shape {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}: it must return the logits of the token after each token, (B, T, V)"
            )
        vocabulary = outputs.shape[-1]
        if targets.max() >= vocabulary:
            raise UsageError(
                f"{network} has a vocabulary of {vocabulary}, so tokens must be 0 to {vocabulary - 1}, but there is a "
                f"token {targets.max()}"
            )
        if self.is_overridden("compute_loss"):
            return
        one, logits = torch.ones(1, dtype=torch.int64, device=outputs.device), outputs[0, :1]
        padded, plain = self.loss(logits.repeat(2, 1), torch.cat([one, 0 * one])), self.loss(logits, one)
        if isinstance(plain, Tensor) and not torch.isclose(padded, plain):
            raise UsageError(
                f"{type(self.loss).__name__} scores targets that are 0, which mark padding: give it ignore_index=0"
            )

    def _minimises_likelihood(self) -> bool:
        """Return whether the loss is the mean cross-entropy of the scored tokens, so that metrics can reuse it."""
        loss, is_own = self.loss, type(self).compute_loss is not LanguageModel.compute_loss
        if is_own or self.averages_over != "targets" or not isinstance(loss, nn.CrossEntropyLoss):
            return False
        return loss.ignore_index == 0 and loss.weight is None and not loss.label_smoothing
