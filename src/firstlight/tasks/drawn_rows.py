"""Which rows of a data set its loader can draw."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from firstlight.distributed import all_gather_objects
from firstlight.errors import UsageError

_DRAWS = 10  # Rows that a sampler without a length may draw for each row of the data set.


def drawn_once(trainer: Trainer, loader: Any, purpose: str) -> DataLoader[Any]:
    """Return a loader of the rows that the training loader of any process can draw, each once and in order.

    A sampler of the user is copied, and the copy draws one epoch, so that its state and the random states stay as they
    are. All processes must call this together.

    Args:
        trainer: Of the fit.
        loader: A `DataLoader` of a data set with a length.
        purpose: What the rows are needed for, for the message.

    Raises:
        UsageError: If the sampler cannot be copied, or never ends.
    """
    dataset, sampler = loader.dataset, _unwrapped(loader.sampler)
    takes_batches = loader.batch_sampler is None
    if takes_batches and type(dataset).__module__.startswith("firstlight."):  # It draws batches of all rows.
        return DataLoader(dataset, batch_size=1024, collate_fn=loader.collate_fn)
    takes_lists = takes_batches and isinstance(sampler, BatchSampler)
    rows = _rows(trainer, sampler if takes_batches else loader.batch_sampler, dataset, purpose)
    # A loader with a batch sampler of the user has no batch size, and one without a batch sampler takes whole batches.
    order = [rows[start : start + 1024] for start in range(0, len(rows), 1024)] if takes_lists else rows
    size = None if takes_batches else loader.batch_size or 1024
    return DataLoader(dataset, batch_size=size, sampler=order, collate_fn=loader.collate_fn)


def _unwrapped(sampler: Any) -> Any:
    """Return the sampler that Lightning has wrapped to share its rows among processes, or the same."""
    return sampler.dataset._sampler if isinstance(sampler, DistributedSamplerWrapper) else sampler  # type: ignore[attr-defined]


def _rows(trainer: Trainer, sampler: Any, dataset: Any, purpose: str) -> Sequence[Any]:
    while type(sampler) is BatchSampler:
        sampler = _unwrapped(sampler.sampler)
    kind = type(sampler)
    if kind in (SequentialSampler, RandomSampler):
        return range(len(sampler.data_source))
    if kind is DistributedSampler:
        return range(len(sampler.dataset))
    if kind is SubsetRandomSampler:
        return sorted({int(row) for row in sampler.indices})
    if kind is WeightedRandomSampler:
        return sampler.weights.nonzero().flatten().tolist()  # type: ignore[no-any-return]
    found, error = set(), ""
    try:
        found = _draw(sampler, dataset)
    except Exception as failed:
        error = " ".join(str(failed).split()) or type(failed).__name__
    every = all_gather_objects(trainer, (found, error))  # Each process may draw others.
    for _, error in every:
        if error:
            raise UsageError(
                f"{purpose} needs the rows that {kind.__name__} draws, but these cannot be read ahead ({error}): give "
                "the DataLoader a torch.utils.data.Subset of the rows, or a SubsetRandomSampler"
            )
    return sorted(set().union(*(rows for rows, _ in every)))


def _draw(sampler: Any, dataset: Any) -> set[Any]:
    """Return the rows of one epoch."""
    rows: set[Any] = set()
    with isolate_rng():
        drawn = iter(deepcopy(sampler, {id(dataset): dataset}))
        ends = hasattr(sampler, "__len__")
        for each in drawn if ends else islice(drawn, _DRAWS * len(dataset)):
            row = each.tolist() if isinstance(each, Tensor | np.ndarray | np.generic) else each
            rows.update(map(int, row) if isinstance(row, list | tuple) else [row])
            if len(rows) >= len(dataset):
                return rows
        if not ends and next(drawn, None) is not None:
            raise ValueError("it has no length, and never ends")
    return rows
