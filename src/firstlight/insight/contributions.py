"""Metrics as means over samples, so that one method gives the interval of each.

A metric that is no mean, for example `auroc`, is replaced by its first-order expansion: each sample contributes the
metric plus its influence on it. The mean is the metric itself, and the variance that of the delta method; for `auroc`
it is that of DeLong et al., "Comparing the areas under two or more correlated ROC curves", 1988.

Shapes: `N` samples, `K` classes, labels or outputs.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

Array = np.ndarray[Any, Any]

_SMALLEST = np.finfo(np.float64).eps  # As the metric `log_loss`.


def contributions(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return by metric what each sample adds to it, `(N,)`, whose mean is the metric.

    Args:
        outputs: The arrays of `firstlight.run.outputs.read_outputs`.
    """
    kind, found = outputs["kind"], _of_loss(outputs)
    targets, values, predictions = (outputs.get(name) for name in ("targets", "outputs", "predictions"))
    if targets is None:
        return found
    if predictions is not None and predictions.shape == targets.shape and not np.issubdtype(targets.dtype, np.floating):
        found |= _of_indices(kind, predictions, targets)
    if values is None:
        return found
    if kind in ("classes", "binary", "labels"):
        found |= _of_probabilities(kind, values, targets, outputs.get("logits"))
    elif kind == "numbers" and values.shape == targets.shape:
        found |= _of_numbers(values.reshape(len(values), -1), targets.reshape(len(targets), -1))
    return {name: each for name, each in found.items() if np.isfinite(each).all()}


def _of_loss(outputs: Mapping[str, Any]) -> dict[str, Array]:
    if "loss" not in outputs:
        return {}
    loss, weight = outputs["loss"].astype(np.float64), outputs["weight"].astype(np.float64)
    if not weight.sum() > 0:
        return {}
    mean = np.average(loss, weights=weight)
    each = mean + (loss - mean) * weight / weight.mean()
    if outputs["kind"] != "tokens":
        return {"loss": each}
    return {"loss": each, "bits_per_byte": each / math.log(2), "perplexity": math.exp(mean) * (1 + each - mean)}


def _of_indices(kind: str, predictions: Array, targets: Array) -> dict[str, Array]:
    right = (predictions == targets).reshape(len(targets), -1)
    found = {"accuracy": right.mean(1)}
    if kind == "classes":
        classes = np.union1d(predictions, targets)
        true, predicted = targets[:, None] == classes, predictions[:, None] == classes
        found["balanced_accuracy"] = _mean_ratio(true & predicted, true)
        found["f1"] = _mean_ratio(2 * (true & predicted), true.astype(int) + predicted)
    if kind == "binary":
        true, predicted = targets[:, None] == [0, 1], predictions[:, None] == [0, 1]
        found["balanced_accuracy"] = _mean_ratio(true & predicted, true)
        both = 2 * (true & predicted), true.astype(int) + predicted
        found["f1"] = _mean_ratio(*(each[:, 1:] for each in both))
    if kind == "labels":
        found["f1"] = _mean_ratio(2 * (targets & predictions), targets + predictions, absent=0.0)
    return found


def _of_probabilities(kind: str, probabilities: Array, targets: Array, logits: Array | None) -> dict[str, Array]:
    probabilities = probabilities.astype(np.float64)
    # Probabilities of large logits are equal, and 1 minus one of them is 0.
    ranked = probabilities if logits is None else logits.astype(np.float64)
    if kind == "classes":
        labels, scores = targets[:, None] == np.arange(probabilities.shape[1]), probabilities
        of_target = probabilities[np.arange(len(targets)), targets]
    elif kind == "binary":
        labels, scores = targets[:, None] == 1, ranked[:, None]
        of_target = np.where(targets == 1, probabilities, 1 - probabilities)
        if logits is not None:
            of_target = expit(np.where(targets == 1, ranked, -ranked))
    else:
        labels, scores = targets == 1, ranked
        of_target = None
    found = {"auroc": np.mean([_auroc(*each) for each in zip(scores.T, labels.T, strict=True)], axis=0)}
    if of_target is not None:
        found["log_loss"] = -np.log(of_target.clip(_SMALLEST, 1 - _SMALLEST))
    return found


def _of_numbers(values: Array, targets: Array) -> dict[str, Array]:
    errors = values - targets
    squares = np.square(errors)
    mse = squares.mean()
    rmse = math.sqrt(mse)
    spread = np.square(targets - targets.mean(0))
    found = {
        "mae": np.abs(errors).mean(1),
        "rmse": rmse + (squares.mean(1) - mse) / (2 * rmse) if rmse else squares.mean(1),
    }
    if spread.mean(0).all():
        found["r2"] = 1 - _mean_ratio(squares, spread)
    return found


def _mean_ratio(above: Array, below: Array, absent: float | None = None) -> Array:
    """Return contributions `(N,)` to the mean over columns of `above.sum(0) / below.sum(0)`, both `(N, K)`.

    Columns whose `below` is 0 count as `absent`, or are left out if that is None.
    """
    is_defined = below.sum(0) > 0
    above, below = above[:, is_defined], below[:, is_defined]
    ratios = above.sum(0) / below.sum(0)
    each = ratios + (above - ratios * below) / below.mean(0)
    if absent is None:
        return each.mean(1)  # type: ignore[no-any-return]
    return (each.sum(1) + absent * (~is_defined).sum()) / len(is_defined)  # type: ignore[no-any-return]


def _auroc(scores: Array, labels: Array) -> Array:
    """Return contributions `(N,)` to the area under the ROC curve, NaN if all samples have the same label."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return np.full(len(labels), np.nan)
    ranks, within = rankdata(scores), np.empty(len(scores))
    within[labels], within[~labels] = rankdata(scores[labels]), rankdata(scores[~labels])
    # The share of samples of the other label that the sample is ranked rightly against.
    share = np.where(labels, (ranks - within) / negatives, 1 - (ranks - within) / positives)
    area = share[labels].mean()
    return area + (share - area) * len(labels) / np.where(labels, positives, negatives)  # type: ignore[no-any-return]
