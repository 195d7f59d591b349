"""Text as bytes for classification: texts in a CSV file, and the names of Unicode characters.

A token is a byte plus one, so that 0 is padding. Shapes: `N` texts, `B` batch, `T` tokens of the longest text.
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
from firstlight.data.cells import encode_labels
from firstlight.data.files import digest_of, missing_column, read_table
from firstlight.data.raw import texts_of
from firstlight.data.samples import Batch, Samples, TensorBatches
from firstlight.errors import UsageError, about, check_range, check_saved

_log = logging.getLogger(__name__)

_MIN_NAMES = 100
"""Smallest category of `UnicodeNames`."""

_LENGTHS = (256, 4096)
"""Bytes up to which the longest text gives `max_length`, and the most that it becomes."""


class PaddedBatches(TensorBatches):
    """Samples `(N, T)` padded with 0 at the end, each with a token; each batch is cut to its longest sample."""

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of samples at `indices`."""
        inputs, targets = super().__getitems__(indices)
        longest = int(inputs.count_nonzero(dim=1).max())
        return inputs[:, :longest], targets


class Texts(DataModule):
    """Texts as tokens `(B, T)` int64, padded at the end; targets are class indices `(B,)` int64.

    A subclass implements `load`.

    Args:
        max_length: Bytes after which a text is cut, at least 1. A warning gives the number of texts that were cut.
            None: the longest text, if it has at most 256 bytes. Otherwise the length that 99 % of the texts do not
            exceed, from 256 to 4,096. The fitted state holds the number, so a checkpoint cuts new texts as the training
            texts.
        **options: Arguments of `DataModule`.
    """

    tokens_are_bytes = True
    dataset_class = PaddedBatches

    def __init__(self, max_length: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if max_length is not None:
            check_range(type(self).__name__, "[1, inf)", max_length=max_length)
        self.max_length = max_length
        self._max_length = 0  # Of the loaded samples.

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return the number of bytes after which texts were cut."""
        return {"max_length": self._max_length}

    def check_fitted(self, state: dict[str, Any]) -> None:
        """Refuse a state of another form than `fit` gives it."""
        super().check_fitted(state)
        check_saved(type(self).__name__, state, max_length=int)
        with about("the checkpoint is damaged"):
            check_range(type(self).__name__, "[0, inf)", max_length=state["max_length"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the fitted state of a checkpoint, and cut texts as it did."""
        if isinstance(state_dict, dict) and state_dict.get("max_length") != self._max_length:
            self._samples = None
        super().load_state_dict(state_dict)

    def samples_from(self, raw: Any) -> Samples:
        """Return a list of texts, or the texts in a DataFrame or a list of dicts, as tokens."""
        return Samples(self.tokens(texts_of(raw, getattr(self, "text", "text")), "the input"), None)

    def tokens(self, texts: Sequence[str], source: str) -> NDArray[np.int16]:
        """Return the tokens of texts, `(N, T)`, and warn if some were cut."""
        encoded = [text.encode() for text in texts]
        lengths = [*map(len, encoded)]
        known = self.max_length or self.fitted.get("max_length")
        length = self._max_length = known or _choose_length(lengths)
        longer = sum(each > length for each in lengths)
        if longer:
            _log.warning(
                f"{source}: {longer:,} of {len(texts):,} texts were cut, because they are longer than "
                f"max_length={length} bytes"
            )
        elif not known:
            _log.warning(f"{source}: the longest of {len(texts):,} texts gives max_length={length} bytes")
        cut = [np.frombuffer(each[:length], np.uint8) for each in encoded]
        tokens = np.zeros((len(cut), max(1, *map(len, cut))), np.int16)
        for row, each in zip(tokens, cut, strict=True):
            row[: len(each)] = each.astype(np.int16) + 1
        return tokens


class LabelledText(Texts):
    """Texts of a CSV file in UTF-8, see `Texts`. The classes are the labels in the file, sorted.

    Args:
        path: Path of the file. Its first line names the columns.
        text: Name of the column of texts.
        label: Name of the column of labels. Prediction does not need it.
        split: Name of a column that holds `train`, `val` or `test` for each row; None: the rows are split at random.
        **options: Arguments of `Texts` and `DataModule`.
    """

    def __init__(
        self, path: str, text: str = "text", label: str = "label", split: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if text == label:
            raise UsageError(f"LabelledText was given text={text} and label={label}: they must be two columns")
        self.path = path
        self.text = text
        self.label = label
        self.split_column = split

    def load(self) -> Samples:
        """Return the texts and their labels. Without the column of labels, they can only be predicted."""
        file = read_table(self.path)
        if missing := missing_column(self.path, [self.text], file.header):
            raise UsageError(missing)
        table = {name: [row[index] for row in file.rows] for index, name in enumerate(file.header)}
        fields: dict[str, Any] = {"source": self.path, "lines": file.lines, "digest": file.digest}
        tokens = self.tokens(table[self.text], self.path)
        splits = [] if self.split_column is None else [self.split_column]
        missing_reason = missing_column(self.path, [self.label, *splits], file.header)
        if missing_reason:
            return Samples(tokens, None, missing_reason=missing_reason, **fields)
        labels = np.array(table[self.label], object)
        targets, names = encode_labels(labels, self.class_names, self.path, self.label, file.lines)
        if self.split_column:
            fields["split"] = np.array([*map(str.strip, table[self.split_column])])
        return Samples(tokens, targets, names, **fields)


class UnicodeNames(Texts):
    """Names of Unicode characters; the classes are their general categories. See `Texts`. Nothing is downloaded.

    For example, `LATIN SMALL LETTER A WITH ACUTE` is `Ll`, a lower-case letter. The data leaves out names that follow
    from the code point (Hangul syllables, and names that end with it) and categories with fewer than 100 names.

    The data depends on the version of Python, so results must name it.

    Source: the module `unicodedata` of the standard library.
    """

    def load(self) -> Samples:
        """Return the names and their categories."""
        named = ((unicodedata.name(each, ""), each) for each in map(chr, range(sys.maxunicode + 1)))
        described = [
            (name, unicodedata.category(each))
            for name, each in named
            if name and not name.startswith("HANGUL SYLLABLE ") and not name.endswith(f"{ord(each):X}")
        ]
        counts = Counter(kind for _, kind in described)
        kinds = sorted(kind for kind, count in counts.items() if count >= _MIN_NAMES)
        names, labels = zip(*((name, kinds.index(kind)) for name, kind in described if kind in kinds), strict=True)
        source = f"Unicode {unicodedata.unidata_version}"
        digest = digest_of("\n".join(names).encode())
        return Samples(self.tokens(names, source), np.array(labels), kinds, source=source, digest=digest)


def _choose_length(lengths: Sequence[int]) -> int:
    """Return the length at which to cut texts of these lengths, at least 1, see `Texts`."""
    shortest, longest = _LENGTHS
    quantile = int(np.quantile(lengths, 0.99, method="inverted_cdf")) if lengths else 1
    return max(1, min(max(lengths, default=1), max(shortest, quantile), longest))
