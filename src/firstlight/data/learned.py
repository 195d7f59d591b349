"""What a checkpoint has learned of its data, against the data at hand."""

from collections.abc import Mapping
from typing import Any

from firstlight.data.samples import Samples
from firstlight.errors import UsageError

__all__ = ["COMPARED", "refuse_others"]

COMPARED = ("class_names", "columns")
"""Fields of `Samples` that are to be what a checkpoint was trained on."""


def refuse_others(learned: Mapping[str, Any], samples: Samples, source: str, columns: int, split: str) -> None:
    """Refuse samples that are not like those that a checkpoint was trained on.

    Args:
        learned: What the checkpoint has learned.
        samples: After `clean`.
        source: What messages call them.
        columns: Number of their columns or channels, as a network gets them.
        split: Digest of their splits.

    Raises:
        UsageError: When classes or columns are others, or the same data is split in another way.
    """
    assert samples.targets is not None
    if learned["digest"] == samples.digest and learned["split"] != split:
        was = "split_seed, val_fraction, test_fraction and on_bad as they were"
        raise UsageError(f"the checkpoint learned from another split of {source}: give {was}")
    for name in COMPARED if samples.targets.size else ["columns"]:
        known, found = learned[name], getattr(samples, name)
        if known != found:
            raise UsageError(f"the checkpoint was trained on the {name} {known}, but {source} has {found}")
    mean = learned["mean"]
    if mean is not None and len(mean) != columns:
        raise UsageError(f"the checkpoint was trained on {len(mean)} columns or channels, but {source} has {columns}")
