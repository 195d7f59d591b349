"""Text as bytes, for language models: any file, and the documentation that comes with Python.

A token is a byte shifted by one, so that 0 is padding. Shapes: `B` batch, `T` tokens of a window.
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
from firstlight.errors import UsageError

__all__ = ["Corpus", "PythonDocs", "Windows"]

Tokens = NDArray[np.int16]


class Windows(DataModule):
    """Tokens `(B, length)` int64, targets the tokens that follow, 0 where nothing is scored.

    The end of the text tests and what comes before it validates, so `split_seed` makes no difference. Their windows
    overlap, and score each byte once: what a window does not score is there to be read. A text other than the one that
    a checkpoint was trained on is scored as a whole, but for its first byte, which nothing comes before.

    Args:
        length: Tokens of a window, at least 2.
        context: A byte that is validated or tested has at least so many bytes before it in its window, wherever the
            text has them; below `length`.
        stride: Bytes from the start of a training window to that of the next: below `length` an epoch sees each byte
            several times, in other windows. `length` when none is given.
        **options: What every `DataModule` takes.

    Raises:
        UsageError: When a number is out of its range.
    """

    def __init__(self, length: int = 256, context: int = 128, stride: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        name = type(self).__name__
        if length < 2:
            raise UsageError(f"{name} was given length={length}: a window has at least 2 tokens")
        if not 0 <= context < length:
            raise UsageError(
                f"{name} was given context={context} and length={length}: the context is at least 0 and leaves "
                "something of a window to be scored"
            )
        if stride is not None and stride < 1:
            raise UsageError(f"{name} was given stride={stride}: windows start at least 1 byte apart")
        self.length = length
        self.context = context
        self.stride = length if stride is None else stride

    @abstractmethod
    def text(self) -> tuple[bytes, str]:
        """Return the text and what messages call it."""

    def load(self) -> Samples:
        """Return the windows of all three splits, or those that score the whole text."""
        text, source = self.text()
        tokens = np.frombuffer(text, np.uint8).astype(np.int16) + 1
        digest = digest_of(text)
        if self.fitted and self.fitted["digest"] != digest:
            if len(tokens) < 2:
                raise UsageError(f"{source} has {len(tokens)} bytes: there is nothing to score")
            inputs, targets = _scored(tokens, 1, self.length, self.context)
            return Samples(inputs, targets, source=source, digest=digest)
        test = len(tokens) - round(self.test_fraction * len(tokens))
        val = test - round(self.val_fraction * len(tokens))
        if not self.length < val < test < len(tokens):
            raise UsageError(
                f"{source} has {len(tokens):,} bytes: too few for windows of {self.length} to train on, and something "
                "to validate and test"
            )
        parts = {
            "train": _strided(tokens[:val], self.length, self.stride),
            "val": _scored(tokens[:test], val, self.length, self.context),
            "test": _scored(tokens, test, self.length, self.context),
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
        path: The file.
        encoding_errors: A text that is not UTF-8 is refused (`"refuse"`), or taken as it is (`"bytes"`).
        **options: What `Windows` and every `DataModule` takes.

    Raises:
        UsageError: When a number is out of its range, or the file cannot be used.
    """

    def __init__(self, path: str, encoding_errors: Literal["refuse", "bytes"] = "refuse", **options: Any) -> None:
        super().__init__(**options)
        self.path = path
        self.encoding_errors = encoding_errors

    def text(self) -> tuple[bytes, str]:
        """Return what the file holds, and its path."""
        content = read_bytes(self.path)
        if self.encoding_errors == "refuse":
            read_text(content, self.path, "; encoding_errors=bytes takes a text as it is")
        return content, self.path


class PythonDocs(Windows):
    """The language reference that `help()` shows, 0.5 MB, see `Windows`. Nothing is downloaded.

    Each release of Python has its own, so figures name the version of Python.

    Source: the module `pydoc_data.topics` of the standard library, its texts in the order of their names, a line break
    between one and the next.
    """

    def text(self) -> tuple[bytes, str]:
        """Return the text, and its name with the version of Python."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        return text.encode(), f"pydoc_data.topics of Python {platform.python_version()}"


def _strided(tokens: Tokens, length: int, stride: int) -> tuple[Tokens, Tokens]:
    """Return windows of tokens and of what follows each, `(N, length)`, that start `stride` tokens apart."""
    windows = sliding_window_view(tokens, length + 1)
    # The end is not lost: the last window is as near to the one before as it must be.
    starts = np.union1d(np.arange(0, len(windows), stride), len(windows) - 1)
    return windows[starts, :-1], windows[starts, 1:]


def _scored(tokens: Tokens, first: int, length: int, context: int) -> tuple[Tokens, Tokens]:
    """Return windows of tokens and of what follows each, `(N, length)`, that score each token from `first` on once."""
    inputs, targets = [], []
    while first < len(tokens):
        # As much before it as there is, where the text ends before the window would.
        start = max(0, min(first - 1 - context, len(tokens) - 1 - length))
        window = tokens[start : start + length + 1]
        window = np.pad(window, (0, length + 1 - len(window)))
        scored = np.where(np.arange(start + 1, start + length + 1) < first, 0, window[1:])
        inputs.append(window[:-1])
        targets.append(scored)
        first = start + length + 1
    return np.array(inputs, np.int16), np.array(targets, np.int16)
