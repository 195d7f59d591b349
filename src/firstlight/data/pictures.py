"""Decode image files to arrays of one size with one number of channels.

Shapes: `C` channels, 1 for grey or 3 for colour; `H` height, `W` width.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

T = TypeVar("T")
R = TypeVar("R")

Resize = Literal["stretch", "crop"]

SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k"), "JPEG2000"),
    **{".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".avif": "AVIF"},
}
"""Formats that are read, by the suffix of a file. Others are left out: for EPS, Pillow starts a program."""

_FORMATS = sorted({*SUFFIXES.values()})
_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")
_TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width.
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Header:
    """What the start of an image file says.

    Args:
        height: Of the upright image, in pixels.
        width: Of the upright image, in pixels.
        is_grey: Whether the file holds grey values only; a palette counts as colour.
    """

    height: int
    width: int
    is_grey: bool


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore Pillow's warnings, for example about metadata. What makes an image unreadable is an error, not a warning.

    A filter belongs to all threads, so this surrounds the threads that decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results for all items, in their order. Pillow decodes in parallel, with as many threads as torch."""
    threads = torch.get_num_threads()
    with quiet():
        if threads == 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(threads)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def read_header(path: Path) -> Header:
    """Return what the start of an image file says, without decoding the pixels.

    Raises:
        Exception: If the file is not an image. Which one depends on its format.
    """
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        # Pillow 13 decodes a PNG file to look for EXIF data behind its pixels.
        has_exif = image.format != "PNG" or "exif" in image.info
        if has_exif and image.getexif().get(_EXIF_ORIENTATION) in _ROTATED:
            width, height = height, width
        return Header(height, width, image.mode in _GREY_MODES)


def decode(content: bytes, size: Sequence[int], channels: int, resize: Resize) -> NDArray[np.uint8]:
    """Return the pixels `(C, H, W)` of an image file; of an animation, the first frame.

    The image is upright, as its EXIF orientation asks. Transparent parts are white. 16 bits become 8: 65,535 becomes
    255. Colours become grey by ITU-R 601.

    Args:
        content: Of the file.
        size: Height and width in pixels. An image of this size is not changed.
        channels: 1 for grey, 3 for red, green and blue.
        resize: `"stretch"` keeps the whole image and changes its aspect ratio. `"crop"` keeps the ratio, fits the
            shorter side and cuts the longer one at both ends.

    Raises:
        Exception: If the image cannot be decoded. Which one depends on its format.
    """
    height, width = size
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in less time. Twice the side leaves enough to average.
        longest = 2 * max(height, width)
        image.draft(None, (longest, longest))
        upright = ImageOps.exif_transpose(image)
        upright = _in_eight_bits(upright)
        upright = _on_white(upright).convert("L" if channels == 1 else "RGB")
        if upright.size != (width, height):
            if resize == "crop":
                upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
            else:
                upright = upright.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(upright)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def fault(content: bytes, error: BaseException) -> str:
    """Return why a file could not be decoded, for a message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not content:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image whose values fit in 8 bits. Pillow's `convert` would make all values above 255 white."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no known range: save them with 8 or 16 bits")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency, drawn on white."""
    if image.mode not in _TRANSPARENT_MODES and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
