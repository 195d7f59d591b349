"""Data modules: load, clean, split, scale, batch."""

from firstlight.data.base import DataModule
from firstlight.data.digits import Digits
from firstlight.data.samples import Samples

__all__ = ["DataModule", "Digits", "Samples"]
