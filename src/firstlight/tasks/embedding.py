"""Metric learning: samples of one label should lie near each other."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from firstlight.errors import UsageError, check_range
from firstlight.losses.expected_outputs import EMBEDDINGS
from firstlight.metrics.retrieval import RecallAtK
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import check_labels


class Embedding(Task):
    """Embeddings `(B, D)` with labels `(B,)` int64, from which the loss forms pairs or positives within a batch.

    Retrieval metrics, each in [0, 1], for `val/*` and `test/*` only: `recall_at_k`, the share of samples with a sample
    of their label among the `k` nearest of the split, and `nn_accuracy`, the same for the nearest one. Nearest means
    the largest cosine similarity.

    `val/loss` is the mean of the batches' losses, weighted by their samples. The loss of a batch depends on the other
    samples in it, so losses compare only at the same batch size.

    Args:
        network: Maps inputs to embeddings.
        loss: For example `firstlight.losses.SupervisedContrastiveLoss`.
        optimizer: See `Task`.
        schedule: See `Task`.
        k: Retrieved samples for `recall_at_k`, at least 1.
        **options: See `Task`; `monitor` is `val/loss`, `val/nn_accuracy` or `val/recall_at_k`.
    """

    losses = EMBEDDINGS

    # They compare each sample with all others, in a time that grows with the square of their number.
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
        check_range(type(self).__name__, "[1, inf)", k=k)
        metrics = {"nn_accuracy": RecallAtK(1), "recall_at_k": RecallAtK(k)}
        super().__init__(network, optimizer, schedule, loss, metrics=metrics, **options)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `embedding` `(B, D)` and `target` `(B,)`."""
        inputs, targets = batch
        return {"embedding": self.predict_outputs(inputs), "target": targets}

    def check_targets(self, targets: Tensor) -> None:
        """Refuse labels that are not `(N,)` int64."""
        check_labels(type(self).__name__, targets)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs that are not `(B, D)`."""
        if outputs.ndim != 2:
            raise UsageError(
                f"{type(self.network).__name__} returns outputs of shape {tuple(outputs.shape)}: {type(self).__name__} "
                "needs embeddings (B, D)"
            )
