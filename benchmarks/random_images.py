"""Random images: a training step takes as long as with real ones, and nothing is downloaded."""

import numpy as np

from firstlight.data import DataModule
from firstlight.data.samples import Samples

__all__ = ["RandomImages"]


class RandomImages(DataModule):
    """Inputs `(B, 3, 32, 32)` uint8, targets `(B,)` of ten classes."""

    def load(self) -> Samples:
        """Return 50,000 samples, the number of training samples in CIFAR-10."""
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (50_000, 3, 32, 32), np.uint8)
        return Samples(images, draw.integers(0, 10, 50_000), [str(number) for number in range(10)])
