"""Samples of one label belong near each other."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from firstlight.errors import UsageError
from firstlight.metrics.retrieval import RecallAtK
from firstlight.preflight.probe import described
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task

__all__ = ["Embedding"]


class Embedding(Task):
    """Embeddings `(B, D)` with labels `(B,)` int64, from which the loss takes pairs or positives inside the batch.

    Metrics, each in [0, 1], for `val/*` and `test/*` only: `nn_accuracy`, the share of samples whose nearest other
    sample of the split has their label, and `recall_at_k`, the share of those that find it among the nearest `k`; near
    is a large cosine.

    `val/loss` is the mean of the batches' losses, weighted by their samples. Since a batch's loss depends on what else
    is in it, values compare only at the same batch size.

    Args:
        network: Maps inputs to embeddings.
        loss: For example `firstlight.losses.SupervisedContrastiveLoss`.
        optimizer: See `Task`.
        schedule: See `Task`.
        k: Neighbours that count for `recall_at_k`, at least 1.
        **options: See `Task`; `monitor` is `val/loss`, `val/nn_accuracy` or `val/recall_at_k`.

    Raises:
        UsageError: When `k` is below 1, and as `Task` does.
    """

    # Neighbours are looked for among all samples, which takes time that grows with the square of their number.
    eval_only_metrics = frozenset({"nn_accuracy", "recall_at_k"})
    pairwise_loss = True

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        k: int = 5,
        **options: Any,
    ) -> None:
        if k < 1:
            raise UsageError(f"Embedding was given k={k}: at least 1 neighbour counts")
        metrics = {"nn_accuracy": RecallAtK(1), "recall_at_k": RecallAtK(k)}
        super().__init__(network, loss, optimizer, schedule, metrics, **options)

    def check(self, batch: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Refuse labels that are not whole numbers `(N,)`, and a network that gives no embeddings."""
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise UsageError(f"Embedding was given labels {described(targets)}: they are ({len(targets)},) int64")
        super().check(batch, targets)

    def check_outputs(self, outputs: Tensor, few: Tensor, targets: Tensor) -> None:
        """Refuse a network that gives no embeddings."""
        if outputs.ndim != 2:
            raise UsageError(
                f"{type(self.network).__name__} gives outputs of shape {tuple(outputs.shape)}: Embedding needs "
                "embeddings (B, D)"
            )

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `embedding` `(B, D)` and `target` `(B,)`."""
        inputs, targets = batch
        return {"embedding": self(inputs), "target": targets}
