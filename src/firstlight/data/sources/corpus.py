"""Text as bytes for language models: a text file, and the documentation that Python includes.

A token is a byte plus one, so that 0 is padding. Shapes: `N` windows, `B` batch.
"""

import platform
from abc import abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from firstlight.data.base import DataModule
from firstlight.data.files import digest_of, read_bytes, read_text
from firstlight.data.samples import Samples
from firstlight.errors import UsageError, check_range

Tokens = NDArray[np.int16]


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
        **options: Arguments of `DataModule`.
    """

    def __init__(self, length: int = 256, context: int = 128, stride: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        name = type(self).__name__
        check_range(name, "[2, inf)", length=length)
        check_range(f"{name} with length={length}", f"[0, {length})", context=context)
        self.length = length
        self.context = context
        self.stride = length if stride is None else stride
        check_range(name, "[1, inf)", stride=self.stride)

    @abstractmethod
    def text(self) -> tuple[bytes, str]:
        """Return the text and its name in messages."""

    def load(self) -> Samples:
        """Return the windows of the three splits, or windows that score the whole text if it is other data."""
        text, source = self.text()
        tokens = np.frombuffer(text, np.uint8).astype(np.int16) + 1
        digest = digest_of(text)
        if self.fitted and self.fitted["digest"] != digest:
            if len(tokens) < 2:
                raise UsageError(f"{source} has {len(tokens)} bytes: it must have at least 2")
            inputs, targets = _scored_windows(tokens, 1, self.length, self.context)
            return Samples(inputs, targets, source=source, digest=digest)
        test = len(tokens) - round(self.test_fraction * len(tokens))
        val = test - round(self.val_fraction * len(tokens))
        if not self.length < val < test < len(tokens):
            raise UsageError(
                f"{source} has {len(tokens):,} bytes: too few for a training window of length={self.length}, and for "
                "validation and test"
            )
        parts = {
            "train": _training_windows(tokens[:val], self.length, self.stride),
            "val": _scored_windows(tokens[:test], val, self.length, self.context),
            "test": _scored_windows(tokens, test, self.length, self.context),
        }
        return Samples(
            np.concatenate([inputs for inputs, _ in parts.values()]),
            np.concatenate([targets for _, targets in parts.values()]),
            split=np.repeat(list(parts), [len(inputs) for inputs, _ in parts.values()]),
            source=source,
            digest=digest,
        )


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
            read_text(content, self.path, "; encoding_errors=bytes uses the bytes anyway")
        return content, self.path


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


def _training_windows(tokens: Tokens, length: int, stride: int) -> tuple[Tokens, Tokens]:
    """Return windows and their next tokens, both `(N, length)`, that start `stride` tokens apart."""
    windows = sliding_window_view(tokens, length + 1)
    # The last window ends with the text, even if it starts less than a stride after the one before.
    starts = np.union1d(np.arange(0, len(windows), stride), len(windows) - 1)
    return windows[starts, :-1], windows[starts, 1:]


def _scored_windows(tokens: Tokens, first: int, length: int, context: int) -> tuple[Tokens, Tokens]:
    """Return windows and their next tokens, both `(N, length)`, that score each token from `first` on once."""
    inputs, targets = [], []
    while first < len(tokens):
        # More context than needed if the window would reach beyond the end of the text.
        start = max(0, min(first - 1 - min(context, length - 1), len(tokens) - 1 - length))
        window = tokens[start : start + length + 1]
        window = np.pad(window, (0, length + 1 - len(window)))
        scored = np.where(np.arange(start + 1, start + length + 1) < first, 0, window[1:])
        inputs.append(window[:-1])
        targets.append(scored)
        first = start + length + 1
    return np.array(inputs, np.int16), np.array(targets, np.int16)
