"""A folder of images, with a folder for each class or without classes.

Shapes: `N` images, `B` batch, `C` channels, 1 for grey or 3 for colour; `H` height, `W` width.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data import pictures
from firstlight.data.base import DataModule
from firstlight.data.cells import tidy, warn_alike
from firstlight.data.files import digest_of, read_bytes
from firstlight.data.pictures import Header, Resize
from firstlight.data.samples import Samples, Split
from firstlight.data.stored import Kept, Stored
from firstlight.errors import UsageError, about, check_range, check_saved

_log = logging.getLogger(__name__)

_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of folders that hold a split, in any case."""

_LARGEST_SIDE = 2**14  # That a checkpoint may ask for.
_MAX_SIDE = 224  # Of the shorter side, if no size is given: the size of the networks for ImageNet.
_MAX_LISTED = 3


class ImageFolder(DataModule):
    """Images of a folder: inputs `(B, C, H, W)` float32, targets `(B,)` int64.

    The folder holds a folder for each class, or folders `train`, `val` (also `valid`, `validation`) and `test` with a
    folder for each class. Without a `val` or `test` folder, a share of the training images takes its place. Folders
    within a class belong to it. A folder of images without classes can be predicted with a checkpoint.

    JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, AVIF and JPEG 2000 are read, whatever their suffix says. Hidden files and
    files with other suffixes are left out, and a line says which. Images become upright as their EXIF orientation asks.
    Transparent parts become white, 16 bits become 8, and an animation is its first frame. With `missing="drop"`,
    images that cannot be read are dropped; otherwise they are refused.

    Size and channels belong to the fitted state, so a checkpoint scores images of any size.

    Before a run, each file is read, which finds the broken ones. If all images fit in memory, they stay there.
    Otherwise the training images are read once more, for mean and deviation, and each batch is decoded when it is
    needed, by `num_workers` processes. The batches are the same.

    Args:
        path: The folder.
        size: Height and width in pixels; one number for a square. None: the medians of heights and widths, both made
            smaller by one factor if the shorter one is above 224.
        channels: 1 for grey, 3 for colour. None: 1 if all files are grey, else 3.
        resize: How images get that size. `"stretch"`: the whole image, with another aspect ratio. `"crop"`: the
            middle of the image, with its aspect ratio.
        in_memory: Whether the decoded images stay in memory, one byte for each value. None: if they take at most 1/4 of
            the free memory.
        num_workers: Processes that load batches. None: 0 for images in memory, and otherwise one for each processor
            that a process of the run has, up to 8.
        **options: Arguments of `DataModule`.

    Raises:
        UsageError: If an argument is out of range, or the folder holds no image.
    """

    def __init__(
        self,
        path: str,
        size: int | list[int] | None = None,
        channels: Literal[1, 3] | None = None,
        resize: Resize = "stretch",
        in_memory: bool | None = None,
        num_workers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_workers=num_workers or 0, **options)
        sides = [size, size] if isinstance(size, int) else size
        if sides is not None:
            check_range("ImageFolder", "[1, inf)", size=sides)
            if len(sides) != 2:
                raise UsageError(f"ImageFolder was given size={size}: it must be one number, or height and width")
        self.path = path
        self.size = sides
        self.channels = channels
        self.resize: Resize = resize
        self.in_memory = in_memory
        self._chooses_workers = num_workers is None

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return height and width of the images, and their channels."""
        return {"size": self._size, "channels": self._channels}

    def check_fitted(self, state: dict[str, Any]) -> None:
        """Refuse a state of another form than `fit` gives it."""
        super().check_fitted(state)
        check_saved("ImageFolder", state, size=list[int], channels=int)
        if len(state["size"]) != 2 or state["channels"] not in (1, 3):
            raise UsageError("the checkpoint is damaged: size and channels of ImageFolder are not those of images")
        with about("the checkpoint is damaged"):
            check_range("ImageFolder", f"[1, {_LARGEST_SIDE}]", size=state["size"])

    def samples_from(self, raw: Any) -> Samples:
        """Return image files, a list of their paths or contents, or pixels `(N, C, H, W)` of the fitted size."""
        if not isinstance(raw, Sequence) or not raw or not all(isinstance(each, str | Path | bytes) for each in raw):
            return super().samples_from(raw)
        pixels = []
        for index, each in enumerate(raw):
            content = each if isinstance(each, bytes) else read_bytes(str(each))
            try:
                form = self.fitted["size"], self.fitted["channels"]
                pixels.append(pictures.decode(content, *form, self.resize))
            except Exception as error:  # Pillow's decoders raise errors of many classes for broken files.
                name = f"image {index}" if isinstance(each, bytes) else each
                raise UsageError(f"{name} cannot be read: {pictures.fault(content, error)}") from error
        return Samples(np.stack(pixels), None)

    def load(self) -> Samples:
        """Return the images; targets are the indices of their classes, None for images without classes."""
        root = Path(self.path).expanduser()
        files, ignored = find_images(root, self.path)
        labels, splits, missing_reason = read_layout(files, self.class_names, self.path)
        if not missing_reason:
            ignored += [file for file, label in zip(files, labels, strict=True) if not label]
            kept = [index for index, label in enumerate(labels) if label]
            files, labels, splits = ([each[index] for index in kept] for each in (files, labels, splits))
        if ignored:
            shown = ", ".join(ignored[:_MAX_LISTED]) + (", ..." if len(ignored) > _MAX_LISTED else "")
            _log.warning(f"{self.path}: {_count(len(ignored), 'file')} left out: no image, hidden or no class: {shown}")
        self._choose_size_and_channels([root / file for file in files])
        pixels, digests, kept = self._read(root, files)
        files, labels, splits = ([each[index] for index in kept] for each in (files, labels, splits))
        content = [f"{file}\0{label}\0{digest}" for file, label, digest in zip(files, labels, digests, strict=True)]
        form = f"{self._size} {self._channels} {self.resize}"
        digest = digest_of("\n".join([form, *content]).encode(errors="surrogateescape"))
        fields: dict[str, Any] = {"source": self.path, "names": files, "digest": digest}
        if missing_reason:
            return Samples(pixels, None, list(self.class_names), missing_reason=missing_reason, **fields)
        names = self.class_names or sorted({*labels})
        if not self.fitted:
            warn_alike(names, self.path)
        samples = Samples(pixels, np.array([names.index(label) for label in labels]), names, **fields)
        if not any(splits):
            return samples
        if not self.fitted:
            for split, share in (("val", self.val_fraction), ("test", self.test_fraction)):
                if split not in splits and not (split == "val" and self.folds):
                    taken = f"{split}_fraction={share} of the training images"
                    _log.warning(f"{self.path} has no folder {split}: {taken} are the {split} split")
        return replace(samples, split=np.array(splits), test_from_train=True)

    def _choose_size_and_channels(self, files: Sequence[Path]) -> None:
        """Set size and channels: those of the checkpoint, those that were given, or what fits the files."""
        given = {"size": self.size, "channels": self.channels}
        if self.fitted:
            for name, value in given.items():
                if value is not None and value != self.fitted[name]:
                    fitted = f"the checkpoint was trained on images of {name}={self.fitted[name]}"
                    raise UsageError(f"{fitted}, but ImageFolder was given {name}={value}: leave {name} out")
            self._size, self._channels = self.fitted["size"], self.fitted["channels"]
            return
        if self.size and self.channels:
            self._size, self._channels = self.size, self.channels
            return
        headers = [header for header in pictures.in_threads(_header, files) if header]
        if not headers:
            headers = [Header(1, 1, True)]  # No file is an image, which is told when they are read.
        sides = np.array([(header.height, header.width) for header in headers])
        median = np.median(sides, axis=0)
        self._size = self.size or [max(1, round(side)) for side in median * min(1, _MAX_SIDE / median.min())]
        grey = sum(header.is_grey for header in headers)
        self._channels = self.channels or (1 if grey == len(headers) else 3)
        (low, left), (high, right) = sides.min(axis=0), sides.max(axis=0)
        found = f"{low}x{left}" if (low, left) == (high, right) else f"{low}x{left} to {high}x{right}"
        how = "as they are" if found == "x".join(map(str, self._size)) else f"by resize={self.resize}"
        colours = f"{grey:,} grey, {len(headers) - grey:,} in colour"
        _log.warning(
            f"{self.path}: {_count(len(headers), 'image')}, {colours}, height x width {found}; they become "
            f"size=[{self._size[0]}, {self._size[1]}] {how}, channels={self._channels}"
        )

    def _read(self, root: Path, files: Sequence[str]) -> tuple[NDArray[np.uint8] | Stored, list[str], list[int]]:
        """Return the pixels `(N, C, H, W)` and the digests of the files that can be read, and their indices."""
        stored = _Images(root, files, self._size, self._channels, self.resize)
        in_memory = self.fits_in_memory(stored.nbytes, self.path)
        pixels = np.empty(stored.shape if in_memory else (0,), np.uint8)
        if self._chooses_workers and not in_memory:
            processes = 1 if self.trainer is None else self.trainer.num_devices
            self.num_workers = min(8, (os.cpu_count() or 1) // processes)

        def read(index: int) -> tuple[str, str]:
            content = b""
            try:
                content = (root / files[index]).read_bytes()
                decoded = pictures.decode(content, self._size, self._channels, self.resize)
                if in_memory:
                    pixels[index] = decoded
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise errors of many classes for broken files.
                return "", pictures.fault(content, error)
            return hashlib.sha256(content).hexdigest(), ""

        found = list(pictures.in_threads(read, range(len(files))))
        kept = [index for index, (digest, _) in enumerate(found) if digest]
        broken = [f"{file} ({why})" for file, (_, why) in zip(files, found, strict=True) if why]
        if broken:
            shown = ", ".join(broken[:_MAX_LISTED]) + (", ..." if len(broken) > _MAX_LISTED else "")
            told = f"{self.path}: {_count(len(broken), 'image')} cannot be read: {shown}"
            if self.missing != "drop" or not kept:
                raise UsageError(f"{told}; missing=drop drops such images" if kept else f"no image is left: {told}")
            _log.warning(f"{told}; dropped")
            for to, index in enumerate(kept if in_memory else []):
                pixels[to] = pixels[index]
        digests = [found[index][0] for index in kept]
        return pixels[: len(kept)] if in_memory else Kept(stored, np.array(kept)), digests, kept


class _Images(Stored):
    """The pixels `(N, C, H, W)` of image files, decoded when they are read."""

    def __init__(self, root: Path, files: Sequence[str], size: Sequence[int], channels: int, resize: Resize) -> None:
        super().__init__((len(files), channels, *size), np.uint8)
        self.root = root
        self.files = files
        self.resize: Resize = resize

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the pixels of the files at `rows`."""
        decoded = pictures.in_threads(self._decode, rows.tolist())
        return np.stack([*decoded]) if len(rows) else np.empty((0, *self.shape[1:]), np.uint8)

    def _decode(self, row: int) -> NDArray[np.uint8]:
        content = b""
        try:
            content = (self.root / self.files[row]).read_bytes()
            return pictures.decode(content, self.shape[2:], self.shape[1], self.resize)
        except Exception as error:  # The file could be read before.
            why = pictures.fault(content, error)
            raise UsageError(f"{self.root / self.files[row]} was changed while it was used: {why}") from error


def find_images(root: Path, path: str) -> tuple[list[str], list[str]]:
    """Return the image files below a folder and the files that are left out, by their paths in it, sorted."""
    if not root.is_dir():
        raise UsageError(f"{path} is {'not a folder' if root.exists() else 'missing'}: it must be a folder of images")
    found: list[PurePath] = []
    ignored: list[PurePath] = []
    above: dict[str, set[str]] = {}

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real, outer = os.path.realpath(folder), above.get(os.path.dirname(folder), set())
        if real in outer:  # A link to a folder above would never end.
            folders.clear()
            continue
        above[folder] = outer | {real}
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            file = Path(folder, name)
            # A dangling link is an image that cannot be read. A pipe or a socket is no image: reading it may wait.
            is_file = file.is_file() or not file.exists()
            is_image = is_file and not name.startswith(".") and file.suffix.lower() in pictures.SUFFIXES
            (found if is_image else ignored).append(file.relative_to(root))
    if not found:
        known = ", ".join(sorted(pictures.SUFFIXES))
        raise UsageError(f"{path} holds no image: {_count(len(ignored), 'file')}, none with a suffix of {known}")
    return [file.as_posix() for file in sorted(found)], [file.as_posix() for file in sorted(ignored)]


def read_layout(files: Sequence[str], known: Sequence[str], path: str) -> tuple[list[str], list[str], str]:
    """Return label and split of each file, `""` where it has none, and why the images have no classes, if so.

    Args:
        files: Paths in the folder.
        known: Class names of a checkpoint, if any.
        path: The folder, for messages.
    """
    parts = [file.split("/") for file in files]
    above = Counter(each[0] for each in parts if len(each) > 1)
    splits = {name: _SPLITS[name.lower()] for name in above if name.lower() in _SPLITS}
    has_splits = any(len(each) > 2 for each in parts if each[0] in splits)
    if has_splits and "train" in splits.values() and len(splits) > 1 and len(splits) < len(above):
        other = ", ".join(sorted(above.keys() - splits.keys()))
        raise UsageError(
            f"{path} holds the folders {', '.join(splits)}, which are splits, and {other}: it must hold folders of "
            "splits or of classes, not both"
        )
    has_splits = has_splits and len(splits) == len(above)
    if has_splits and len({*splits.values()}) < len(splits):
        raise UsageError(f"{path} holds the folders {', '.join(splits)}: each split must have one folder")
    depth = 1 if has_splits else 0
    # Systems write the same name with other spaces or, as macOS does, with other Unicode characters.
    spelled = {tidy(name): name for name in known}
    folders = [tidy(each[depth]) if len(each) > depth + 1 else "" for each in parts]
    labels = [spelled.get(each, each) for each in folders]
    of_splits = [splits[each[0]] if has_splits else "" for each in parts]
    if not any(labels):
        return labels, of_splits, f"{path} holds images, but no folder for each class"
    if known:
        unknown = sorted({*labels} - {*known, ""})
        if unknown and not {*labels} & {*known}:
            trained = f"the checkpoint was trained on the classes {', '.join(known)}"
            return [""] * len(files), [""] * len(files), f"{path} has no folder of a class: {trained}"
        if unknown:
            raise UsageError(
                f"{path} has the folder {unknown[0]}, but the checkpoint was trained on the classes {', '.join(known)}"
            )
    return labels, of_splits, ""


def _header(path: Path) -> Header | None:
    try:
        return pictures.read_header(path)
    except Exception:  # Told when the file is read.
        return None


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
