"""Each sample has one number, or several."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

from firstlight.errors import UsageError
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.schedules import Schedule
from firstlight.tasks.elementwise import Elementwise

__all__ = ["Regression"]


class Regression(Elementwise):
    """Outputs `(B, outputs)` against float32 targets `(B, outputs)` in the user's units.

    The network learns standardised targets, so the loss is one of numbers near 1 whatever the units are: their mean and
    standard deviation over the training data set are taken before the first step, and travel in the checkpoint as
    `target_mean` and `target_std`. A run that goes on keeps those of its checkpoint. A constant target is divided by 1.

    Metrics and predictions are in the user's units: `mae`, `rmse` and `r2`, the last one for `val/*` and `test/*` only.
    With several outputs `mae` and `rmse` are taken over all of them as one, and `r2` is the mean of theirs.

    Args:
        network: Maps inputs to standardised targets.
        loss: For example `torch.nn.MSELoss` or `torch.nn.HuberLoss`, of standardised numbers.
        optimizer: See `Task`.
        schedule: See `Task`.
        outputs: Targets of a sample, at least 1.
        **options: See `Task`; `monitor` is `val/loss`, `val/mae`, `val/rmse` or `val/r2`.

    Raises:
        UsageError: When `outputs` is below 1, when targets are not of the outputs' shape, when the training batches
            come from no data set that can be read twice, and as `Task` does.
    """

    # It compares with the mean of what it sees, and needs two samples.
    eval_only_metrics = frozenset({"r2"})

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        outputs: int = 1,
        **options: Any,
    ) -> None:
        if outputs < 1:
            raise UsageError(f"Regression was given outputs={outputs}: there is at least 1")
        metrics = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False), "r2": R2Score()}
        super().__init__(network, loss, optimizer, schedule, metrics, **options)
        self.width = outputs
        self.register_buffer("target_mean", torch.zeros(outputs))
        self.register_buffer("target_std", torch.ones(outputs))

    def on_train_start(self) -> None:
        """Take mean and standard deviation of the training targets, unless a checkpoint brought them."""
        super().on_train_start()
        if self.trainer.ckpt_path:
            return
        # Every process reads the whole data set, so they need not talk to each other.
        with isolate_rng():
            targets = torch.cat([targets for _, targets in _in_order(self.trainer.train_dataloader)]).double()
        constant = targets.amax(dim=0) == targets.amin(dim=0)
        self.target_mean.copy_(targets.mean(dim=0))
        self.target_std.copy_(targets.std(dim=0, correction=0).masked_fill(constant, 1))

    def compute_loss(self, outputs: Tensor, targets: Tensor, split_metrics: SplitMetrics) -> Tensor:
        """Return the loss against standardised targets, and remember the metrics' numbers in the user's units."""
        self.refuse_other_shape(outputs, targets)
        centred = targets - self.target_mean
        loss: Tensor = self.loss(outputs, centred / self.target_std)
        # Moved by the mean, which no metric sees: the squares of large numbers would drown small differences.
        split_metrics.update(loss, outputs * self.target_std, centred)
        return loss

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` and `target`, each `(B,)`, or `(B, outputs)` where there are several."""
        inputs, targets = batch
        predictions = self(inputs) * self.target_std + self.target_mean
        return {"prediction": predictions.squeeze(1), "target": targets.squeeze(1)}


def _in_order(loader: Any) -> DataLoader[Any]:
    """Return the batches of a loader's whole data set, in the order of the data set."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise UsageError(
            f"Regression takes the mean of the training targets, but cannot read {type(loader).__name__} twice: "
            "it needs a DataLoader of a data set with a length"
        )
    # A loader with a sampler of batches has no batch size.
    return DataLoader(loader.dataset, batch_size=loader.batch_size or 1024, collate_fn=loader.collate_fn)
