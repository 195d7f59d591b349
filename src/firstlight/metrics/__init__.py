"""Metrics of a whole split, of embeddings and of language models."""

from firstlight.metrics.language import BitsPerByte, Perplexity
from firstlight.metrics.retrieval import NeighbourRecall, neighbour_recall
from firstlight.metrics.split_metrics import Observed

__all__ = ["BitsPerByte", "NeighbourRecall", "Observed", "Perplexity", "neighbour_recall"]
