"""The handwritten digits that scikit-learn includes: 1,797 images of 8x8 pixels in ten classes.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from firstlight.data.base import DataModule
from firstlight.data.samples import Samples
from firstlight.errors import check_range


class Digits(DataModule):
    """Handwritten digits: inputs `(B, 1, size, size)` float32, targets `(B,)` int64 from 0 to 9.

    Nothing is downloaded.

    Args:
        size: Height and width of the images in pixels, at least 8. Above 8 they are enlarged by bilinear interpolation.
        **options: Arguments of `DataModule`.
    """

    def __init__(self, size: int = 8, **options: Any) -> None:
        super().__init__(**options)
        check_range("Digits", "[8, inf)", size=size)
        self.size = size

    def load(self) -> Samples:
        """Return the images as uint8, the labels and the class names. The 17 grey levels are multiples of 15."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().mul(15).unsqueeze(1)
        if self.size > 8:
            images = interpolate(images, size=(self.size, self.size), mode="bilinear").round()
        return Samples(images.byte().numpy(), digits.target, [str(name) for name in digits.target_names])
