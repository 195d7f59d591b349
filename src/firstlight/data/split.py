"""Split samples into training, validation and test samples."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from firstlight.data.samples import SPLITS, Samples, Split
from firstlight.data.split_by import make_folds, split_off
from firstlight.data.stored import Indices
from firstlight.errors import UsageError


def split(
    samples: Samples,
    rows: Indices,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fold: tuple[int, int] | None = None,
) -> dict[Split, Indices]:
    """Return the indices of the samples of each split, stratified by class, or as `samples.split_by` says.

    If the samples define their own split, it is kept. A missing validation split is taken from the training split, and
    a missing test split if `samples.test_from_train`.

    Args:
        samples: After `clean`.
        rows: Row of each sample in the loaded data.
        val_fraction: Share of the samples for validation: of all, or of the training samples if they define a split.
        test_fraction: Share of the samples for testing: of all, or of the training samples if they define a split.
        seed: Seed of the shuffling.
        fold: Index of a fold and number of folds: the fold is the validation split. The test split is the same.

    Raises:
        UsageError: If a split would be empty, or without a class, in this fold or in another one.
    """
    targets: Any = samples.targets  # On disk only without class names, and then its length alone is used.
    assert targets is not None
    labels = targets.reshape(-1).astype(np.int64) if samples.class_names and targets.size == len(targets) else None
    train: Indices = np.arange(len(targets))
    parts: dict[Split, Indices] = {}
    fractions: dict[Split, float] = {"test": test_fraction, "val": val_fraction}
    if samples.split is not None:
        parts = {name: np.flatnonzero(samples.split == name) for name in SPLITS}
        for name in ("train", "test"):
            if not len(parts[name]) and not (name == "test" and samples.test_from_train):
                raise UsageError(f"the {name} split is empty: no row has split={name}")
        train = parts["train"]
        fractions = {name: fraction for name, fraction in fractions.items() if not len(parts[name])}
        if fold and "val" not in fractions:
            raise UsageError(
                f"the data define the validation split: folds={fold[1]} would replace it, so leave folds out"
            )
        if not fractions and samples.split_by:
            raise UsageError(
                f"the data define all splits, so the {samples.split_by.kind} {samples.split_by.column} decides none: "
                f"leave {samples.split_by.kind} out"
            )
        if not fractions:
            _refuse_absent_classes(parts, samples, {})
            return parts
    if fold and samples.split_by and samples.split_by.kind == "time":
        by = f"the time {samples.split_by.column} decides the split"
        raise UsageError(f"{by}: most of folds={fold[1]} would be validated on the past, so leave folds out")
    if labels is not None:
        _refuse_small_classes(labels[train], rows[train], samples, len(fractions) + 1)
    whole = len(train)
    if fold:
        del fractions["val"]
    for name, fraction in fractions.items():
        size = round(fraction * whole)
        if not 0 < size < len(train):
            empty = "train" if size else name
            raise UsageError(f"the {empty} split is empty: {name}_fraction={fraction} of {whole} samples is {size}")
        if samples.split_by:
            train, parts[name] = split_off(train, samples.split_by, labels, size, name, seed)
            continue
        try:
            train, parts[name] = train_test_split(
                train, test_size=size, random_state=seed, stratify=None if labels is None else labels[train]
            )
        except ValueError as error:
            raise UsageError(f"{whole} samples cannot be split: {error}") from error
    advice: dict[Split, str] = {name: f"raise {name}_fraction={fraction}" for name, fraction in fractions.items()}
    if fold:
        pairs = make_folds(train, samples.split_by, labels, fold[1], seed)
        advice["val"] = f"lower folds={fold[1]}"
    else:
        pairs = [(train, parts["val"])]
    every: list[dict[Split, Indices]] = [{"train": kept, "val": val, "test": parts["test"]} for kept, val in pairs]
    for each in every:  # Also the other folds, so that a cross-validation does not fail in a later one.
        _refuse_absent_classes(each, samples, advice)
    return every[fold[0] if fold else 0]


def _refuse_absent_classes(parts: Mapping[Split, Indices], samples: Samples, advice: Mapping[Split, str]) -> None:
    """Refuse a split without a sample of each class, where chance decides it.

    Only training must have each class where the data define the split, or samples have several labels. What validation
    and test lack is a finding, see `quality`. `advice` says by split how to change a split that chance decides.
    """
    names: list[str] = samples.class_names
    targets: Any = samples.targets
    assert targets is not None
    if not names:
        return
    if len(names) == 1:
        raise UsageError(f"all samples have the class {names[0]}: there must be at least two classes")
    single = targets.size == len(targets)
    # One column per class that says whether a sample belongs to it.
    labels = targets.reshape(-1, 1) == np.arange(len(names)) if single else targets > 0
    for split in SPLITS:
        absent = np.flatnonzero(~labels[parts[split]].any(axis=0))
        for label in absent[:1]:
            found = f"class {names[label]} has no sample in the {split} split, and {labels[:, label].sum()} in all"
            if split == "train":
                raise UsageError(f"{found}: the train split must have each class")
            if split in advice and single:
                raise UsageError(f"{found}: add samples, or {advice[split]}")


def _refuse_small_classes(labels: Indices, rows: Indices, samples: Samples, needed: int) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    for label in classes[counts < needed][:1]:
        where = ", ".join(samples.location(row) for row in rows[labels == label])
        raise UsageError(
            f"class {samples.class_names[label]} has too few samples ({where}): it must have at least {needed}, "
            "one for each split"
        )
