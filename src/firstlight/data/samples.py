"""The samples that data modules load, and the dataset that batches are taken from.

Shapes: `N` samples, `K` targets per sample, `B` batch; `...` shape of one sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from firstlight.data.stored import Stored, chunk_rows

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SplitBy:
    """What decides the split of samples, in place of chance.

    Args:
        kind: `"group"`: samples of one group are in one split. `"time"`: training samples are the earliest, test
            samples the latest, and samples of one time are in one split.
        column: Name of the column in messages.
        keys: `(N,)` int64 groups, or float64 times.
        names: `(N,)`, the keys as the file has them.
    """

    kind: Literal["group", "time"]
    column: str
    keys: NDArray[Any]
    names: NDArray[Any]

    def at(self, rows: NDArray[Any]) -> "SplitBy":
        """Return the keys of the samples at `rows`."""
        return replace(self, keys=self.keys[rows], names=self.names[rows])


@dataclass(frozen=True)
class Samples:
    """Samples as a data module loads them, before any preparation.

    The type of the inputs determines their preparation:

    - uint8: pixels. They stay uint8 in memory and in the loader's batches, and become scaled floats on the device.
    - int8 to int64: tokens, at least 0. They are never scaled, and become int64 on the device.
    - Everything else: numbers, or text that can be converted to numbers. They are scaled once, in memory.

    Inputs, and targets that are integers without class names, may stay on disk, see `stored.Stored`.

    Args:
        inputs: `(N, ...)`, at least two axes. Each column or channel (second axis) is scaled separately.
        targets: With `class_names`, class indices `(N,)`, or zeros and ones: `(N, 1)` for two classes, `(N, K)` for
            `K` labels. Without, integers `(N, ...)`, for example tokens, or numbers `(N, K)` or `(N,)`, which becomes
            `(N, 1)`. None if there are no targets, for prediction.
        class_names: Name of each class; empty if targets are not classes.
        split: `(N,)`, `"train"`, `"val"` or `"test"` for each sample, if the data defines its own split.
        test_from_train: Whether a share of the training samples is the test split if `split` has no test sample.
            Otherwise such a split is refused.
        split_by: What decides a split that the data does not define; None: chance, with as many of each class.
        columns: Names of the columns of inputs, then of targets, for messages.
        categories: By name of an input column, the names of its categories; its values are their indices.
        dates: Names of the input columns that hold dates, as seconds since 1970.
        source: Name of the data in messages, for example the path of a file.
        lines: Line number of each row, from 1, if rows come from a text file.
        names: Name of each row, if rows have one, for example the path of a file below `source`.
        digest: Digest of the content, by which a checkpoint recognises its training data.
        missing_reason: Why these samples cannot be trained on, for example because the target column is missing.
    """

    inputs: NDArray[Any] | Stored
    targets: NDArray[Any] | Stored | None
    class_names: list[str] = field(default_factory=list)
    split: NDArray[Any] | None = None
    test_from_train: bool = False
    split_by: SplitBy | None = None
    columns: list[str] = field(default_factory=list)
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dates: Sequence[str] = ()
    source: str = ""
    lines: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    digest: str = ""
    missing_reason: str = ""

    def location(self, row: int) -> str:
        """Return how messages name a row of the loaded data: its name, its line in the file, or its index from 0."""
        if self.names:
            return self.names[row]
        return f"line {self.lines[row]}" if self.lines else f"row {row}"


class TensorBatches(Dataset[Batch]):
    """Samples in memory; a batch is taken with one indexing operation.

    Args:
        inputs: `(N, ...)`.
        targets: `(N, ...)`.
        rows: `(M,)` int64, the rows that belong to this dataset, in this order; None: all. Samples are not copied.
    """

    in_memory = True

    def __init__(self, inputs: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        self._inputs = inputs
        self._targets = targets
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._inputs if self._rows is None else self._rows)

    @property
    def inputs(self) -> Tensor:
        """All inputs; a copy if the dataset has only some of the rows."""
        return self._inputs if self._rows is None else self._inputs[self._rows]

    @property
    def targets(self) -> Tensor:
        """All targets; a copy if the dataset has only some of the rows."""
        return self._targets if self._rows is None else self._targets[self._rows]

    def target_chunks(self) -> Iterator[Tensor]:
        """Yield all targets: at once, or in chunks if they are on disk."""
        yield self.targets

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return self._inputs.device

    @property
    def nbytes(self) -> int:
        """Size of the samples in bytes."""
        return (self._inputs.nbytes + self._targets.nbytes) * len(self) // max(len(self._inputs), 1)

    def to(self, device: torch.device) -> "TensorBatches":
        """Return a copy of the samples in the memory of a device."""
        return TensorBatches(self.inputs.to(device), self.targets.to(device))

    def with_targets(self, dtype: torch.dtype) -> "TensorBatches":
        """Return the samples with targets of another type; the inputs are not copied."""
        return type(self)(self._inputs, self._targets.to(dtype), self._rows)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Batch:
        """Return one sample, or a batch for several indices."""
        if isinstance(index, Sequence) or (isinstance(index, Tensor) and index.ndim == 1):
            return self.__getitems__(index)
        row = index if self._rows is None else self._rows[index]
        return self._inputs[row], self._targets[row]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of samples at `indices`."""
        index = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
        if self._rows is not None:
            index = self._rows.index_select(0, index)
        return self._inputs.index_select(0, index), self._targets.index_select(0, index)


class StoredBatches(TensorBatches):
    """Samples on disk; a batch is read when it is taken.

    Args:
        inputs: `(N, ...)`.
        targets: `(N, ...)`, on disk or in memory.
        rows: `(M,)` int64, the rows that belong to this dataset, in this order.
        prepare: Returns scaled inputs for inputs that are numbers; None for others.
    """

    in_memory = False

    def __init__(
        self, inputs: Stored, targets: Stored | Tensor, rows: Tensor, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._stored = inputs
        self._stored_targets = targets
        self._stored_rows = rows
        self._prepare = prepare

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._stored_rows)

    @property
    def inputs(self) -> Tensor:
        """All inputs, read into memory."""
        return self.__getitems__(torch.arange(len(self)))[0]

    @property
    def targets(self) -> Tensor:
        """All targets, read into memory if they are on disk."""
        return self._targets_at(self._stored_rows)

    def target_chunks(self) -> Iterator[Tensor]:
        """Yield all targets in chunks."""
        rows = self._stored_rows
        yield from map(self._targets_at, torch.split(rows, chunk_rows(tuple(self._stored_targets.shape))))

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return torch.device("cpu")

    def with_targets(self, dtype: torch.dtype) -> "StoredBatches":
        """Return the samples with targets of another type, which are in memory."""
        assert isinstance(self._stored_targets, Tensor)
        return StoredBatches(self._stored, self._stored_targets.to(dtype), self._stored_rows, self._prepare)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Batch:
        """Return one sample, or a batch for several indices."""
        if isinstance(index, Sequence) or (isinstance(index, Tensor) and index.ndim == 1):
            return self.__getitems__(index)
        inputs, targets = self.__getitems__(torch.as_tensor(index).reshape(1))
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of samples at `indices`."""
        rows = self._stored_rows[indices if isinstance(indices, Tensor) else torch.as_tensor(indices)]
        inputs = torch.from_numpy(self._stored.read(rows.numpy()))
        return inputs if self._prepare is None else self._prepare(inputs), self._targets_at(rows)

    def _targets_at(self, rows: Tensor) -> Tensor:
        stored = self._stored_targets
        return torch.from_numpy(stored.read(rows.numpy())) if isinstance(stored, Stored) else stored[rows]
