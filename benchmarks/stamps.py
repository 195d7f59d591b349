"""Record when batches reach a network, and compute figures from these times. Nothing large is imported here."""

import os
import time
from array import array
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Stamps", "figures", "read"]


class Stamps:
    """The times at which batches reach a network, in training and in validation.

    Args:
        kind: Class of the network. Its `forward` is replaced by one that records the time.
        path: File to which the times are written every half second; None keeps them in memory only.
    """

    def __init__(self, kind: Any, path: str | None) -> None:
        self.trained: list[float] = []
        self.validated: list[float] = []
        clock, forward = time.perf_counter, kind.forward
        self._takes_network = True
        if path is None:

            def record(is_training: bool) -> None:
                (self.trained if is_training else self.validated).append(clock())

        else:
            unwritten, last = array("d"), clock()

            def record(is_training: bool) -> None:
                nonlocal last
                now = clock()
                unwritten.append(now if is_training else -now)
                if now - last > 0.5:
                    with Path(path).open("ab") as file:
                        file.write(unwritten.tobytes())
                    del unwritten[:]
                    last = now

        self._record = record

        def stamped(module: Any, inputs: Any) -> Any:
            if self._takes_network:
                record(module.training)
            return forward(module, inputs)

        kind.forward = stamped

    def take_from_steps(self, module: Any) -> None:
        """Record the steps of a LightningModule instead, whose callbacks may call the network for measurements."""
        self._takes_network = False
        record, train, validate = self._record, module.training_step, module.validation_step

        def training_step(self: Any, *args: Any) -> Any:
            record(True)
            return train(self, *args)

        def validation_step(self: Any, *args: Any) -> Any:
            record(False)
            return validate(self, *args)

        module.training_step, module.validation_step = training_step, validation_step


def read(path: str | os.PathLike[str]) -> tuple[list[float], list[float]]:
    """Return the times written so far: of training and of validation."""
    times = array("d")
    if Path(path).is_file():
        content = Path(path).read_bytes()
        times.frombytes(content[: len(content) // 8 * 8])
    return [each for each in times if each > 0], [-each for each in times if each < 0]


def figures(trained: list[float], validated: list[float], steps: int, first: int = 0) -> dict[str, Any]:
    """Return the seconds of each whole epoch, of a step, between epochs, and of a validated batch.

    An epoch ends with the first batch of the next one, so it includes validation. The time between epochs is that from
    the last batch of an epoch to the first batch of the next, minus one step. A figure without data is None.

    Args:
        trained: Times of consecutive training batches.
        validated: Times of validation batches.
        steps: Batches in an epoch.
        first: Index of the first batch in `trained`, counted from the start of training.
    """
    gaps = [(number, after - before) for number, (before, after) in enumerate(pairwise(trained), first + 1)]
    step = median(inside) if (inside := [gap for number, gap in gaps if number % steps]) else None
    across = [gap for number, gap in gaps if number % steps == 0]
    starts = range(-first % steps, len(trained) - steps, steps)
    checks = [after - before for before, after in pairwise(validated)]
    return {
        "epochs": [trained[start + steps] - trained[start] for start in starts],
        "steps": steps,
        "step": step,
        "between": median(across) - step if across and step is not None else None,
        "validated": median(checks) if checks else None,
    }
