"""What every data module does: load, clean, split, scale with statistics of the training split alone, batch.

Shapes: `N` samples of a split, `B` of a batch; `...` whatever one sample is shaped like.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from firstlight.compat import silence_known_warnings
from firstlight.data.clean import clean
from firstlight.errors import UsageError

__all__ = ["Batch", "DataModule", "Samples", "Split", "TensorBatches"]

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Samples:
    """What a data module loads, before anything is done to it.

    Args:
        inputs: `(N, ...)`, anything that can be read as numbers.
        targets: `(N, ...)`; integers are class indices.
        class_names: Name of each class; empty where targets are no classes.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    class_names: list[str] = field(default_factory=list)


class TensorBatches(Dataset[Batch]):
    """Samples in memory, of which a batch is taken by one indexing.

    Args:
        inputs: `(N, ...)`.
        targets: `(N, ...)`.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        """Return `N`."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        """Return one sample."""
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of the samples at `indices`."""
        index = torch.as_tensor(indices)
        return self.inputs.index_select(0, index), self.targets.index_select(0, index)


class DataModule(LightningDataModule):
    """Data that fits in memory. A subclass says what `load` returns; everything else is here.

    The statistics and the class names travel in the checkpoint, so that it can predict elsewhere.

    Args:
        batch_size: Samples in a batch, per process, at least 1.
        split_seed: Seed of the split alone: another `seed_everything` trains on the same samples.
        val_fraction: Share of the samples that validates, in (0, 1).
        test_fraction: Share of the samples that tests, in (0, 1).
        on_bad: A row with something that is no finite number is refused (`"refuse"`), or left out and counted
            (`"drop"`).
        num_workers: Processes that load batches. Batches in memory are fastest with 0.

    Raises:
        UsageError: When a value is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        split_seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        on_bad: Literal["refuse", "drop"] = "refuse",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        silence_known_warnings()
        self.save_hyperparameters(logger=False)
        name = type(self).__name__
        if batch_size < 1:
            raise UsageError(f"{name} was given batch_size={batch_size}: a batch has at least 1 sample")
        if num_workers < 0:
            raise UsageError(f"{name} was given num_workers={num_workers}: it cannot be negative")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise UsageError(
                f"{name} was given val_fraction={val_fraction} and test_fraction={test_fraction}: "
                "both are above 0 and leave something to train on"
            )
        self.batch_size = batch_size
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.on_bad: Literal["refuse", "drop"] = on_bad
        self.num_workers = num_workers
        self.dropped = 0
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self.class_names: list[str] = []
        self.indices: dict[Split, NDArray[np.int64]] = {}

    @abstractmethod
    def load(self) -> Samples:
        """Return all samples, unsplit."""

    def setup(self, stage: str | None = None) -> None:
        """Load, clean and split, once; `stage` makes no difference.

        Raises:
            UsageError: When the data cannot be used; the message says where.
        """
        if self.indices:
            return
        loaded = self.load()
        inputs, targets, self._rows = clean(loaded.inputs, loaded.targets, self.on_bad)
        self.dropped = len(loaded.inputs) - len(inputs)
        if self._mean is not None:
            self._check_class_names(self.class_names, loaded.class_names)
        self.class_names = loaded.class_names
        targets = self._labels(targets)
        self.indices = self._split(targets)
        self._inputs = torch.from_numpy(inputs)
        self._targets = torch.from_numpy(targets)
        # One number a feature, or a channel of an image: every axis but the second is averaged.
        train = self._inputs[self.indices["train"]].double()
        axes = [axis for axis in range(train.ndim) if axis != 1]
        if self._mean is not None:
            return  # A checkpoint was loaded before: its statistics stay.
        constant = (train.amax(axes, keepdim=True) == train.amin(axes, keepdim=True))[0]
        self._mean = train.mean(axes, keepdim=True)[0].float()
        self._std = train.std(axes, correction=0, keepdim=True)[0].float().masked_fill(constant, 1.0)

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Return the row of each sample of a split in the data as it was loaded."""
        return self._rows[self.indices[split]]

    def dataset(self, split: Split) -> TensorBatches:
        """Return the scaled samples of a split, after `setup`."""
        assert self._mean is not None and self._std is not None
        index = torch.from_numpy(self.indices[split])
        return TensorBatches((self._inputs[index] - self._mean) / self._std, self._targets[index])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches: their order is that of `rows("test")`."""
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to treat new samples as the training ones were."""
        return {"mean": self._mean, "std": self._std, "class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over statistics and class names.

        Raises:
            UsageError: When the data at hand has other classes than the checkpoint was trained on.
        """
        if self.indices:
            self._check_class_names(state_dict["class_names"], self.class_names)
        self._mean, self._std, self.class_names = (state_dict[key] for key in ("mean", "std", "class_names"))

    def _loader(self, split: Split, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            self.dataset(split),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )

    def _check_class_names(self, trained_on: list[str], found: list[str]) -> None:
        if trained_on != found:
            raise UsageError(f"the checkpoint was trained on the classes {trained_on}, but the data has {found}")

    def _labels(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Return class indices as int64, and other targets as they are."""
        if not self.class_names:
            return targets
        wrong = np.flatnonzero((targets < 0) | (targets >= len(self.class_names)) | (targets % 1 != 0))
        if len(wrong):
            raise UsageError(
                f"{type(self).__name__} has {len(self.class_names)} classes, but row {self._rows[wrong[0]]} has the "
                f"label {targets[wrong[0]]}: labels are 0 to {len(self.class_names) - 1}"
            )
        return targets.astype(np.int64)

    def _split(self, targets: NDArray[Any]) -> dict[Split, NDArray[np.int64]]:
        """Return the samples of each split, shuffled, with the classes in the same proportions in each."""
        rest: NDArray[np.int64] = np.arange(len(targets))
        held_out = []
        try:
            for fraction in (self.test_fraction, self.val_fraction):
                rest, part = train_test_split(
                    rest,
                    test_size=round(fraction * len(targets)),
                    random_state=self.split_seed,
                    stratify=targets[rest] if self.class_names else None,
                )
                held_out.append(part)
        except ValueError as error:
            raise UsageError(f"{type(self).__name__} cannot split {len(targets)} samples: {error}") from error
        return {"train": rest, "val": held_out[1], "test": held_out[0]}


def _as_it_is(batch: Any) -> Batch:
    """Collate nothing: the data set returns whole batches."""
    return cast(Batch, batch)
