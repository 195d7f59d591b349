"""MNIST and Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 grey pixels in ten classes.

Sources: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998; Xiao, Rasul
and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.data.base import DataModule
from firstlight.data.files import read_bytes
from firstlight.data.samples import Samples
from firstlight.errors import UsageError


class MNIST(DataModule):
    """Handwritten digits: inputs `(B, 1, 28, 28)` float32, targets `(B,)` int64 from 0 to 9; the official test split.

    The four IDX files, raw or as `.gz`, are searched in `root`, `root/raw` and `root/NAME/raw`. NAME is the name of the
    class; torchvision stores its downloads there.

    Args:
        root: Folder of the files.
        download: Whether to download missing files into `root/NAME/raw`, which needs torchvision.
        **options: Arguments of `DataModule`.

    Raises:
        UsageError: If an argument is out of range, or a file is missing or invalid.
    """

    labels: tuple[str, ...] = tuple("0123456789")

    def __init__(self, root: str, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self.download = download

    def load(self) -> Samples:
        """Return the images and labels of the official training and test split."""
        images, targets, splits = [], [], []
        for part, split in (("train", "train"), ("t10k", "test")):
            images_file = self._file(f"{part}-images-idx3-ubyte")
            pixels = read_idx(images_file, 3)
            if pixels.shape[1:] != (28, 28):
                found = f"images of {'x'.join(map(str, pixels.shape[1:]))} pixels"
                raise UsageError(f"{images_file} has {found}: {type(self).__name__} images must have 28x28")
            labels_file = self._file(f"{part}-labels-idx1-ubyte")
            labels = read_idx(labels_file, 1)
            if len(labels) != len(pixels):
                raise UsageError(f"{labels_file} has {len(labels)} labels, but {images_file} has {len(pixels)} images")
            unknown = np.flatnonzero(labels >= len(self.labels))
            if len(unknown):
                found = f"the label at index {unknown[0]} is {labels[unknown[0]]}"
                raise UsageError(f"{labels_file}: {found}: it must be 0 to 9")
            images.append(pixels)
            targets.append(labels)
            splits += [split] * len(labels)
        inputs = np.concatenate(images)[:, None]
        return Samples(inputs, np.concatenate(targets), list(self.labels), np.array(splits), source=self.root)

    def _file(self, name: str) -> Path:
        kind = type(self).__name__
        folders = [Path(self.root), Path(self.root, "raw"), Path(self.root, kind, "raw")]
        paths = [path for folder in folders for path in (folder / name, folder / f"{name}.gz")]
        if self.download and not any(path.is_file() for path in paths):
            self._download(kind)
        for path in paths:
            if path.is_file():
                return path
        raise UsageError(
            f"cannot find {name} or {name}.gz in {', '.join(map(str, folders))}: download=true downloads it"
        )

    def _download(self, kind: str) -> None:
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch.
            raise UsageError(f"download=true needs torchvision, from the extra `download`: {error}") from error
        try:
            getattr(datasets, kind)(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"cannot download {kind} into {self.root}: {error}") from error


class FashionMNIST(MNIST):
    """Ten kinds of clothes in the format of `MNIST`, with the same arguments; the official test split.

    Debian's package `dataset-fashion-mnist` installs the files in `/usr/share/datasets/fashion-mnist`.
    """

    labels = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes.

    Args:
        path: Path of the file. If it ends in `.gz`, the file is decompressed.
        axes: Number of axes that the array must have.

    Raises:
        UsageError: If the file cannot be read, is truncated or is not an IDX file with `axes` axes.
    """
    content = read_bytes(str(path))
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} cannot be decompressed: {error}") from error
    magic, start = bytes([0, 0, 8, axes]), 4 + 4 * axes
    if content[:4] != magic:
        raise UsageError(
            f"{path} is not an IDX file with {axes} axes: it begins with {content[:4].hex(' ') or 'nothing'} and "
            f"must begin with {magic.hex(' ')}"
        )
    shape = np.frombuffer(content[4:start].ljust(4 * axes, b"\0"), ">u4").tolist()
    if len(content) != start + math.prod(shape):
        expected = " x ".join(map(str, shape))
        raise UsageError(
            f"{path} has {len(content) - start} bytes for {expected} values: it must have one byte for each"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
