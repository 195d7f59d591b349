"""Arrays of numpy in files: one `.npz`, or a `.npy` for the inputs and one for the targets.

Shapes: `N` samples, `K` targets per sample; `...` shape of one sample.
"""

import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.base import DataModule
from firstlight.data.cells import codes, distinct, is_missing, warn_doubtful
from firstlight.data.files import digest_of_parts
from firstlight.data.samples import SPLITS, Samples, Split
from firstlight.data.sources.tensors import with_classes
from firstlight.data.stored import Joined, Stored, StoredArray
from firstlight.errors import UsageError, check_saved, did_you_mean

_log = logging.getLogger(__name__)

_PAIRS = (
    ("inputs", "targets"),
    ("inputs", "labels"),
    ("X", "y"),
    ("x", "y"),
    ("data", "labels"),
    ("data", "target"),
    ("data", "targets"),
    ("images", "labels"),
    ("features", "labels"),
)
"""Names of inputs and targets that are recognised."""
_WITH_SPLIT = ("{0}_{1}", "{1}_{0}")
"""How such a name and that of a split are joined: `x_train`, `train_images`."""

_MAX_HEADER = 10_000  # Characters of the header of an array, as numpy limits it.


class Arrays(DataModule):
    """Arrays in `.npz` or `.npy` files, without pickled objects; `Samples` describes the types and shapes.

    Images without a channel, uint8 `(N, H, W)`, get one. Images with channels last, uint8 `(N, H, W, 1)` or
    `(N, H, W, 3)`, become `(N, C, H, W)`. What does not fit in memory is read from disk batch by batch, with the same
    batches. A compressed `.npz` and an array in Fortran order must fit.

    A `.npz` may have arrays for each split, with usual names: `x_train`, `y_train`, `x_test`, `y_test`, and maybe
    `x_val` and `y_val`, or `train_images` and so on. Without those of `val`, it is a share of the training samples.

    Args:
        path: Path of the `.npz`, or of the `.npy` of the inputs.
        targets_path: Path of the `.npy` of the targets; None if `path` is a `.npz`, or to predict.
        inputs_name: Name of the inputs in the `.npz`. None: the array beside the targets, if there are two; else a
            usual name, for example `inputs`, `X` or `images`, if only one pair of names fits.
        targets_name: Name of the targets in the `.npz`; None: as `inputs_name`.
        class_names: Name of each class. None: integers `(N,)` are classes named 0, 1, and so on, texts `(N,)` are the
            names of their classes as in a `Table`, and booleans `(N,)` become the classes False and True.
        in_memory: Whether the inputs stay in memory. None: if they take at most 1/4 of the free memory. Targets always
            do.
        **options: Arguments of `DataModule`.

    Raises:
        UsageError: If an argument is out of range, or a file cannot be used.
    """

    def __init__(
        self,
        path: str,
        targets_path: str | None = None,
        inputs_name: str | None = None,
        targets_name: str | None = None,
        class_names: list[str] | None = None,
        in_memory: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if class_names and len({*class_names}) < len(class_names):
            raise UsageError(f"Arrays was given class_names={class_names}: no two names may be equal")
        self.path = path
        self.targets_path = targets_path
        self.inputs_name = inputs_name
        self.targets_name = targets_name
        self.in_memory = in_memory
        self._class_names = class_names

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return the names of the arrays, for a `.npz` to predict."""
        return {"array_names": self._names}  # Empty if the file has arrays for each split.

    def check_fitted(self, state: dict[str, Any]) -> None:
        """Refuse a state of another form than `fit` gives it."""
        super().check_fitted(state)
        check_saved("Arrays", state, array_names=list[str])

    def read_from(self, path: str) -> None:
        """Let `load` read other inputs; the targets of a `.npy` are those of other samples."""
        super().read_from(path)
        self.targets_path = None

    def load(self) -> Samples:
        """Return the arrays as samples."""
        inputs, targets, split = self._find()
        digest = digest_of_parts(part for each in (inputs, targets) if each is not None for part in _contents(each))
        inputs = _as_images(inputs, self.path)
        if inputs.dtype.kind not in "biuf" or inputs.dtype.itemsize > 8:
            raise UsageError(f"{self.path} holds inputs of type {inputs.dtype}: they must be numbers of up to 64 bits")
        if isinstance(inputs, Stored) and self.fits_in_memory(inputs.nbytes, self.path):
            inputs = inputs[:]
        if targets is None:
            reason = f"{self.path} holds no targets" if self.path.endswith(".npz") else "targets_path was not given"
            names = self._class_names or self.class_names
            return Samples(inputs, None, names, source=self.path, digest=digest, missing_reason=reason)
        labels = targets[:] if isinstance(targets, Stored) else targets
        if labels.dtype.kind in "US":
            labels, names = self._encode(labels)
        elif labels.dtype.kind not in "biuf":
            raise UsageError(f"{self.path} holds targets of type {labels.dtype}: they must be numbers or texts")
        else:
            labels, names = with_classes(labels, self._class_names, self.class_names, f"{self.path} holds")
        return Samples(inputs, labels, names, split, source=self.path, digest=digest)

    def _find(self) -> tuple[Stored | NDArray[Any], Stored | NDArray[Any] | None, NDArray[Any] | None]:
        """Return inputs, targets and the split, and set the names of the arrays if they come from a `.npz`."""
        self._names: list[str] = []
        if not _is_zip(self.path):
            targets = None if self.targets_path is None else _read_npy(self.targets_path)
            return _read_npy(self.path), targets, None
        if self.targets_path is not None:
            raise UsageError(f"Arrays was given path={self.path} and targets_path: targets of a .npz must be in it")
        arrays = _read_npz(self.path)
        described = ", ".join(f"{name} {tuple(each.shape)}" for name, each in arrays.items())
        if not self.inputs_name and not self.targets_name and not self.fitted.get("array_names"):
            if parts := _find_splits(arrays):
                _log.warning(f"{self.path} holds {described}: the splits are {', '.join(parts)}")
                for one, other in parts.values():
                    if len(arrays[one]) != len(arrays[other]):
                        raise UsageError(f"{self.path} holds {described}: {one} and {other} differ in length")
                inputs, targets = (_joined([arrays[names[i]] for names in parts.values()], self.path) for i in (0, 1))
                return inputs, targets, np.repeat([*parts], [len(arrays[one]) for one, _ in parts.values()])
        of_inputs, of_targets = self._choose_names(arrays, described)
        self._names = [of_inputs] if of_targets is None else [of_inputs, of_targets]
        for name in self._names:
            if name not in arrays:
                raise UsageError(f"{self.path} holds no {name}: it holds {described}{did_you_mean(name, [*arrays])}")
        return arrays[of_inputs], None if of_targets is None else arrays[of_targets], None

    def _choose_names(self, arrays: Mapping[str, Any], described: str) -> tuple[str, str | None]:
        """Return the names of inputs and targets: those that were given, of the checkpoint, or the usual ones."""
        known = [*self.fitted.get("array_names", []), None, None]
        inputs, targets = self.inputs_name or known[0], self.targets_name or known[1]
        if self.fitted and not inputs:  # It was trained on a file with arrays for each split.
            inputs = next((name for name, _ in _PAIRS if name in arrays), None)
            targets = next((other for name, other in _PAIRS if name == inputs and other in arrays), None)
        if self.fitted and inputs:
            return inputs, targets if targets in arrays else None
        others = [name for name in arrays if name not in (inputs, targets)]
        if len(arrays) == 2 and len(others) == 1:  # One name was given, and leaves one.
            return inputs or others[0], targets or others[0]
        if inputs and targets:
            return inputs, targets
        pairs = [
            pair
            for pair in _PAIRS
            if pair[0] in arrays and pair[1] in arrays and inputs in (None, pair[0]) and targets in (None, pair[1])
        ]
        if len(pairs) != 1:
            several = "several pairs" if pairs else "none"
            raise UsageError(
                f"{self.path} holds {described}, and {several} of the usual names of inputs and targets: give "
                "targets_name (--target of firstlight new), and inputs_name if there are more than two arrays"
            )
        _log.warning(f"{self.path} holds {described}: the inputs are {pairs[0][0]}, the targets {pairs[0][1]}")
        return pairs[0]

    def _encode(self, labels: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
        """Return the index of the class of each text, texts that mean a missing value as they are, and the names."""
        if labels.dtype.kind == "S":
            try:
                labels = np.char.decode(labels, "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{self.path} holds bytes as targets that are not UTF-8: {error}") from error
        if labels.ndim != 1:
            raise UsageError(f"{self.path} holds texts of shape {labels.shape} as targets: they must be (N,)")
        known = self._class_names or self.class_names
        names = known or distinct(labels)
        if not known:
            warn_doubtful(names, self.path)
        encoded = codes(labels, names)
        unknown = sorted({text for text in encoded if isinstance(text, str) and not is_missing(text)})
        if unknown:
            raise UsageError(f"{self.path} holds the label {unknown[0]}: the classes are {', '.join(names)}")
        return encoded, names


def _find_splits(arrays: Mapping[str, Any]) -> dict[Split, tuple[str, str]]:
    """Return the names of inputs and targets by split, `{}` if there are none of `train` and `test`."""
    for pair in _PAIRS:
        for pattern in _WITH_SPLIT:
            named = {split: (pattern.format(pair[0], split), pattern.format(pair[1], split)) for split in SPLITS}
            found = {split: names for split, names in named.items() if {*names} <= arrays.keys()}
            if {"train", "test"} <= found.keys():
                return found
    return {}


def _joined(arrays: Sequence[Stored | NDArray[Any]], path: str) -> Stored | NDArray[Any]:
    """Return arrays one after the other, on disk if all of them are there with one type."""
    if len({(tuple(each.shape[1:]), each.dtype.kind) for each in arrays}) > 1:
        described = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in arrays)
        raise UsageError(f"{path} holds splits of different shapes or types: {described}")
    stored = [each for each in arrays if isinstance(each, Stored) and each.dtype == arrays[0].dtype]
    if len(stored) == len(arrays):
        return Joined(stored)
    return np.concatenate([each[:] for each in arrays])


class _ChannelsFirst(Stored):
    """Images `(N, H, W)` or `(N, H, W, C)` as `(N, C, H, W)`."""

    def __init__(self, images: Stored) -> None:
        count, height, width, *channels = images.shape
        super().__init__((count, *(channels or [1]), height, width), images.dtype)
        self.images = images

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the images at `rows`."""
        return _channels_first(self.images.read(rows))


def _as_images(inputs: Stored | NDArray[Any], path: str) -> Stored | NDArray[Any]:
    """Return pixels with the channels before height and width, and other inputs as they are."""
    has_last = inputs.ndim == 4 and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3)
    if inputs.dtype != np.uint8 or not (inputs.ndim == 3 or has_last):
        return inputs
    found = "channels last" if has_last else "no channels"
    _log.warning(f"{path} holds images {inputs.shape} with {found}: they become (N, C, H, W)")
    return _ChannelsFirst(inputs) if isinstance(inputs, Stored) else _channels_first(inputs)


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1))


def _contents(values: Stored | NDArray[Any]) -> Any:
    """Yield type and shape, and then the content in parts."""
    yield f"{values.dtype.str} {tuple(values.shape)}".encode()
    for part in values.chunks() if isinstance(values, Stored) else [values]:
        yield np.ascontiguousarray(part).tobytes()


def _is_zip(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _read_npy(path: str) -> Stored | NDArray[Any]:
    try:
        with open(path, "rb") as file:
            return _read_header(file, path, path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _read_npz(path: str) -> dict[str, Stored | NDArray[Any]]:
    """Return the arrays of a `.npz` by name: on disk if they are not compressed, otherwise in memory."""
    found: dict[str, Stored | NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename:
                    continue
                if entry.compress_type == zipfile.ZIP_STORED:
                    file.seek(entry.header_offset + 26)
                    lengths = file.read(4)  # Of the name and of the extra field, which come before the content.
                    file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
                    found[name] = _read_header(file, path, f"{path}: {name}")
                else:
                    with archive.open(entry) as content:
                        found[name] = np.lib.format.read_array(content, allow_pickle=False)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # `zipfile`, `zlib` and numpy raise errors of many classes for broken files.
        raise UsageError(f"{path} cannot be read: {error}") from error
    return found


def _read_header(file: BinaryIO, path: str, name: str) -> Stored | NDArray[Any]:
    """Return the array that begins at the position of a file."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file, max_header_size=_MAX_HEADER)
    except ValueError as error:
        raise UsageError(f"{name} is not an array of numpy: {error}") from error
    if dtype.hasobject or dtype.names:
        raise UsageError(f"{name} holds Python objects or records ({dtype}): it must hold numbers or texts")
    if not shape:
        raise UsageError(f"{name} has no axis: the first axis must be the samples")
    if is_fortran and len(shape) > 1:  # Its samples do not lie one after the other, so it must fit in memory.
        values = np.fromfile(file, dtype, math.prod(shape))
        if values.size < math.prod(shape):
            raise UsageError(f"{name} has {values.size:,} values, but {shape} needs {math.prod(shape):,}: truncated")
        return np.ascontiguousarray(values.reshape(shape, order="F"))
    return StoredArray(path, file.tell(), shape, dtype)
