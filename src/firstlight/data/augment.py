"""Augmentations of images that need no other package.

Shapes: `B` batch, `C` channels, `H` height, `W` width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from firstlight.errors import check_range


class RandomShift(nn.Module):
    """Shift each image up, down, left or right by a random number of pixels; its reflection fills the gap.

    Images are `(B, C, H, W)`, and so is what it returns. It mirrors nothing but the gap, so digits, letters and signs
    keep their class. It is the random crop of padded images of He et al., "Deep Residual Learning for Image
    Recognition", 2016 (section 4.2), with a reflection instead of zeros.

    Args:
        share: The longest shift, as a share of height and width, in [0, 0.5].

    Raises:
        UsageError: If the share is out of range.
    """

    def __init__(self, share: float = 0.125) -> None:
        super().__init__()
        check_range(type(self).__name__, "[0, 0.5]", share=share)
        self.share = share

    def forward(self, images: Tensor) -> Tensor:
        """Return each image shifted by a distance of its own."""
        (batch, channels, *sides), device = images.shape, images.device
        down, right = (round(self.share * side) for side in sides)
        padded = pad(images, (right, right, down, down), mode="reflect")
        rows, columns = (
            torch.randint(2 * longest + 1, (batch, 1), device=device) + torch.arange(side, device=device)
            for longest, side in zip((down, right), sides, strict=True)
        )
        first, channel = (torch.arange(count, device=device) for count in (batch, channels))
        rows, columns = rows[:, None, :, None], columns[:, None, None]
        return padded[first[:, None, None, None], channel[:, None, None], rows, columns]
