"""Text as bytes, for classification: the user's own, and the names of Unicode's characters.

A token is a byte shifted by one, so that 0 is padding. Shapes: `N` texts, `B` of a batch, `T` tokens of the longest.
"""

import logging
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.base import DataModule
from firstlight.data.files import digest_of, missing_column, read_csv
from firstlight.data.samples import Batch, Samples, TensorBatches
from firstlight.errors import UsageError

__all__ = ["LabelledText", "PaddedBatches", "Texts", "UnicodeNames"]

_log = logging.getLogger(__name__)

_FEWEST = 100
"""Names of a category of `UnicodeNames`."""


class PaddedBatches(TensorBatches):
    """Samples that are padded with 0 at the end, whose batches are cut to their longest.

    Args:
        inputs: `(N, T)`, each with something in it.
        targets: `(N, ...)`.
    """

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of the samples at `indices`."""
        inputs, targets = super().__getitems__(indices)
        longest = int(inputs.count_nonzero(dim=1).max())
        return inputs[:, :longest], targets


class Texts(DataModule):
    """Tokens `(B, T)` int64, padded at the end; targets are class indices `(B,)` int64. A subclass says what `load` is.

    Args:
        max_length: Bytes that are kept of a text, at least 1; how many texts are longer is said.
        **options: What every `DataModule` takes.

    Raises:
        UsageError: When a number is out of its range.
    """

    batches = PaddedBatches

    def __init__(self, max_length: int = 256, **options: Any) -> None:
        super().__init__(**options)
        if max_length < 1:
            raise UsageError(f"{type(self).__name__} was given max_length={max_length}: it is at least 1")
        self.max_length = max_length

    def tokens(self, texts: Sequence[str], source: str) -> NDArray[np.int16]:
        """Return the tokens of texts `(N, T)`, and say how many were cut."""
        encoded = [text.encode() for text in texts]
        longer = sum(len(each) > self.max_length for each in encoded)
        if longer:
            _log.warning(
                f"{source}: {longer:,} of {len(texts):,} texts are longer than max_length={self.max_length} bytes, and "
                "were cut"
            )
        cut = [np.frombuffer(each[: self.max_length], np.uint8) for each in encoded]
        tokens = np.zeros((len(cut), max(1, *map(len, cut))), np.int16)
        for row, each in zip(tokens, cut, strict=True):
            row[: len(each)] = each.astype(np.int16) + 1
        return tokens


class LabelledText(Texts):
    """Texts of a CSV file in UTF-8, see `Texts`. The classes are the labels that it has, in alphabetical order.

    Args:
        path: The file; its first line names the columns.
        text: Column of the text.
        label: Column of the label. A file without it can be predicted for.
        **options: What `Texts` and every `DataModule` takes.

    Raises:
        UsageError: When a number is out of its range, or the file cannot be used.
    """

    def __init__(self, path: str, text: str = "text", label: str = "label", **options: Any) -> None:
        super().__init__(**options)
        self.path = path
        self.text = text
        self.label = label

    def load(self) -> Samples:
        """Return the texts and their labels.

        Raises:
            UsageError: When a column is missing, or a row has a label that the checkpoint at hand has not learned.
        """
        file = read_csv(self.path)
        if missing := missing_column(self.path, [self.text], file.header):
            raise UsageError(missing)
        table = {name: [row[place] for row in file.rows] for place, name in enumerate(file.header)}
        known: dict[str, Any] = {"source": self.path, "lines": file.lines, "digest": file.digest}
        tokens = self.tokens(table[self.text], self.path)
        missing_reason = missing_column(self.path, [self.label], file.header)
        if missing_reason:
            return Samples(tokens, None, missing_reason=missing_reason, **known)
        labels = table[self.label]
        names = self.class_names or sorted(set(labels) - {""})
        for line, label in zip(file.lines, labels, strict=True):
            if label not in (*names, ""):
                raise UsageError(
                    f"{self.path}: line {line} has the {self.label} {label!r}, but the checkpoint was trained on the "
                    f"classes {', '.join(names)}"
                )
        # What is empty stays so, for `clean` to refuse or to drop.
        targets = np.array([names.index(label) if label else "" for label in labels], object)
        return Samples(tokens, targets, names, **known)


class UnicodeNames(Texts):
    """Which general category a character has, by its name in Unicode, see `Texts`. Nothing is downloaded.

    `LATIN SMALL LETTER A WITH ACUTE` is `Ll`, a lower-case letter. Left out are names that a rule makes (of Hangul
    syllables, and all that end with the code point) and categories with fewer than 100 names.

    Each release of Python has its own version of Unicode, so figures name the version of Python.

    Source: the module `unicodedata` of the standard library.
    """

    def load(self) -> Samples:
        """Return the names and their categories."""
        named = ((unicodedata.name(each, ""), each) for each in map(chr, range(sys.maxunicode + 1)))
        own = [
            (name, unicodedata.category(each))
            for name, each in named
            if name and not name.startswith("HANGUL SYLLABLE ") and not name.endswith(f"{ord(each):X}")
        ]
        counts = Counter(kind for _, kind in own)
        kinds = sorted(kind for kind, count in counts.items() if count >= _FEWEST)
        names, labels = zip(*((name, kinds.index(kind)) for name, kind in own if kind in kinds), strict=True)
        source = f"Unicode {unicodedata.unidata_version}"
        digest = digest_of("\n".join(names).encode())
        return Samples(self.tokens(names, source), np.array(labels), kinds, source=source, digest=digest)
