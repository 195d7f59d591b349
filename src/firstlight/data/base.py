"""The base class of every data module: load, clean, split, fit, scale, batch.

Shapes: `N` samples of a split, `B` batch; `...` shape of one sample.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from firstlight.checkpoints.hyperparameters import keep_hyperparameters
from firstlight.checkpoints.trust import SafeLoading
from firstlight.data import quality
from firstlight.data.clean import Missing, MissingTargets, clean
from firstlight.data.files import digest_of
from firstlight.data.fitted import COMPARED_FIELDS, check_compatible, check_fitted, is_other_data
from firstlight.data.loader import BatchSizeIs, Loader, make_loader, per_process
from firstlight.data.memory import SHARE, free_memory
from firstlight.data.quality.finding import Finding
from firstlight.data.raw import as_trained, samples_like
from firstlight.data.samples import SPLITS, Batch, Samples, Split, StoredBatches, TensorBatches
from firstlight.data.scale import Preparation, Scaler, statistics
from firstlight.data.shown import show
from firstlight.data.split import split
from firstlight.data.split_by import describe
from firstlight.data.stored import Indices, Stored
from firstlight.errors import UsageError, about, check_range, refuse_other_trainer

_log = logging.getLogger(__name__)


class _RefusesOtherTrainer:
    """The attribute `trainer`. A trainer of `pytorch_lightning` sets it before it calls any hook."""

    def __set__(self, owner: LightningDataModule, trainer: Trainer | None) -> None:
        refuse_other_trainer(type(owner).__name__, trainer)
        vars(owner)["trainer"] = trainer  # There is no `__get__`, so reading it costs nothing.


class _StoredNumbers:
    """Scale numbers as they are read from disk. It holds no data module, so that a worker process can get it."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self._scaler = Scaler(mean, std)

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._scaler(inputs.double()).float().nan_to_num_(0.0)


_OF_A_FIT = frozenset(
    {
        *("batch_size", "batch_size_is", "num_workers", "on_device", "augment", "trainer"),
        *("resume_exactly", "joins_validation", "_train_loader", "_loader_state", "_is_warned"),
    }
)
"""Attributes of a data module that belong to one fit, and not to the samples."""


class DataModule(SafeLoading, LightningDataModule, ABC):  # type: ignore[misc]  # load_from_checkpoint takes fewer arguments
    """Data in memory, or read from disk batch by batch. A subclass implements `load`; this class does the rest.

    The fitted state, which includes the statistics of the training split and the class names, travels in the
    checkpoint. So a checkpoint can score other data: if the content differs from the data that the checkpoint was
    trained on, all samples belong to the test split.

    Args:
        batch_size: Samples in a batch, at least 1.
        batch_size_is: Whether `batch_size` counts per process (`"per_process"`) or over all processes (`"global"`).
            Gradient accumulation multiplies it in both cases.
        split_seed: Seed of the split. It is independent of `seed_everything`, so runs with other seeds share a split.
        val_fraction: Share of the samples for validation, in (0, 1). If the data has its own test split, it is a share
            of the training samples. If the data also has its own validation split, it is ignored.
        test_fraction: Share of the samples for testing, in (0, 1). If the data has its own test split, it is ignored.
        missing: How rows with missing or invalid inputs are handled. `"refuse"`: raise an error. `"drop"`: drop the
            rows and print their number. `"mean"`: replace missing inputs by the mean of the training split (a `Table`
            with `scale="quantile"`: by the median), and refuse invalid inputs.
        missing_targets: How rows with missing or invalid targets are handled. `"refuse"`: raise an error. `"drop"`:
            drop the rows and print their number.
        num_workers: Processes that load batches. 0 is fastest for data in memory.
        on_device: Whether the samples are kept in the memory of the training device, which needs `num_workers=0` and
            saves the transfer of each batch. None: on a CUDA device, if the split needs at most 1/8 of its free memory.
        augment: Augmentations of training images, applied in this order on the device. Each takes and returns float32
            `(B, C, H, W)` in [0, 1], for example `RandomShift` or `kornia.augmentation.RandomRotation`.
        folds: Number of folds of a cross-validation, at least 2. They share the test split, and divide all other
            samples: each is the validation sample of one fold. `val_fraction` is ignored. None: no folds.
        fold: Fold whose samples are for validation, from 0 to `folds - 1`. It must be given with `folds`.

    Raises:
        UsageError: If an argument is out of range.
    """

    dataset_class: ClassVar[type[TensorBatches]] = TensorBatches
    in_memory: bool | None = None
    tokens_are_bytes: ClassVar[bool] = False
    """True if a token is a byte of a text plus one, and 0 is padding."""
    trainer: Any = _RefusesOtherTrainer()

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
        missing_targets: MissingTargets = "refuse",
        folds: int | None = None,
        fold: int | None = None,
    ) -> None:
        super().__init__()
        keep_hyperparameters(self, {"inputs", "targets"}, augment=augment)
        name = type(self).__name__
        check_range(name, "[1, inf)", batch_size=batch_size)
        check_range(name, "[0, inf)", num_workers=num_workers)
        check_range(name, "(0, 1)", val_fraction=val_fraction, test_fraction=test_fraction)
        if num_workers and on_device:
            given = f"{name} was given on_device=true and num_workers={num_workers}"
            raise UsageError(f"{given}: on_device needs num_workers=0")
        if val_fraction + test_fraction >= 1:
            given = f"{name} was given val_fraction={val_fraction} and test_fraction={test_fraction}"
            raise UsageError(f"{given}: their sum must be below 1")
        if (folds is None) != (fold is None):
            raise UsageError(f"{name} was given folds={folds} and fold={fold}: give both, or none of them")
        if folds is not None and fold is not None:
            check_range(name, "[2, inf)", folds=folds)
            check_range(f"{name} with folds={folds}", f"[0, {folds})", fold=fold)
        self.batch_size = batch_size
        self.batch_size_is: BatchSizeIs = batch_size_is
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folds = folds
        self.fold = fold
        self.missing: Missing = missing
        self.missing_targets: MissingTargets = missing_targets
        self.num_workers = num_workers
        self.on_device = on_device
        self.augment = nn.Sequential(*(augment or []))
        self.resume_exactly = True
        self.joins_validation = False  # True for a run that trains on the validation samples, too.
        self.dropped = 0
        self.indices: dict[Split, Indices] = {}
        self.fitted: dict[str, Any] = {}
        self._samples: Samples | None = None
        self._findings: list[Finding] | None = None
        self._scaler: Scaler | None = None
        self._is_warned = False
        self._train_loader: DataLoader[Batch] | None = None
        self._loader_state: dict[str, Any] = {}

    @abstractmethod
    def load(self) -> Samples:
        """Return all samples, before the split. `fitted` holds the fitted state of a loaded checkpoint, if any."""

    def samples_from(self, raw: Any) -> Samples:
        """Return raw inputs of a program as `load` returns those of its source; `fitted` is that of a checkpoint.

        Here `raw` is an array or tensor `(N, ...)` like the inputs that `load` returns, or a DataFrame or a list of
        dicts with their columns. It is never a path: `prepare` gives paths to `load`.

        Raises:
            UsageError: If type or shape of the inputs differ from those of the training data.
        """
        return samples_like(raw, self.fitted["dtype"], self.fitted["shape"], self.fitted["columns"], self._source)

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return what `transform` needs to know of the training inputs `(N, ...)`, as tensors and plain values.

        Inputs that stay on disk are not passed, and not transformed: the argument has no sample then.
        """
        return {}

    def check_fitted(self, state: dict[str, Any]) -> None:
        """Refuse the fitted state of a checkpoint if it has another form than `fit` gives it: anybody may have made it.

        Raises:
            UsageError: With the entry that is wrong.
        """
        check_fitted(type(self).__name__, state)

    def transform(self, inputs: Tensor) -> Tensor:
        """Return the inputs to scale for cleaned inputs `(N, ...)`. `fitted` holds what `fit` returned."""
        return inputs

    def scale_statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of training inputs `(N, C, ...)`, both `(C, 1, ...)`."""
        return statistics(features)

    def setup(self, stage: str | None = None) -> None:
        """Load, clean, split and fit the data once. Other stages than `fit` do so when a checkpoint is loaded."""
        if stage in (None, "fit") and not self.indices:
            self._prepare()

    def share(self, other: "DataModule") -> None:
        """Take the samples that another module with the same options has loaded, cleaned, split and fitted.

        The options of batches may differ: `batch_size`, `batch_size_is`, `num_workers`, `on_device` and `augment`.
        """
        other.setup("fit")
        for name, value in vars(other).items():
            if name not in _OF_A_FIT and "hparams" not in name:
                setattr(self, name, value)
        self.fitted = dict(other.fitted)

    @property
    def class_names(self) -> list[str]:
        """Name of each class; empty for targets that are not classes, and before `setup`."""
        return cast(list[str], self.fitted.get("class_names", []))

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of networks and tasks that the data determine, by name.

        They are `in_features`, the values of a sample; `numeric_features`, how many of them, which come first, are
        numbers; `in_channels` of images; `classes` or `labels`; and `out_features`, the numbers that a network returns
        for a sample: one for each class, label or target, and one for two classes with targets `(N, 1)`. The command
        line fills arguments of these names that are left out.
        """
        inputs, targets = self.on_after_batch_transfer(self.dataset("train")[[0]], 0)
        found = {"in_features": inputs[0].numel()}
        if inputs.ndim == 2 and inputs.is_floating_point():
            found["numeric_features"] = inputs.shape[1]
        if inputs.ndim == 4:
            found["in_channels"] = inputs.shape[1]
        count = len(self.class_names)
        if targets.ndim == 1 and count:
            return {**found, "classes": count, "out_features": count}
        if targets.ndim == 2:
            found["out_features"] = targets.shape[1]
        return {**found, "labels": count} if count > 1 and targets.shape[1] > 1 else found

    @property
    def cleaned_samples(self) -> Samples:
        """The cleaned samples of all splits, before they are scaled; `indices` says which belong to which split."""
        if not self.indices:
            self._prepare()
        assert self._samples is not None
        return self._samples

    def names(self, split: Split) -> list[str]:
        """Return the name of each sample of a split, for example the path of its file; empty if samples have none."""
        rows, names = self.rows(split), self.cleaned_samples.names
        return [names[row] for row in rows] if names else []

    def show(self, split: Split, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return samples at positions of a split as people see them: see `firstlight.data.shown.show`."""
        samples, rows = self.cleaned_samples, self._indices(split)
        return [show(samples, int(rows[position]), self.tokens_are_bytes) for position in positions]

    @property
    def split_note(self) -> str:
        """How a group or time has split the samples; `""` if it has not, and before `setup`."""
        return describe(self._samples, self.indices) if self._samples is not None and self.indices else ""

    def findings(self) -> list[Finding]:
        """Return what looks wrong in the data, the most severe first; nothing if no sample is for training."""
        samples = self.cleaned_samples
        if self._findings is None:
            has_train = len(self.indices["train"]) > 0
            found = (samples, self._rows, self.indices, self.dropped, self.hparams)
            self._findings = quality.find(*found) if has_train else []
        return self._findings

    def findings_before_split(self) -> list[Finding]:
        """Return what looks wrong in the data when no split exists, and maybe none can be made."""
        samples, rows = self._load()
        return quality.find(samples, rows, {"train": np.arange(len(rows))}, self.dropped, self.hparams)

    def rows(self, split: Split) -> Indices:
        """Return for each sample of a split its row in the loaded data, before rows were dropped."""
        if not self.indices:
            self._prepare()
        return self._rows[self._indices(split)]

    def _indices(self, split: Split) -> Indices:
        if split == "train" and self.joins_validation:
            return np.concatenate([self.indices["train"], self.indices["val"]])
        return self.indices[split]

    def dataset(self, split: Split) -> TensorBatches:
        """Return the samples of a split. Numbers are scaled, and missing ones filled; pixels and tokens stay.

        Targets that are numbers are float64. Loaders make them float32, unless the module has `exact_targets = True`.
        """
        samples, rows = self.cleaned_samples, torch.from_numpy(self._indices(split))
        if not len(rows):
            raise UsageError(
                f"{self._source} has no {split} split: it is not the data that the checkpoint was trained on, so all "
                "samples are test samples"
            )
        return self._dataset(samples, rows)

    def read_from(self, path: str) -> None:
        """Let `load` read another file or folder, to predict."""
        self.path = path

    def prepare(self, raw: Any) -> tuple[TensorBatches, Samples, Indices]:
        """Return raw inputs as a dataset like those of `dataset`, with the statistics of the training data.

        Args:
            raw: What `samples_from` takes, or the path of a file or folder like that of the training data.

        Returns:
            The dataset, the samples as they were loaded, and the row of each sample in them, because `missing="drop"`
            drops rows.

        Raises:
            UsageError: If the inputs cannot be prepared, or no statistics were fitted or loaded.
        """
        if not self.fitted:
            raise UsageError(f"{type(self).__name__} was not fitted: it has no statistics to scale the inputs with")
        fresh = copy.copy(self)  # `load` keeps what it finds in the inputs, and other threads use this object.
        fresh.indices, fresh._samples = {}, None
        if not isinstance(raw, str | Path):
            loaded = fresh.samples_from(raw)
        elif hasattr(fresh, "path"):
            fresh.read_from(str(raw))
            loaded = replace(fresh.load(), split=None)
        else:
            raise UsageError(f"{type(self).__name__} reads no file, so it cannot read {raw}: give arrays")
        samples, rows = fresh._clean(loaded)
        return fresh._dataset(samples, torch.arange(len(rows))), loaded, rows

    def preparation(self) -> nn.Module:
        """Return how raw inputs become those of the network, as a module that can be exported."""
        return Preparation(self.encoder(), self.fitted["mean"], self.fitted["std"])

    def encoder(self) -> nn.Module | None:
        """Return the fitted module in `transform` that takes `numbers`; None if `transform` changes nothing."""
        return None

    def numbers(self, inputs: Tensor) -> Tensor:
        """Return cleaned inputs `(N, ...)` as `preparation` takes them: floats with NaN if missing, uint8 or int64."""
        return inputs if inputs.is_floating_point() or inputs.dtype == torch.uint8 else inputs.long()

    def columns_described(self) -> list[dict[str, Any]]:
        """Return what each column of the inputs holds, as plain values by name; empty if columns have no names."""
        names = self.fitted["columns"][: self.fitted["shape"][0]]
        return [{"name": name, "kind": "number"} for name in names]

    def raw_numbers(self, split: Split, positions: Indices) -> Tensor:
        """Return samples at positions of `dataset(split)` as `preparation` takes them."""
        inputs = self.cleaned_samples.inputs
        return self.numbers(torch.from_numpy(inputs[self._indices(split)[positions]]))

    def _dataset(self, samples: Samples, rows: Tensor) -> TensorBatches:
        assert samples.targets is not None
        targets = samples.targets if isinstance(samples.targets, Stored) else torch.from_numpy(samples.targets)
        if isinstance(samples.inputs, Stored):
            numbers = samples.inputs.dtype.kind in "fb"
            prepare = _StoredNumbers(self.fitted["mean"], self.fitted["std"]) if numbers else None
            return StoredBatches(samples.inputs, targets, rows, prepare)
        inputs = torch.from_numpy(samples.inputs)
        assert isinstance(targets, Tensor)
        if not inputs.is_floating_point():
            return self.dataset_class(inputs, targets, rows)
        inputs = self._scale(self.transform(inputs[rows])).float().nan_to_num_(0.0)
        return self.dataset_class(inputs, targets[rows])

    def prepare_batch(self, inputs: Tensor, train: bool = False) -> Tensor:
        """Return inputs `(B, ...)` as the network takes them: scaled floats, augmented if `train`, or tokens int64."""
        if inputs.is_floating_point():
            return inputs
        if inputs.dtype != torch.uint8:
            return inputs.long()
        if train and len(self.augment):
            inputs = self.augment.to(inputs.device)(inputs.float().div_(255))
        return self._scale(inputs)

    def tensors(self, split: Split) -> Batch:
        """Return inputs and targets of a whole split as the network takes them, without augmentation."""
        samples = self.dataset(split)
        return self.on_after_batch_transfer((samples.inputs, samples.targets), 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return a batch, already on its device, as the network takes it."""
        inputs, targets = batch
        if not inputs.is_floating_point():
            # Asked only if needed: `trainer.training` is slow.
            train = bool(len(self.augment)) and self.trainer is not None and self.trainer.training
            inputs = self.prepare_batch(inputs, train)
            if self.trainer is not None:
                # Lightning converted the batch to the precision of the run before the inputs were floats.
                inputs = self.trainer.strategy.precision_plugin.convert_input(inputs)
        return inputs, targets if targets.is_floating_point() else targets.long()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches."""
        self._train_loader = self._loader("train", shuffle=True)
        resumes = self.trainer is not None and self.trainer.ckpt_path and self.resume_exactly
        if resumes and self._loader_state and isinstance(self._train_loader, Loader):
            # Lightning 2.6.6 restores a loader too late if a schedule has asked for the number of steps before.
            self._train_loader.load_state_dict(self._loader_state)
        self._loader_state = {}
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches, or refuse data without targets."""
        loader = self._loader("test")
        assert self._samples is not None and self._samples.targets is not None
        if not self._samples.targets.size:
            reason = self._samples.missing_reason or f"{self._source} has no targets"
            raise UsageError(f"only predict works without targets: {reason}")
        return loader

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches in the order of `rows("test")`. Without targets, targets are `(B, 0)`."""
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted state and the position of the training loader; nothing before `setup`."""
        loader = self._train_loader
        return {**self.fitted, **({"loader": loader.state_dict()} if isinstance(loader, Loader) else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the fitted state of a checkpoint, or refuse data that does not fit it."""
        if state_dict or not isinstance(state_dict, dict):
            self.check_fitted(state_dict)
        self.fitted = dict(state_dict)
        self._scaler = None
        self._loader_state = self.fitted.pop("loader", {})
        if self.indices:
            self._prepare()

    def _prepare(self) -> None:
        """Load and split the data. Then fit it, or compare it with the fitted state of a checkpoint."""
        trainer = self.trainer
        is_fit = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if trainer is not None and trainer.ckpt_path and not is_fit and not self.fitted:
            fault = f"the checkpoint was trained without {type(self).__name__}"
            raise UsageError(f"{fault}: it has no statistics to scale the inputs with")
        self._findings = None
        if self._samples is None or is_other_data(self.fitted, self._samples):
            self._samples, self._rows = self._load()
        samples = self._samples
        assert samples.targets is not None
        if is_other_data(self.fitted, samples):
            other = f"{self._source} is not the data that the checkpoint was trained on"
            if is_fit:
                raise UsageError(f"{other}: resume with the same data")
            if trainer is None or trainer.state.fn != TrainerFn.PREDICTING:  # A prediction has no score to mislead.
                _log.warning(f"{other}: all {len(samples.inputs):,} rows are used; some may be training rows")
            self.indices = {"train": np.arange(0), "val": np.arange(0), "test": np.arange(len(samples.inputs))}
        elif samples.missing_reason or not samples.targets.size:
            raise UsageError(samples.missing_reason or f"{self._source} has no targets to train on")
        else:
            with about(self._source):
                self.indices = split(
                    samples,
                    self._rows,
                    self.val_fraction,
                    self.test_fraction,
                    self.split_seed,
                    None if self.folds is None or self.fold is None else (self.fold, self.folds),
                )
        if self.fitted:
            first = torch.from_numpy(samples.inputs[:1])
            check_compatible(self.fitted, samples, self._source, lambda: self.transform(first), self._split_digest)
        else:
            self._fit(samples)

    def _load(self) -> tuple[Samples, Indices]:
        loaded = self.load()
        samples, rows = self._clean(loaded)
        self.dropped = len(loaded.inputs) - len(rows)
        return samples, rows

    def _clean(self, loaded: Samples) -> tuple[Samples, Indices]:
        inputs = loaded.inputs
        with about(loaded.source or type(self).__name__):
            if len(self.augment) and not (inputs.dtype == np.uint8 and inputs.ndim == 4):
                raise UsageError(
                    f"augment needs images, uint8 (N, C, H, W), but the inputs are {inputs.dtype} {inputs.shape}"
                )
            if self.fitted and inputs.dtype.kind in "biuf":
                loaded = replace(loaded, inputs=as_trained(inputs, self.fitted["dtype"], self.fitted["shape"]))
            return clean(loaded, self.missing, self.missing_targets)

    def fits_in_memory(self, nbytes: int, source: str) -> bool:
        """Return whether to keep data of this size in memory: as `in_memory` says, or if it takes 1/4 of what is free.

        The processes of a run on this machine share the free memory.
        """
        if self.in_memory is not None:
            return self.in_memory
        free = free_memory()
        if nbytes * SHARE * (1 if self.trainer is None else self.trainer.num_devices) <= free:
            return True
        needs = f"{source} needs {nbytes / 2**30:.1f} GiB in memory, more than 1/{SHARE} of the free {free / 2**30:.1f}"
        _log.warning(f"{needs} GiB: each batch is read from disk; in_memory=true keeps it in memory")
        return False

    def _fit(self, samples: Samples) -> None:
        stored = samples.inputs if isinstance(samples.inputs, Stored) else None
        train_rows = self.indices["train"]  # Not those of a joined split, so that sizes stay those of `config.yaml`.
        train = torch.from_numpy(samples.inputs[train_rows if stored is None else slice(0)])
        mean, std = None, None
        self.fitted = {name: getattr(samples, name) for name in COMPARED_FIELDS}
        self.fitted |= {"digest": samples.digest, "split": self._split_digest}
        self.fitted |= {"dtype": str(samples.inputs.dtype), "shape": list(train.shape[1:])}
        self.fitted |= self.fit(train)
        if train.is_floating_point() or train.dtype == torch.uint8:
            with about(self._source):
                if stored is None:
                    mean, std = self.scale_statistics(self.transform(train))
                else:
                    mean, std = statistics(torch.from_numpy(chunk) for chunk in stored.chunks(train_rows))
        self.fitted |= {"mean": mean, "std": std}

    def _scale(self, inputs: Tensor) -> Tensor:
        if self._scaler is None:
            if self.fitted["mean"] is None:
                raise UsageError(f"the checkpoint was trained on tokens, but {self._source} has numbers or pixels")
            self._scaler = Scaler(self.fitted["mean"], self.fitted["std"])
        return self._scaler(inputs)

    @property
    def _split_digest(self) -> str:
        return digest_of(*(self._rows[self.indices[split]].tobytes() for split in SPLITS))

    @property
    def _source(self) -> str:
        return (self._samples and self._samples.source) or type(self).__name__

    def _loader(self, split: Split, shuffle: bool = False) -> DataLoader[Batch]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        size = per_process(self.batch_size, self.batch_size_is, processes)
        dataset = self.dataset(split)
        assert self._samples is not None and self._samples.targets is not None
        if self._samples.targets.dtype == np.float64 and not self._keeps_float64():
            self._warn_rounded(dataset.targets)
            dataset = dataset.with_targets(torch.float32)
        return make_loader(dataset, self.trainer, size, shuffle, self.num_workers, self.on_device)

    def _keeps_float64(self) -> bool:
        """Return whether batches hold float64 targets: the module asks for them, and the device has float64."""
        if self.trainer is None or self.trainer.strategy.root_device.type == "mps":
            return False
        return getattr(self.trainer.lightning_module, "exact_targets", False)

    def _warn_rounded(self, targets: Tensor) -> None:
        """Warn once if float32 rounds targets by more than 1/1000 of their standard deviation."""
        if self._is_warned or not targets.numel():
            return
        rounding = (targets - targets.float()).abs().amax(0)
        if (rounding > 1e-3 * targets.std(0, correction=0)).any():
            self._is_warned = True
            _log.warning(
                f"{self._source}: float32 rounds the targets, for example {targets[0].tolist()} to "
                f"{targets[0].float().tolist()}: subtract a constant from them, or set exact_targets = True in the "
                "module to get float64"
            )
