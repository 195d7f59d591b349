"""Data modules: load, clean, split, scale, batch."""

from firstlight.data.base import DataModule
from firstlight.data.breast_cancer import BreastCancer
from firstlight.data.corpus import Corpus, PythonDocs
from firstlight.data.diabetes import Diabetes
from firstlight.data.digits import Digits
from firstlight.data.labelled_text import LabelledText, UnicodeNames
from firstlight.data.mnist import MNIST, FashionMNIST
from firstlight.data.samples import Samples
from firstlight.data.table import Table
from firstlight.data.tensors import Tensors

__all__ = [
    "MNIST",
    "BreastCancer",
    "Corpus",
    "DataModule",
    "Diabetes",
    "Digits",
    "FashionMNIST",
    "LabelledText",
    "PythonDocs",
    "Samples",
    "Table",
    "Tensors",
    "UnicodeNames",
]
