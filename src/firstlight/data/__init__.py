"""Data modules: load, clean, split, fit, scale, batch."""

from firstlight.data.augment import RandomShift
from firstlight.data.base import DataModule
from firstlight.data.samples import Samples
from firstlight.data.sources.arrays import Arrays
from firstlight.data.sources.corpus import Corpus, PythonDocs
from firstlight.data.sources.digits import Digits
from firstlight.data.sources.image_folder import ImageFolder
from firstlight.data.sources.labelled_text import LabelledText, UnicodeNames
from firstlight.data.sources.mnist import MNIST, FashionMNIST
from firstlight.data.sources.sklearn_tables import BreastCancer, Diabetes
from firstlight.data.sources.table import Table
from firstlight.data.sources.tensors import Tensors

__all__ = [
    "MNIST",
    "Arrays",
    "BreastCancer",
    "Corpus",
    "DataModule",
    "Diabetes",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "LabelledText",
    "PythonDocs",
    "RandomShift",
    "Samples",
    "Table",
    "Tensors",
    "UnicodeNames",
]
