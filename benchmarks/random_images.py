"""Images of nothing: a step takes as long with them as with others, and nothing has to be fetched."""

import numpy as np

from firstlight.data import DataModule
from firstlight.data.samples import Samples

__all__ = ["RandomImages"]


class RandomImages(DataModule):
    """Inputs `(B, 3, 32, 32)`, targets `(B,)` of ten classes."""

    def load(self) -> Samples:
        """Return as many as CIFAR-10 has to train with."""
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (50_000, 3, 32, 32), np.uint8)
        return Samples(images, draw.integers(0, 10, 50_000), [str(number) for number in range(10)])
