"""Statistics of columns: how far two distributions are apart, and how well a column predicts a target.

Shapes: `N` samples.
"""

import math

import numpy as np
import torch

from firstlight.data.quality.values import Column, Numbers
from firstlight.data.stored import Indices

_LEAVES = 32
_BINS = 16


def number_distance(first: Numbers, second: Numbers) -> tuple[float, float]:
    """Return the distance of Kolmogorov and Smirnov of two samples, and about its probability by chance.

    A missing value counts as a number below all others.
    """
    first, second = (np.sort(np.where(np.isnan(each), -np.inf, each)) for each in (first, second))
    at = np.concatenate([first, second])
    below = [np.searchsorted(each, at, side="right") / len(each) for each in (first, second)]
    distance = float(np.abs(below[0] - below[1]).max())
    effective = len(first) * len(second) / (len(first) + len(second))
    return distance, 2 * math.exp(-2 * effective * distance**2)


def category_distance(first: Numbers, second: Numbers) -> tuple[float, float]:
    """Return half the sum of the differences of shares, and its probability by chance (chi-squared test).

    A missing value is a category. Categories of which fewer than 5 samples are expected count as one.
    """
    both = np.concatenate([first, second])
    _, index = np.unique(np.where(np.isnan(both), -1.0, both), return_inverse=True)
    counts = np.stack([np.bincount(each, minlength=index.max() + 1) for each in np.split(index, [len(first)])])
    sizes = counts.sum(1, keepdims=True)
    rare = counts.sum(0) * sizes.min() / sizes.sum() < 5
    counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], axis=1)
    counts = counts[:, counts.sum(0) > 0]
    distance = float(np.abs(counts[0] / sizes[0] - counts[1] / sizes[1]).sum() / 2)
    expected = sizes * counts.sum(0) / sizes.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.shape[1] - 1
    if not freedom:
        return 0.0, 1.0
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return distance, float(torch.special.gammaincc(half[0], half[1]))


def group_scores(groups: Indices, truth: Numbers) -> tuple[float, float]:
    """Return the share of a target that ordered groups explain, and which part of it few ranges of groups explain.

    The share is adjusted for the number of groups, so that it is about 0 by chance. Four ranges, or a tenth as many as
    groups, follow most relations with a number, and few of those with a code.

    Args:
        groups: `(N,)`, from 0 without gaps.
        truth: `(N,)`.

    >>> codes = np.arange(20).repeat(20)
    >>> [round(score, 2) for score in group_scores(codes, codes * 1.0)]
    [1.0, 0.94]
    >>> [round(score, 2) for score in group_scores(codes, (codes * 7 % 20) * 1.0)]
    [1.0, 0.26]
    """
    from sklearn.tree import DecisionTreeRegressor  # Imported here: few data need a tree.

    counts = np.bincount(groups)
    means = np.bincount(groups, truth) / counts
    within = float(((truth - means[groups]) ** 2).sum()) / max(len(truth) - len(counts), 1)
    total = float(truth.var(ddof=1))
    if not total > within:
        return 0.0, 1.0
    places = np.arange(len(counts))[:, None]
    tree = DecisionTreeRegressor(max_leaf_nodes=max(4, len(counts) // 10), random_state=0).fit(
        places, means, sample_weight=counts
    )
    return 1 - within / total, float(tree.score(places, means, sample_weight=counts))


def bins_score(column: Column, values: Numbers, truth: Numbers, is_class: bool) -> float:
    """Return how well bins of a column predict the target, at most 1, and about 0 if they do not help.

    This screens columns: it is fast, but bins of few rows look too good.

    Args:
        column: Says what the values are.
        values: `(N,)`, of some rows.
        truth: Targets `(N,)` of these rows.
        is_class: Whether targets are classes, or numbers.
    """
    if column.kind == "category" and len(column.categories) > len(values) / _BINS:
        return 1.0  # Too many to say; a tree says it.
    _, label, counts = np.unique(truth, return_inverse=True, return_counts=True)
    width = len(counts) if is_class else 1
    if column.kind == "category":
        bins = np.where(np.isnan(values), len(column.categories), values).astype(np.int64)
    else:
        number = max(_BINS, 4 * width)
        bins = np.empty(len(values), np.int64)
        bins[np.argsort(values, kind="stable")] = np.arange(len(values)) * number // len(values)
        bins[np.isnan(values)] = number
    if not is_class:
        means = np.bincount(bins, truth) / np.maximum(np.bincount(bins), 1)
        return float(1 - np.square(truth - means[bins]).mean() / truth.var())
    # Each class weighs the same.
    table = np.bincount(bins * width + label, 1 / counts[label], (int(bins.max()) + 1) * width)
    share = float(table.reshape(-1, width).max(1).sum()) / width
    return (share - 1 / width) / (1 - 1 / width)


def tree_score(values: Numbers, truth: Numbers, is_class: bool, categories: int = 0) -> float:
    """Return balanced accuracy or R² of a small tree of one column, in a cross-validation of two folds.

    Args:
        values: `(N,)`.
        truth: Targets `(N,)`.
        is_class: Whether targets are classes, or numbers.
        categories: Number of the column's categories, in any order; 0 for numbers.
    """
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor  # Imported here: few data need a tree.

    labels = np.unique(truth)
    leaves = max(_LEAVES, 4 * len(labels) if is_class else 0, 2 * categories)
    if is_class:
        tree = DecisionTreeClassifier(max_leaf_nodes=leaves, random_state=0, class_weight="balanced")
    else:
        tree = DecisionTreeRegressor(max_leaf_nodes=leaves, random_state=0)
    order = np.random.default_rng(0).permutation(len(values))
    predicted = np.empty(len(values))
    for train, test in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        predicted[test] = tree.fit(values[train, None], truth[train]).predict(values[test, None])
    if is_class:
        return float(np.mean([(predicted[truth == label] == label).mean() for label in labels]))
    return float(1 - np.square(truth - predicted).mean() / truth.var())
