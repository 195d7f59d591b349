"""Metrics of a split, of classes, AUROC, R², retrieval metrics, and metrics of language models."""

from firstlight.metrics.classes import BalancedAccuracy, LogLoss, MacroF1, MulticlassAUROC
from firstlight.metrics.language import BitsPerByte, Perplexity
from firstlight.metrics.retrieval import RecallAtK, recall_at_k
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.metrics.whole_split import AUROC, R2, auroc, r2

__all__ = [
    "AUROC",
    "R2",
    "BalancedAccuracy",
    "BitsPerByte",
    "LogLoss",
    "MacroF1",
    "MulticlassAUROC",
    "Perplexity",
    "RecallAtK",
    "SplitMetrics",
    "auroc",
    "r2",
    "recall_at_k",
]
