"""Regression: each sample has one or several numbers as targets."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

from firstlight.errors import UsageError, check_range
from firstlight.schedules import Schedule
from firstlight.tasks.base import Task
from firstlight.tasks.checks import check_elementwise_outputs, check_elementwise_targets, check_same_shape

__all__ = ["Regression"]


class Regression(Task):
    """Outputs `(B, outputs)` against float32 targets `(B, outputs)` in the user's units.

    The network is trained on standardised targets, so losses are near 1 in any unit. The mean and standard deviation
    of the training targets are computed before the first step and saved in the checkpoint as `target_mean` and
    `target_std`; a resumed run keeps them. A constant target is divided by 1.

    Metrics and predictions are in the user's units: `mae`, `rmse` and `r2`, the last one for `val/*` and `test/*` only.
    With several outputs, `mae` and `rmse` are over all of them together, and `r2` is the mean over the outputs.

    Args:
        network: Maps inputs to standardised targets.
        loss: For example `torch.nn.MSELoss` or `torch.nn.HuberLoss`, of standardised numbers.
        optimizer: See `Task`.
        schedule: See `Task`.
        outputs: Targets per sample, at least 1.
        **options: See `Task`; `monitor` is `val/loss`, `val/mae`, `val/rmse` or `val/r2`.

    Raises:
        UsageError: When the training data set cannot be read twice.
    """

    # R2 compares with the mean of the targets, so it needs two samples.
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
        check_range(type(self).__name__, "[1, inf)", outputs=outputs)
        metrics = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False), "r2": R2Score()}
        super().__init__(network, optimizer, schedule, loss, metrics, **options)
        self.outputs = outputs
        self.register_buffer("target_mean", torch.zeros(outputs))
        self.register_buffer("target_std", torch.ones(outputs))

    def on_train_start(self) -> None:
        """Compute mean and standard deviation of the training targets, unless the run is resumed."""
        super().on_train_start()
        if self.trainer.ckpt_path:
            return
        # Every process reads the whole data set, so they need not communicate.
        with isolate_rng():
            targets = torch.cat([targets for _, targets in _all_batches(self.trainer.train_dataloader)]).double()
        constant = targets.amax(dim=0) == targets.amin(dim=0)
        self.target_mean.copy_(targets.mean(dim=0))
        self.target_std.copy_(targets.std(dim=0, correction=0).masked_fill(constant, 1))

    def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the loss against standardised targets, which must have exactly the outputs' shape."""
        check_same_shape(type(self).__name__, outputs, targets)
        return self.loss(outputs, (targets - self.target_mean) / self.target_std)  # type: ignore[no-any-return]

    def metric_inputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and targets in the user's units, both minus the target mean."""
        # No metric depends on the mean, and squares of large numbers would round small differences away.
        return outputs * self.target_std, targets - self.target_mean

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return `prediction` and `target`, each `(B,)`, or `(B, outputs)` if there are several."""
        inputs, targets = batch
        predictions = self.predict_outputs(inputs) * self.target_std + self.target_mean
        return {"prediction": predictions.squeeze(1), "target": targets.squeeze(1)}

    def check_targets(self, targets: Tensor) -> None:
        """Refuse targets that are not float32 `(N, outputs)`."""
        check_elementwise_targets(type(self).__name__, targets, self.outputs)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs that are not one for each target."""
        check_elementwise_outputs(type(self).__name__, type(self.network).__name__, outputs, self.outputs)


def _all_batches(loader: Any) -> DataLoader[Any]:
    """Return a loader of all samples of a loader's data set, in their order."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise UsageError(
            f"Regression computes the mean of the training targets, but cannot read {type(loader).__name__} twice: it "
            "needs a DataLoader of a data set with a length"
        )
    # A loader with a batch sampler has no batch size.
    return DataLoader(loader.dataset, batch_size=loader.batch_size or 1024, collate_fn=loader.collate_fn)
