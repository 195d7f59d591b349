"""What every data module does: load, clean, split, scale with statistics of the training split alone, batch.

Shapes: `N` samples of a split, `B` of a batch; `...` whatever one sample is shaped like.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from firstlight.checkpoints.hyperparameters import keep_hyperparameters
from firstlight.checkpoints.trust import SafeLoading
from firstlight.compat import silence_known_warnings
from firstlight.data.clean import Missing, clean
from firstlight.data.files import digest_of
from firstlight.data.loader import BatchSizeIs, Loader, loader, per_process
from firstlight.data.samples import SPLITS, Batch, Samples, Split, TensorBatches
from firstlight.data.scale import Scale, statistics
from firstlight.data.split import Indices, split
from firstlight.errors import UsageError, about

__all__ = ["DataModule"]

_log = logging.getLogger(__name__)

COMPARED = ("class_names", "columns")
"""Fields of `Samples` that are to be what a checkpoint was trained on."""


class DataModule(SafeLoading, LightningDataModule, ABC):  # type: ignore[misc]  # rarer options by name only
    """Data that fits in memory. A subclass says what `load` returns; everything else is here.

    What was learned from the training split, and the class names, travel in the checkpoint, so that it can predict
    elsewhere: where the data has another digest than the checkpoint was trained on, all of it is the test split.

    Args:
        batch_size: Samples in a batch, at least 1.
        batch_size_is: Whether these are the samples of each process (`"per_process"`), or those of all processes
            together (`"global"`), which then divide them; accumulated batches count as several.
        split_seed: Seed of the split alone: another `seed_everything` trains on the same samples.
        val_fraction: Share of the samples that validates, in (0, 1). Of those that train, where the data has a test
            split of its own; nothing, where it has a validation split of its own, too.
        test_fraction: Share of the samples that tests, in (0, 1); nothing, where the data has a test split of its own.
        missing: A row with something missing or not finite is refused (`"refuse"`), or left out and counted
            (`"drop"`). With `"mean"`, NaN and what is empty in the inputs become the mean of the training split, and
            anything else is refused.
        num_workers: Processes that load batches. Batches in memory are fastest with 0.
        on_device: Whether the samples lie in the memory of the device that trains, validates or tests, so that no
            batch is brought there, which takes `num_workers=0`. None: on a CUDA device, where an eighth of what is
            free holds the split.
        augment: What is done to training batches of images, in this order, on the device: each takes and returns
            float32 `(B, C, H, W)` in [0, 1], for example `kornia.augmentation.RandomRotation`.

    Raises:
        UsageError: When a value is out of its range.
    """

    batches: ClassVar[type[TensorBatches]] = TensorBatches

    def __init__(
        self,
        batch_size: int = 32,
        split_seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        missing: Missing = "refuse",
        num_workers: int = 0,
        augment: list[nn.Module] | None = None,
        batch_size_is: BatchSizeIs = "per_process",
        on_device: bool | None = None,
    ) -> None:
        super().__init__()
        silence_known_warnings()
        keep_hyperparameters(self, {"inputs", "targets"}, augment=augment)
        name = type(self).__name__
        if batch_size < 1:
            raise UsageError(f"{name} was given batch_size={batch_size}: a batch has at least 1 sample")
        if num_workers < 0:
            raise UsageError(f"{name} was given num_workers={num_workers}: it cannot be negative")
        if num_workers and on_device:
            raise UsageError(f"{name} was given on_device=true and num_workers={num_workers}: there it takes 0 of them")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise UsageError(
                f"{name} was given val_fraction={val_fraction} and test_fraction={test_fraction}: "
                "both are above 0 and leave something to train on"
            )
        self.batch_size = batch_size
        self.batch_size_is: BatchSizeIs = batch_size_is
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.missing: Missing = missing
        self.num_workers = num_workers
        self.on_device = on_device
        self.augment = nn.Sequential(*(augment or []))
        self.exact = True
        self.dropped = 0
        self.indices: dict[Split, Indices] = {}
        self.fitted: dict[str, Any] = {}
        self._samples: Samples | None = None
        self._train: DataLoader[Batch] | None = None
        self._order: dict[str, Any] = {}
        self._scaled = Scale()

    @abstractmethod
    def load(self) -> Samples:
        """Return all samples, unsplit; what the checkpoint at hand has learned is in `fitted`."""

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return what `transform` must know of the training inputs `(N, ...)`, as tensors and plain values."""
        return {}

    def transform(self, inputs: Tensor) -> Tensor:
        """Return cleaned inputs `(N, ...)` as they are to be scaled; what `fit` returned is in `fitted`."""
        return inputs

    def setup(self, stage: str | None = None) -> None:
        """Load, clean, split and learn, once; for other stages than a fit not before a checkpoint had its say.

        Raises:
            UsageError: When the data cannot be used; the message says where.
        """
        if stage in (None, "fit") and not self.indices:
            self._prepare()

    @property
    def class_names(self) -> list[str]:
        """Name of each class; empty where targets are no classes, and before `setup`."""
        names: list[str] = self.fitted.get("class_names", [])
        return names

    def rows(self, split: Split) -> Indices:
        """Return the row of each sample of a split in the data as it was loaded."""
        return self._rows[self.indices[split]]

    def dataset(self, split: Split) -> TensorBatches:
        """Return the samples of a split: numbers scaled, missing ones the mean; pixels and tokens as they were loaded.

        Raises:
            UsageError: When there are none.
        """
        if not self.indices:
            self._prepare()
        samples, rows = self._samples, torch.from_numpy(self.indices[split])
        assert samples is not None and samples.targets is not None
        if not len(rows):
            raise UsageError(f"{self._source} is not what the checkpoint was trained on: all of it is the test split")
        inputs, targets = torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets)
        if not inputs.is_floating_point():
            return self.batches(inputs, targets, rows)
        inputs = self._scaled(self.transform(inputs[rows]), self.fitted).float().nan_to_num_(0.0)
        return self.batches(inputs, targets[rows])

    def prepare_batch(self, inputs: Tensor, train: bool = False) -> Tensor:
        """Return the inputs of a batch as a network takes them: pixels as scaled floats, tokens as int64.

        Args:
            inputs: `(B, ...)` from a loader.
            train: Whether to augment.
        """
        if inputs.is_floating_point():
            return inputs
        if inputs.dtype != torch.uint8:
            return inputs.long()
        if train and len(self.augment):
            return self._scaled(self.augment.to(inputs.device)(inputs.float().div_(255)), self.fitted)
        return self._scaled(inputs, self.fitted, 255)

    def tensors(self, split: Split) -> Batch:
        """Return all samples of a split as a network takes them, without augmentation: inputs and targets."""
        samples = self.dataset(split)
        return self.on_after_batch_transfer((samples.inputs, samples.targets), 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make of a batch on its device what the network takes."""
        inputs, targets = batch
        if not inputs.is_floating_point():
            # Lightning compares stages as texts, in half a dozen calls.
            trains = bool(len(self.augment)) and self.trainer is not None and self.trainer.training
            inputs = self.prepare_batch(inputs, trains)
            if self.trainer is not None:
                # Lightning converted the batch to the precision of the run when it held no floats yet.
                inputs = self.trainer.strategy.precision_plugin.convert_input(inputs)
        return inputs, targets if targets.is_floating_point() else targets.long()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches."""
        self._train = self._loader("train", shuffle=True)
        goes_on = self.trainer is not None and self.trainer.ckpt_path and self.exact
        if goes_on and self._order and isinstance(self._train, Loader):
            # Lightning 2.6.6 restores a loader too late when a schedule has asked for the number of steps before.
            self._train.load_state_dict(self._order)
        self._order = {}
        return self._train

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches.

        Raises:
            UsageError: When there are no targets to compare with.
        """
        loader = self._loader("test")
        assert self._samples is not None and self._samples.targets is not None
        if not self._samples.targets.size:
            raise UsageError(
                f"{self._samples.missing_reason or 'there are no targets'}: it can be predicted for, not tested"
            )
        return loader

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches: their order is that of `rows("test")`. Without targets these are `(B, 0)`."""
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to treat new samples as the training ones were; nothing before `setup`."""
        return {**self.fitted, **({"loader": self._train.state_dict()} if isinstance(self._train, Loader) else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint learned.

        Raises:
            UsageError: When the data at hand has other classes or columns than the checkpoint was trained on, or
                would go on with its training on other data.
        """
        self.fitted = dict(state_dict)
        self._order = self.fitted.pop("loader", {})
        if self.indices:
            self._prepare()

    def _prepare(self) -> None:
        """Load, unless it is done, and split; learn from the training split, or take what a checkpoint learned."""
        trainer = self.trainer
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if trainer is not None and trainer.ckpt_path and not fits and not self.fitted:
            raise UsageError(f"the checkpoint was trained without {type(self).__name__}: it cannot scale its samples")
        if self._samples is None or self._is_other(self._samples):
            self._samples, self._rows = self._load()
        samples = self._samples
        assert samples.targets is not None
        if self._is_other(samples):
            if fits:
                raise UsageError(f"{self._source} is not what the checkpoint was trained on: go on with the same data")
            _log.warning(
                f"{self._source} is not what the checkpoint was trained on: all of its {len(samples.inputs):,} samples "
                "are taken, also any that it may have learned from"
            )
            self.indices = {"train": np.arange(0), "val": np.arange(0), "test": np.arange(len(samples.inputs))}
        elif samples.missing_reason or not samples.targets.size:
            raise UsageError(samples.missing_reason or f"{self._source} has no targets to learn from")
        else:
            with about(self._source):
                self.indices = split(samples, self._rows, self.val_fraction, self.test_fraction, self.split_seed)
        if self.fitted:
            columns = self.transform(torch.from_numpy(samples.inputs[:1])).shape[1]
            refuse_others(self.fitted, samples, self._source, columns, self._split_digest)
        else:
            self._fit(samples)

    def _load(self) -> tuple[Samples, Indices]:
        loaded = self.load()
        with about(loaded.source or type(self).__name__):
            if len(self.augment) and not (loaded.inputs.dtype == np.uint8 and loaded.inputs.ndim == 4):
                raise UsageError("augment is for images, which are uint8 of (N, C, H, W)")
            samples, rows = clean(loaded, self.missing)
        self.dropped = len(loaded.inputs) - len(rows)
        return samples, rows

    def _is_other(self, samples: Samples) -> bool:
        """Tell whether a checkpoint was trained on other data than these samples are from."""
        return bool(self.fitted) and self.fitted["digest"] != samples.digest

    def _fit(self, samples: Samples) -> None:
        train = torch.from_numpy(samples.inputs[self.indices["train"]])
        mean, std = None, None
        self.fitted = {name: getattr(samples, name) for name in COMPARED}
        self.fitted |= {"digest": samples.digest, "split": self._split_digest}
        self.fitted |= self.fit(train)
        if train.is_floating_point() or train.dtype == torch.uint8:
            with about(self._source):
                mean, std = statistics(self.transform(train))
        self.fitted |= {"mean": mean, "std": std}

    @property
    def _split_digest(self) -> str:
        return digest_of(*(self.rows(split).tobytes() for split in SPLITS))

    @property
    def _source(self) -> str:
        return (self._samples and self._samples.source) or type(self).__name__

    def _loader(self, split: Split, shuffle: bool = False) -> DataLoader[Batch]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        size = per_process(self.batch_size, self.batch_size_is, processes)
        return loader(self.dataset(split), self.trainer, size, shuffle, self.num_workers, self.on_device)


def refuse_others(fitted: Mapping[str, Any], samples: Samples, source: str, columns: int, split: str) -> None:
    """Refuse samples that are not like those that a checkpoint was trained on.

    Args:
        fitted: What the checkpoint has learned.
        samples: After `clean`.
        source: What messages call them.
        columns: Number of their columns or channels, as a network gets them.
        split: Digest of their splits.

    Raises:
        UsageError: When classes or columns are others, or the same data is split in another way.
    """
    assert samples.targets is not None
    if fitted["digest"] == samples.digest and fitted["split"] != split:
        was = "split_seed, val_fraction, test_fraction and missing as they were"
        raise UsageError(f"the checkpoint learned from another split of {source}: give {was}")
    for name in COMPARED if samples.targets.size else ["columns"]:
        known, found = fitted[name], getattr(samples, name)
        if known != found:
            raise UsageError(f"the checkpoint was trained on the {name} {known}, but {source} has {found}")
    mean = fitted["mean"]
    if mean is not None and len(mean) != columns:
        raise UsageError(f"the checkpoint was trained on {len(mean)} columns or channels, but {source} has {columns}")
