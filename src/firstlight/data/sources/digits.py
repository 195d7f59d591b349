"""The handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels in ten classes.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from firstlight.data.base import DataModule
from firstlight.data.samples import Samples
from firstlight.errors import UsageError

__all__ = ["Digits"]


class Digits(DataModule):
    """Inputs `(B, 1, size, size)` float32, targets `(B,)` int64 from 0 to 9. Nothing is downloaded.

    Args:
        size: Side of the images in pixels, at least 8; above 8 they are enlarged bilinearly.
        **options: What every `DataModule` takes.

    Raises:
        UsageError: When a value is out of its range.
    """

    def __init__(self, size: int = 8, **options: Any) -> None:
        super().__init__(**options)
        if size < 8:
            raise UsageError(f"Digits was given size={size}: the images have 8 pixels a side, or more when enlarged")
        self.size = size

    def load(self) -> Samples:
        """Return the images as uint8, their 17 shades 15 apart, their labels and the ten names."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().mul(15).unsqueeze(1)
        if self.size > 8:
            images = interpolate(images, size=(self.size, self.size), mode="bilinear").round()
        return Samples(images.byte().numpy(), digits.target, [str(name) for name in digits.target_names])
