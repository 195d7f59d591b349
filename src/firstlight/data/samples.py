"""What data modules load, and what their batches are taken from.

Shapes: `N` samples, `K` targets of a sample, `B` of a batch; `...` whatever one sample is shaped like.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SPLITS", "Batch", "Samples", "Split", "TensorBatches"]

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Samples:
    """What a data module loads, before anything is done to it.

    The type of the inputs says what they are. uint8 is pixels, or what else is counted from 0 to 255: it stays uint8 in
    memory and in the loader's batches, and becomes scaled floats on the device. int8 to int64 are tokens, at least 0:
    they are never scaled, and become int64 on the device. Everything else is numbers, or text that reads as numbers:
    it is scaled once, in memory.

    Args:
        inputs: `(N, ...)`, at least two axes; each column or channel, the second axis, is scaled by itself.
        targets: With class names, `(N,)` class indices, or `(N, K)` zeros and ones: `K` = 1 with the names of 0 and 1,
            or a column for each name. Without, integers `(N, ...)` as they are (tokens), or numbers `(N, K)`, of which
            `(N,)` becomes `(N, 1)`. None where there is nothing but inputs to predict for.
        class_names: Name of each class; empty where targets are no classes.
        split: `(N,)`, `"train"`, `"val"` or `"test"` for each sample, where the data says so.
        columns: Names of the inputs' columns and then the targets', for messages.
        source: What messages call the data, for example the name of a file.
        lines: Line of the file for each row, from 1, where rows are lines of a file.
        digest: Of the content, where it may be another one when a checkpoint is used: see `DataModule`.
        missing_reason: Why nothing can be learned from these samples, for example that there is no column of targets.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any] | None
    class_names: list[str] = field(default_factory=list)
    split: NDArray[Any] | None = None
    columns: list[str] = field(default_factory=list)
    source: str = ""
    lines: list[int] = field(default_factory=list)
    digest: str = ""
    missing_reason: str = ""

    def location(self, row: int) -> str:
        """Return what messages call a row as it was loaded: its line in a file, or its index from 0."""
        return f"line {self.lines[row]}" if self.lines else f"row {row}"


class TensorBatches(Dataset[Batch]):
    """Samples in memory, of which a batch is taken by one indexing.

    Args:
        inputs: `(N, ...)`.
        targets: `(N, ...)`.
        rows: `(M,)` int64, which of them, in this order; all by default. They are not copied.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        self._inputs = inputs
        self._targets = targets
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._inputs if self._rows is None else self._rows)

    @property
    def inputs(self) -> Tensor:
        """All inputs, copied where they are some rows of others."""
        return self._inputs if self._rows is None else self._inputs[self._rows]

    @property
    def targets(self) -> Tensor:
        """All targets, as `inputs`."""
        return self._targets if self._rows is None else self._targets[self._rows]

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return self._inputs.device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (self._inputs.nbytes + self._targets.nbytes) * len(self) // max(len(self._inputs), 1)

    def to(self, device: torch.device) -> "TensorBatches":
        """Return the same samples in the memory of a device, where batches are taken then."""
        return TensorBatches(self.inputs.to(device), self.targets.to(device))

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Batch:
        """Return one sample, or the batch of the samples at several indices."""
        if isinstance(index, Sequence) or (isinstance(index, Tensor) and index.ndim == 1):
            return self.__getitems__(index)
        row = index if self._rows is None else self._rows[index]
        return self._inputs[row], self._targets[row]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of the samples at `indices`."""
        index = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
        if self._rows is not None:
            index = self._rows.index_select(0, index)
        return self._inputs.index_select(0, index), self._targets.index_select(0, index)
