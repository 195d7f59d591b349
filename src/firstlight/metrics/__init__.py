"""Metrics of a split, retrieval metrics, and metrics of language models."""

from firstlight.metrics.language import BitsPerByte, Perplexity
from firstlight.metrics.retrieval import RecallAtK, recall_at_k
from firstlight.metrics.split_metrics import SplitMetrics

__all__ = ["BitsPerByte", "Perplexity", "RecallAtK", "SplitMetrics", "recall_at_k"]
