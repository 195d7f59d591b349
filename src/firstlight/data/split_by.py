"""Split samples by group or by time, and into folds.

Shapes: `N` samples.
"""

import warnings
from collections.abc import Mapping

import numpy as np
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, KFold, StratifiedGroupKFold, StratifiedKFold

from firstlight.data.samples import Samples, Split, SplitBy
from firstlight.data.stored import Indices
from firstlight.errors import UsageError

_TRIES = 20
"""Random splits by group, of which the one with the best size is taken."""
_MAX_STRATIFIED = 2_000
"""Groups that are stratified by class at most, which takes a second. The shares of classes in more are about equal."""


def split_off(
    train: Indices, by: SplitBy, labels: Indices | None, size: int, name: Split, seed: int
) -> tuple[Indices, Indices]:
    """Return the indices that stay in the training split, and those of another split.

    Args:
        train: Indices of the samples to split.
        by: Groups or times of all samples.
        labels: Class `(N,)` of all samples, if they have classes.
        size: Wanted number of samples in the other split.
        name: Its name, for messages.
        seed: Seed of a split by group.

    Raises:
        UsageError: If the other split would have less than half or more than twice this number of samples, because
            samples of one group or time stay together.
    """
    keys = by.keys[train]
    count = len(np.unique(keys))
    if count < 2:
        found = f"{by.kind} {by.column} has one value in {len(train):,} rows, {by.names[train[0]]}"
        raise UsageError(f"{found}: it cannot give a {name} split")
    if by.kind == "time":
        order = np.argsort(keys, kind="stable")
        train, keys = train[order], keys[order]
        starts = np.flatnonzero(np.diff(keys)) + 1
        first = starts[np.abs(starts - (len(train) - size)).argmin()]
        kept, other = train[:first], train[first:]
    else:
        kept, other = _split_groups(train, keys, None if labels is None else labels[train], size, seed)
    if not size / 2 <= len(other) <= 2 * size:
        raise UsageError(
            f"the {name} split would have {len(other):,} rows in place of {size:,}, because rows of one {by.kind} stay "
            f"together and {by.column} has {count:,} different values: choose another column or {name}_fraction"
        )
    return kept, other


def make_folds(
    train: Indices, groups: SplitBy | None, labels: Indices | None, folds: int, seed: int
) -> list[tuple[Indices, Indices]]:
    """Return for each fold the indices that stay in the training split, and those of the validation split.

    The validation splits are disjoint and cover `train`. They are stratified by class, as far as groups allow it.

    Args:
        train: Indices of all samples but those of the test split.
        groups: Groups of all samples, which stay together; None: no groups.
        labels: Class `(N,)` of all samples, if they have classes.
        folds: Number of folds.
        seed: Seed of the shuffling.

    Raises:
        UsageError: If there are fewer samples or groups than folds, or if a fold would have less than half or more
            than twice an equal share, because samples of one group stay together.
    """
    keys = None if groups is None else groups.keys[train]
    count = len(train) if keys is None else len(np.unique(keys))
    if count < folds:
        raise UsageError(
            f"folds={folds} needs as many {'samples' if keys is None else 'groups'}, but there are {count}"
        )
    classes = None if labels is None else labels[train]
    most = 0 if classes is None else int(np.bincount(classes).max())
    if classes is None or most < folds or (keys is not None and count > _MAX_STRATIFIED):
        kinds = KFold, GroupKFold
    else:
        kinds = StratifiedKFold, StratifiedGroupKFold
    splitter = kinds[keys is not None](folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns of classes with fewer samples than folds.
        pairs = [(train[kept], train[other]) for kept, other in splitter.split(train, classes, keys)]
    sizes = [len(other) for _, other in pairs]
    share = len(train) / folds
    if min(sizes) < share / 2 or max(sizes) > 2 * share:
        assert groups is not None
        raise UsageError(
            f"the folds would have {min(sizes):,} to {max(sizes):,} rows in place of {share:,.0f}, because rows of one "
            f"group stay together and {groups.column} has {count:,} different values: lower folds={folds}"
        )
    return pairs


def describe(samples: Samples, parts: Mapping[Split, Indices]) -> str:
    """Return how `samples.split_by` has split the samples, or `""` if it has not."""
    by = samples.split_by
    if by is None or any(not len(part) for part in parts.values()):
        return ""
    if by.kind == "group":
        counts = [f"{len(np.unique(by.keys[part])):,} {split}" for split, part in parts.items()]
        return f"by group {by.column}: {', '.join(counts)} groups"
    firsts = [f"{split} from {by.names[part[by.keys[part].argmin()]]}" for split, part in parts.items()]
    return f"by time {by.column}: {', '.join(firsts)}"


def _split_groups(
    train: Indices, keys: Indices, labels: Indices | None, size: int, seed: int
) -> tuple[Indices, Indices]:
    """Return the split by group that has the wanted size best; with labels, first of all as many classes."""
    count = len(np.unique(keys))
    if labels is None or count > _MAX_STRATIFIED:
        groups = max(1, min(count - 1, round(size / len(train) * count)))
        shuffles = GroupShuffleSplit(_TRIES, test_size=groups, random_state=seed)
        candidates = list(shuffles.split(train, groups=keys))
    else:
        most = min(count, int(np.bincount(labels).max()))  # More folds than these are refused.
        folds = max(2, min(most, round(len(train) / size)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It warns of classes with fewer samples than folds.
            stratified = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            candidates = list(stratified.split(train, labels, keys))

    def badness(pair: tuple[Indices, Indices]) -> tuple[int, int]:
        missing = 0 if labels is None else -sum(len(np.unique(labels[each])) for each in pair)
        return missing, abs(len(pair[1]) - size)

    kept, other = min(candidates, key=badness)
    return train[kept], train[other]
