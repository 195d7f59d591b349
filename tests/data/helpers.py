import gzip
import struct

import numpy as np
from PIL import Image

from firstlight.data import DataModule, Samples


class Arrays(DataModule):
    """A data module of any arrays."""

    def __init__(self, inputs, targets, class_names=(), options=None, **fields):
        super().__init__(**(options or {}))
        targets = None if targets is None else np.asarray(targets)
        self.samples = Samples(np.asarray(inputs), targets, list(class_names), **fields)

    def load(self):
        return self.samples


def ready(module):
    module.setup()
    return module


def numbers(rows=40, columns=4, **options):
    generator = np.random.default_rng(0)
    return Arrays(generator.normal(3, 5, (rows, columns)), np.arange(rows) % 2, ["no", "yes"], options)


def images(rows=40, **options):
    generator = np.random.default_rng(0)
    shape = (rows, 2, 6, 6)
    return Arrays(generator.integers(0, 256, shape, np.uint8), np.arange(rows) % 2, ["no", "yes"], options)


def in_batches(module, loader):
    """Return the batches of a loader as the network gets them."""
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def write_table(folder):
    """Write a table with a number, a category and a binary label per row; return its path."""
    generator = np.random.default_rng(0)
    towns = generator.choice(["Oslo", "Rome"], 200)
    lines = [f"{generator.normal():.4f},{town},{'yes' if index % 3 else 'no'}" for index, town in enumerate(towns)]
    path = folder / "table.csv"
    path.write_text("\n".join(["height,town,kind", *lines]) + "\n")
    return str(path)


def idx(values):
    """Return the bytes of an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder, compressed=True, train=300, test=60):
    """Write the four IDX files of MNIST with random pixels; return their folder."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        files = {
            "images-idx3": generator.integers(0, 256, (count, 28, 28), np.uint8),
            "labels-idx1": (np.arange(count) % 10).astype(np.uint8),
        }
        for name, values in files.items():
            path = folder / f"{part}-{name}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(idx(values)) if compressed else idx(values))
    return str(folder)


def write_text(folder):
    """Write 20,000 random letters; return the path of the file."""
    letters = np.random.default_rng(0).integers(97, 120, 20_000, np.uint8)
    (folder / "a.txt").write_bytes(letters.tobytes())
    return str(folder / "a.txt")


def write_labelled(folder):
    """Write 60 short texts of two classes; return the path of the file."""
    rows = [f"{'abcdefghi'[: row % 9 + 1]},{'ab'[row % 2]}" for row in range(60)]
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return str(folder / "a.csv")


def write_images(folder, classes=("ant", "bee", "cat"), images=30, side=8, colour=True):
    """Write images of random pixels, as many of each class, in a folder for each class; return their folder."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            pixels = generator.integers(0, 256, (side, side, 3) if colour else (side, side), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")
    return str(folder)


def write_arrays(folder, compressed=False, **arrays):
    """Write a `.npz`, by default of 200 rows of three numbers with two classes; return its path."""
    generator = np.random.default_rng(0)
    arrays = arrays or {"X": generator.normal(3, 5, (200, 3)).astype(np.float32), "y": np.arange(200) % 2}
    path = folder / "arrays.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return str(path)
