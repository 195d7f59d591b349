"""Compare loaded data with the fitted state of a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from firstlight.data.samples import Samples
from firstlight.errors import UsageError, check_saved

COMPARED_FIELDS = ("class_names", "columns")
"""Fields of `Samples` that must be equal to those that the checkpoint was trained on."""


def check_fitted(owner: str, state: object) -> None:
    """Refuse a fitted state of another form than `DataModule` gives it, for example of a crafted checkpoint."""
    texts, tensor = list[str], Tensor | None
    check_saved(owner, state, **dict.fromkeys(COMPARED_FIELDS, texts), digest=str, split=str, shape=list[int])
    check_saved(owner, state, mean=tensor, std=tensor)
    assert isinstance(state, Mapping)
    mean, std = state["mean"], state["std"]
    if mean is None and std is None:
        return
    for each in (mean, std):
        is_broadcast = each is not None and each.ndim == len(state["shape"]) and all(n == 1 for n in each.shape[1:])
        if not is_broadcast or not each.is_floating_point() or len(each) != len(mean):
            raise UsageError(f"the checkpoint is damaged: mean and std of {owner} do not fit its samples")


def is_other_data(fitted: Mapping[str, Any], samples: Samples) -> bool:
    """Return whether a checkpoint was trained on data with another content; False without a checkpoint."""
    return bool(fitted) and fitted["digest"] != samples.digest


def check_compatible(
    fitted: Mapping[str, Any], samples: Samples, source: str, transform: Callable[[], Tensor], split: str
) -> None:
    """Refuse samples whose classes or columns differ from the checkpoint's, or the same data with another split.

    Args:
        fitted: Fitted state of the checkpoint.
        samples: After `clean`.
        source: Name of the data in messages.
        transform: Returns samples as the network gets them, `(N, C, ...)`. Only called if their columns fit.
        split: Digest of the rows of each split.
    """
    assert samples.targets is not None
    if fitted["digest"] == samples.digest and fitted["split"] != split:
        options = "split_seed, val_fraction, test_fraction, folds, fold, missing, missing_targets, group and time"
        raise UsageError(f"the checkpoint was trained on another split of {source}: use the same {options}")
    for name in COMPARED_FIELDS if samples.targets.size else ["columns"]:
        expected, found = fitted[name], getattr(samples, name)
        if expected != found:
            raise UsageError(f"the checkpoint was trained on the {name} {expected}, but {source} has {found}")
    mean = fitted["mean"]
    if mean is not None and len(mean) != (columns := transform().shape[1]):
        raise UsageError(f"the checkpoint was trained on {len(mean)} columns or channels, but {source} has {columns}")
