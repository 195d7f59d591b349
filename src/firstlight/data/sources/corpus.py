"""Text as bytes for language models: a text file, and the documentation that Python includes.

A token is a byte plus one, so that 0 is padding. Shapes: `N` windows, `B` batch.
"""

import math
import platform
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from firstlight.data.base import DataModule
from firstlight.data.files import check_text, digest_of_parts, read_bytes, read_text
from firstlight.data.raw import texts_of
from firstlight.data.samples import Samples
from firstlight.data.stored import File, Indices, Stored
from firstlight.errors import UsageError, check_range


class Windows(DataModule):
    """A text as windows of tokens `(B, length)` int64; targets are the next tokens, 0 where nothing is scored.

    The split follows the order of the text, training, validation, test, and ignores `split_seed`. Validation and test
    windows overlap, and each byte is scored once: the bytes that a window does not score are context. If a checkpoint
    was trained on another text, the whole text is scored except its first byte, which has no context.

    Args:
        length: Tokens in a window, at least 2.
        context: Smallest number of bytes before a scored byte in its validation or test window, if the text has them.
            At least 0 and below `length`.
        stride: Bytes between the starts of two training windows, at least 1. Below `length`, windows overlap and an
            epoch contains each byte several times. None: `length`.
        in_memory: Whether the windows stay in memory, four bytes for each token. None: if they take at most 1/4 of the
            free memory. Otherwise each batch is read from the file, with the same batches.
        **options: Arguments of `DataModule`.
    """

    tokens_are_bytes = True

    def __init__(
        self,
        length: int = 256,
        context: int = 128,
        stride: int | None = None,
        in_memory: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.in_memory = in_memory
        name = type(self).__name__
        check_range(name, "[2, inf)", length=length)
        check_range(f"{name} with length={length}", f"[0, {length})", context=context)
        self.length = length
        self.context = context
        self.stride = length if stride is None else stride
        check_range(name, "[1, inf)", stride=self.stride)

    def samples_from(self, raw: Any) -> Samples:
        """Return windows that score each text of a list, except its first byte, which has no context."""
        windows: dict[str, list[NDArray[Any]]] = {"inputs": [], "targets": []}
        for content in texts_of(raw, "text"):
            text = _Text(content.encode())
            if text.size < 2:
                raise UsageError(f"a text has {text.size} bytes: it must have at least 2")
            part = _scored(1, text.size, self.length, self.context)
            for are, found in windows.items():
                found.append(_Windows(text, [part], self.length, are)[:])
        return Samples(np.concatenate(windows["inputs"]), np.concatenate(windows["targets"]))

    @abstractmethod
    def text(self) -> tuple[bytes, str]:
        """Return the text and its name in messages."""

    def content(self) -> "tuple[_Text | File, str]":
        """Return the text as something of which parts can be read, and its name in messages."""
        text, source = self.text()
        return _Text(text), source

    def load(self) -> Samples:
        """Return the windows of the three splits, or windows that score the whole text if it is other data."""
        text, source = self.content()
        digest = digest_of_parts(text.chunks())
        if self.fitted and self.fitted["digest"] != digest:
            if text.size < 2:
                raise UsageError(f"{source} has {text.size} bytes: it must have at least 2")
            parts = {"test": _scored(1, text.size, self.length, self.context)}
        else:
            test = text.size - round(self.test_fraction * text.size)
            val = test - round(self.val_fraction * text.size)
            if not self.length < val < test < text.size:
                raise UsageError(
                    f"{source} has {text.size:,} bytes: too few for a training window of length={self.length}, and for "
                    "validation and test"
                )
            parts = {
                "train": _training(val, self.length, self.stride),
                "val": _scored(val, test, self.length, self.context),
                "test": _scored(test, text.size, self.length, self.context),
            }
        windows = [_Windows(text, [*parts.values()], self.length, are) for are in ("inputs", "targets")]
        fits = self.fits_in_memory(sum(each.nbytes for each in windows), source)
        inputs, targets = (each[:] if fits else each for each in windows)
        # One text for all windows of a split takes less memory than one for each.
        split = np.repeat(np.array([*parts], object), [part.count for part in parts.values()])
        return Samples(inputs, targets, split=split, source=source, digest=digest)


_HINT = "; encoding_errors=bytes uses the bytes anyway"


class Corpus(Windows):
    """The bytes of a text file, see `Windows`.

    Args:
        path: Path of the file.
        encoding_errors: How a file that is not UTF-8 is handled. `"refuse"`: raise an error. `"bytes"`: use its bytes.
        **options: Arguments of `Windows` and `DataModule`.
    """

    def __init__(self, path: str, encoding_errors: Literal["refuse", "bytes"] = "refuse", **options: Any) -> None:
        super().__init__(**options)
        self.path = path
        self.encoding_errors = encoding_errors

    def text(self) -> tuple[bytes, str]:
        """Return the content of the file and its path."""
        content = read_bytes(self.path)
        if self.encoding_errors == "refuse":
            read_text(content, self.path, _HINT)
        return content, self.path

    def content(self) -> "tuple[_Text | File, str]":
        """Return the file, of which parts can be read, and its path."""
        if not Path(self.path).is_file():  # For example a pipe, which can be read once.
            return super().content()
        file = File(self.path)
        if self.encoding_errors == "refuse":
            check_text(file.chunks(), self.path, _HINT)
        return file, self.path


class PythonDocs(Windows):
    """The language reference that `help()` shows, 0.5 MB, see `Windows`. Nothing is downloaded.

    The text depends on the version of Python, so results must name it.

    Source: the module `pydoc_data.topics` of the standard library. Its texts are sorted by name and joined by a line
    break.
    """

    def text(self) -> tuple[bytes, str]:
        """Return the text and its name with the version of Python."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        return text.encode(), f"pydoc_data.topics of Python {platform.python_version()}"


class _Text:
    """A text in memory, of which parts are read as of a `File`."""

    def __init__(self, text: bytes) -> None:
        self._bytes = np.frombuffer(text, np.uint8)
        self.size = len(text)

    def read(self, starts: Indices, width: int) -> NDArray[np.uint8]:
        """Return the bytes `(B, width)` from each position in `starts` on."""
        return sliding_window_view(self._bytes, width)[starts]

    def chunks(self) -> Iterator[bytes]:
        """Yield the whole text."""
        yield self._bytes.tobytes()


@dataclass(frozen=True)
class _Part:
    """Windows of a split. Window `k` starts at byte `min(start + k * step, last)`.

    Args:
        count: Number of windows.
        start: Start of the first window.
        step: Bytes between the starts of two windows.
        last: Latest start of a window.
        scored: First byte that the first window scores. The others score what the one before does not contain.
        once: Whether bytes that the window before contains are not scored again.
    """

    count: int
    start: int
    step: int
    last: int
    scored: int
    once: bool


def _training(size: int, length: int, stride: int) -> _Part:
    """Return windows of the first `size` bytes that start `stride` bytes apart."""
    last = size - length - 1
    # The last window ends with the text, even if it starts less than a stride after the one before.
    return _Part(1 + math.ceil(last / stride), 0, stride, last, 0, once=False)


def _scored(first: int, size: int, length: int, context: int) -> _Part:
    """Return windows that score each byte from `first` to `size` once."""
    # More context than needed if the window would reach beyond the end of the text.
    last = max(0, size - 1 - length)
    context = min(context, length - 1)
    start = max(0, min(first - 1 - context, last))
    step = length - context
    return _Part(1 + math.ceil((last - start) / step), start, step, last, first, once=True)


class _Windows(Stored):
    """Inputs or targets `(N, length)` int16 of the windows of a text, one part after the other."""

    def __init__(self, text: _Text | File, parts: Sequence[_Part], length: int, are: str) -> None:
        super().__init__((sum(part.count for part in parts), length), np.int16)
        self.text = text
        self.parts = parts
        self.are_targets = are == "targets"

    def read(self, rows: Indices) -> NDArray[np.int16]:
        """Return the windows at `rows`."""
        length = self.shape[1]
        bounds = np.cumsum([part.count for part in self.parts])
        of_part = np.searchsorted(bounds, rows, side="right")
        start, step, last, scored, once = (
            np.array([getattr(part, name) for part in self.parts])[of_part]
            for name in ("start", "step", "last", "scored", "once")
        )
        within = rows - (bounds - [part.count for part in self.parts])[of_part]
        starts = np.minimum(start + within * step, last)
        tokens = np.zeros((len(rows), length + 1), np.int16)
        width = min(length + 1, self.text.size)  # A short text is padded.
        tokens[:, :width] = self.text.read(starts, width)
        tokens[:, :width] += 1
        if not self.are_targets:
            return tokens[:, :-1].copy()
        before = start + (within - 1) * step + length + 1  # The byte after the window before.
        first = np.where(once & (within > 0), before, scored)
        positions = starts[:, None] + np.arange(1, length + 1)
        return np.where(positions < first[:, None], 0, tokens[:, 1:]).astype(np.int16)
