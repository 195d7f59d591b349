"""Data modules: load, clean, split, scale, batch."""

from firstlight.data.base import DataModule
from firstlight.data.digits import Digits

__all__ = ["DataModule", "Digits"]
