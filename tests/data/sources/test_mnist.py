import gzip
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from firstlight.data import MNIST, FashionMNIST
from firstlight.errors import UsageError
from tests.data.helpers import idx, in_batches, ready, write_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_raw_and_compressed_files_are_found_in_every_folder(compressed, below, tmp_path):
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder, compressed)
    samples = MNIST(str(tmp_path)).load()
    assert (samples.inputs.shape, samples.inputs.dtype) == ((360, 1, 28, 28), np.uint8)
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(samples.inputs[:300, 0], generator.integers(0, 256, (300, 28, 28), np.uint8))
    np.testing.assert_array_equal(samples.inputs[300:, 0], generator.integers(0, 256, (60, 28, 28), np.uint8))
    assert samples.targets.tolist() == [index % 10 for index in [*range(300), *range(60)]]


def test_official_test_split_is_kept(tmp_path):
    data = ready(MNIST(write_idx(tmp_path)))
    assert data.rows("test").tolist() == list(range(300, 360))
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 255, "val": 45, "test": 60}


def test_fashion_mnist_from_debian_matches_its_paper():
    if not DEBIAN.is_dir():
        pytest.skip(f"dataset-fashion-mnist is not installed: cannot find {DEBIAN}")
    data = ready(FashionMNIST(str(DEBIAN), batch_size=1000))
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 51000, "val": 9000, "test": 10000}
    assert torch.bincount(data.dataset("test").targets).tolist() == [1000] * 10
    inputs, _ = in_batches(data, data.val_dataloader())[0]
    assert (inputs.shape, inputs.dtype) == ((1000, 1, 28, 28), torch.float32)
    # The published mean and standard deviation of all 60,000 training images.
    assert data.state_dict()["mean"].item() == pytest.approx(0.2860, abs=1e-3)
    assert data.state_dict()["std"].item() == pytest.approx(0.3530, abs=1e-3)
    bags = data.dataset("train").inputs[data.dataset("train").targets == data.class_names.index("Bag")]
    trousers = data.dataset("train").inputs[data.dataset("train").targets == data.class_names.index("Trouser")]
    assert bags.float().mean() > trousers.float().mean()


def replace_file(name, content):
    def write(folder):
        (folder / f"{name}.gz").unlink()
        (folder / name).write_bytes(content)

    return write


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FEW = np.zeros((4, 28, 28), np.uint8)
BAD = {
    "truncated": (
        replace_file(IMAGES, idx(FEW)[:-1]),
        rf"/{IMAGES} has 3135 bytes for 4 x 28 x 28 values: it must",
    ),
    "too long": (replace_file(IMAGES, idx(FEW) + b"0"), rf"/{IMAGES} has 3137 bytes for 4 x 28 x 28"),
    "ends in its header": (replace_file(IMAGES, idx(FEW)[:9]), rf"/{IMAGES} has .* it must have one byte for each"),
    "empty": (replace_file(IMAGES, b""), rf"/{IMAGES} is not an IDX file with 3 axes: it begins with nothing and must"),
    "other magic": (
        replace_file(IMAGES, b"PK\3\4" + idx(FEW)),
        rf"/{IMAGES} is not .* begins with 50 4b 03 04 and must .* 00 00 08 03$",
    ),
    "labels for images": (
        replace_file(IMAGES, idx(FEW[:, 0, 0])),
        rf"/{IMAGES} is not .* it begins with 00 00 08 01",
    ),
    "another image size": (
        replace_file(IMAGES, idx(FEW[:, 1:])),
        rf"/{IMAGES} has images of 27x28 pixels: MNIST images must have 28x28$",
    ),
    "other counts": (
        replace_file(LABELS, idx(FEW[:, 0, 0])),
        rf"/{LABELS} has 4 labels, but .*/t10k-images-.* has 60 images",
    ),
    "a label that is not a class": (
        replace_file(LABELS, idx(np.full(60, 10, np.uint8))),
        rf"/{LABELS}: the label at index 0 is 10: it must be 0 to 9",
    ),
    "images of two sizes": (
        replace_file("t10k-images-idx3-ubyte", idx(np.zeros((60, 20, 28), np.uint8))),
        "t10k-images-idx3-ubyte has images of 20x28 pixels: MNIST images must have 28x28$",
    ),
    "missing": (
        lambda folder: (folder / f"{LABELS}.gz").unlink(),
        rf"cannot find {LABELS} or .*download=true",
    ),
    "truncated gz": (
        lambda folder: (folder / f"{LABELS}.gz").write_bytes(gzip.compress(b"0" * 99)[:-9]),
        rf"/{LABELS}\.gz cannot be decompressed",
    ),
    "not a gz": (
        lambda folder: (folder / f"{LABELS}.gz").write_bytes(b"0" * 99),
        rf"/{LABELS}\.gz cannot be decompressed",
    ),
    "a broken gz": (
        lambda folder: (folder / f"{LABELS}.gz").write_bytes(gzip.compress(b"0" * 9)[:10] + b"\xff" * 30),
        rf"/{LABELS}\.gz cannot be decompressed",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_invalid_files_are_refused_by_name(spoil, message, tmp_path):
    root = write_idx(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        MNIST(root).setup()


def test_download_calls_torchvision_once(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download):
        calls.append((root, download))
        folder = Path(root, "FashionMNIST", "raw")
        folder.mkdir(parents=True)
        write_idx(folder)

    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(FashionMNIST=fetch)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    data = ready(FashionMNIST(str(tmp_path), download=True))
    assert calls == [(str(tmp_path), True)]
    assert len(data.indices["test"]) == 60
    shutil.rmtree(tmp_path / "FashionMNIST")
    module.datasets.FashionMNIST = lambda root, download: (_ for _ in ()).throw(RuntimeError("no network"))
    with pytest.raises(UsageError, match=r"cannot download FashionMNIST into .*: no network"):
        FashionMNIST(str(tmp_path), download=True).setup()


def test_download_without_torchvision_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="download=true needs torchvision, from the extra `download`"):
        MNIST(str(tmp_path), download=True).setup()
