"""What a task tells the user about losses, loaders and metrics that look wrong."""

import logging
from collections.abc import Mapping, Sized
from typing import Any, cast

from lightning.pytorch.utilities import CombinedLoader, rank_zero_only
from torch import Tensor
from torch.utils.data import DistributedSampler

from firstlight.tasks.weight_check import terms_of_other_weight

_log = logging.getLogger(__name__)


class Notices:
    """Logs one warning for each thing that looks wrong, on the first process."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, key: str, message: str) -> None:
        """Warn, unless something with the same key was told before."""
        if key not in self._told and not rank_zero_only.rank:  # type: ignore[attr-defined]
            _log.warning(message)
        self._told.add(key)

    def tell_undefined(self, reasons: Mapping[str, str]) -> None:
        """Warn about each metric that is undefined; `reasons` by name."""
        for name, reason in reasons.items():
            self.tell(name, f"{name} is undefined (nan), because {reason}; nothing is chosen by it")

    def tell_repeated_samples(self, split: str, loader: Any, processes: int) -> None:
        """Warn about the loader of a split that gives samples to two processes."""
        if message := repeated_samples(split, loader, processes):
            self.tell(f"{split} loader", message)

    def tell_other_weight(self, task: Any, outputs: Any, targets: Tensor) -> None:
        """Warn about each term of a task's loss that is not a mean over the weight of its batch."""
        for name in terms_of_other_weight(task, outputs, targets):
            loss = getattr(task.loss, "__name__", type(task.loss).__name__)
            source = f"{type(task).__name__}.compute_loss" if task.is_overridden("compute_loss") else loss
            self.tell(
                f"weight of {name}",
                f"the {name} of {source} is not a mean over what batch_weight(targets) counts, so its mean depends on "
                "how samples are cut into batches and processes: let batch_weight return what it averages over; if the "
                "loss is a function of a mean, such as its square root, train on the mean",
            )


def repeated_samples(split: str, loader: Any, processes: int) -> str:
    """Return how many samples of a split torch's DistributedSampler gives to two processes, or `""`."""
    if processes == 1:
        return ""
    loaders = CombinedLoader([] if loader is None else loader, "sequential").flattened  # Some loaders have no length.
    samplers = [getattr(each, "sampler", None) for each in loaders]
    own = [each for each in samplers if not type(each).__module__.startswith("firstlight.")]
    padded = [each for each in own if isinstance(each, DistributedSampler)]
    repeated = sum(max(0, each.total_size - len(cast(Sized, each.dataset))) for each in padded)
    if not repeated:
        return ""
    return (
        f"the {split} loader gives {repeated:,} of its samples to two processes, so they count twice in {split}/*: use "
        f"a data module of firstlight, one process, or a number of samples that is a multiple of {processes}"
    )
