"""Data modules: load, clean, split, scale, batch."""

from firstlight.data.base import DataModule
from firstlight.data.corpus import Corpus, PythonDocs
from firstlight.data.digits import Digits
from firstlight.data.labelled_text import LabelledText, UnicodeNames
from firstlight.data.samples import Samples

__all__ = ["Corpus", "DataModule", "Digits", "LabelledText", "PythonDocs", "Samples", "UnicodeNames"]
