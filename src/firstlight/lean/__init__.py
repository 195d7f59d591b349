"""Lightning's training loop without what costs time and does nothing, for as long as a fit lasts."""

from firstlight.lean.hooks import lean

__all__ = ["lean"]
