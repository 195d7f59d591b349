"""What tasks compute from all training targets before the first step, for example the weights of classes.

Shapes: `N` training samples, `C` classes or labels; `...` the shape of one target.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from firstlight.errors import UsageError, check_range, did_you_mean
from firstlight.tasks.checks import describe
from firstlight.tasks.drawn_rows import drawn_once

Weights = list[float] | dict[str, float] | Literal["balanced"]
"""A weight for each class in the order of the class names, or by class name, or weights that balance the classes."""


def training_targets(trainer: Trainer, purpose: str) -> Tensor:
    """Return the targets `(N, ...)` of the training samples that can be drawn, each once and in order, on the CPU.

    Every process reads the samples of all processes, and all must call this together.

    Args:
        trainer: Of a fit; it builds its training loader now, if it has none yet.
        purpose: What the targets are needed for, for the message.

    Raises:
        UsageError: If the data set cannot be read twice, its batches are no pairs, or its rows are not known.
    """
    trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)  # firstlight's callbacks may have wrapped the loader.
    is_read_twice = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not is_read_twice or isinstance(dataset, IterableDataset):
        raise UsageError(
            f"{purpose} needs all training targets, but {type(loader).__name__} cannot be read twice: use a "
            "DataLoader of a data set with a length"
        )
    batches, found = drawn_once(trainer, loader, purpose), []
    with isolate_rng():
        for batch in batches:
            targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
            if not isinstance(targets, Tensor) or not targets.ndim:
                raise UsageError(
                    f"{purpose} needs all training targets, but a batch is {describe(batch)}: it must be a pair of "
                    "inputs and a tensor of targets"
                )
            found.append(targets)
    if len(shapes := {targets.shape[1:] for targets in found}) > 1:
        raise UsageError(
            f"{purpose} needs training targets of one shape, but they have the shapes "
            f"{', '.join(str(tuple(each)) for each in sorted(shapes))}"
        )
    return torch.cat(found).cpu()


def class_names(trainer: Trainer) -> list[str]:
    """Return the class names of the data module of a fit; empty if it has none."""
    return list(getattr(trainer.datamodule, "class_names", None) or [])  # type: ignore[attr-defined]


def reserve_weights(owner: str, option: str, weights: object, loss: nn.Module, name: str, width: int) -> None:
    """Give a loss weights of 1, which `fit_targets` replaces, or refuse weights that cannot be right.

    A checkpoint holds the weights in the loss, so they must exist before it is loaded.

    Args:
        owner: Name of the task, for messages.
        option: Name of its option.
        weights: What the option was given.
        loss: Has a buffer `name` for the weights, which is None.
        name: `"weight"` or `"pos_weight"`.
        width: The number of weights.
    """
    given = f"{owner} was given {option}={weights}"
    if name not in getattr(loss, "_buffers", {}):
        known = "CrossEntropyLoss" if name == "weight" else "BCEWithLogitsLoss"
        raise UsageError(f"{given}, but {type(loss).__name__} has no {name}: use torch.nn.{known}")
    if getattr(loss, name) is not None:
        raise UsageError(f"{given}, but {type(loss).__name__} has a {name} already: give one of them")
    if not isinstance(weights, str):
        each = list(weights.values()) if isinstance(weights, Mapping) else weights
        assert isinstance(each, Sequence)
        check_range(owner, "[0, inf)", **{option: each})
        if len(each) != width:
            raise UsageError(f"{given}: it must have {width} weights, but has {len(each)}")
        if not any(each):
            raise UsageError(f"{given}: at least one must be above 0")
    loss.register_buffer(name, torch.ones(width))


def weights_by_name(option: str, weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the weights in the order of the class names.

    >>> weights_by_name("class_weights", {"yes": 20.0, "no": 1.0}, ["no", "yes"])
    [1.0, 20.0]
    """
    by_name = {str(name): weight for name, weight in weights.items()}
    if not names:
        raise UsageError(f"{option} names classes, but the data has no class names: give a list of weights")
    for name in by_name:
        if name not in names:
            raise UsageError(
                f"{option} has a weight for {name}, but the classes are {', '.join(names)}" + did_you_mean(name, names)
            )
    return [by_name[name] for name in names]


def balanced_weights(counts: Tensor, names: Sequence[str], ignored: int | None = None) -> Tensor:
    """Return weights `(C,)` inverse to the counts `(C,)` of the training samples, with a mean of 1 over the samples.

    The class `ignored` does not count, and gets the weight 1.

    Source: King and Zeng, "Logistic Regression in Rare Events Data", 2001, as in scikit-learn's `class_weight`.

    >>> balanced_weights(torch.tensor([3, 1]), ["no", "yes"])
    tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    scored = torch.tensor([index != ignored for index in range(len(counts))])
    for index in ((counts == 0) & scored).nonzero().flatten().tolist()[:1]:
        name = names[index] if index < len(names) else str(index)
        raise UsageError(f"balanced weights need a training sample of each class, but class {name} has none")
    balanced = counts[scored].sum() / (scored.sum() * counts.double())
    return balanced.where(scored, 1.0)
