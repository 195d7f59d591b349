"""When batches reached a network, and what follows from it. Nothing heavy is imported here."""

import os
import time
from array import array
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Stamps", "figures", "read"]


class Stamps:
    """The moments at which batches reach a network, to be trained with and to be validated.

    Args:
        kind: Class of the network.
        path: File that they are written to as well, every half a second.
    """

    def __init__(self, kind: Any, path: str | None) -> None:
        self.trained: list[float] = []
        self.validated: list[float] = []
        forward, clock = kind.forward, time.perf_counter
        if path is None:

            def stamped(module: Any, inputs: Any) -> Any:
                (self.trained if module.training else self.validated).append(clock())
                return forward(module, inputs)

        else:
            kept, last = array("d"), clock()

            def stamped(module: Any, inputs: Any) -> Any:
                nonlocal last
                now = clock()
                kept.append(now if module.training else -now)
                if now - last > 0.5:
                    with Path(path).open("ab") as file:
                        file.write(kept.tobytes())
                    del kept[:]
                    last = now
                return forward(module, inputs)

        kind.forward = stamped


def read(path: str | os.PathLike[str]) -> tuple[list[float], list[float]]:
    """Return what was written so far: moments of training and of validation."""
    found = array("d")
    if Path(path).is_file():
        content = Path(path).read_bytes()
        found.frombytes(content[: len(content) // 8 * 8])
    return [each for each in found if each > 0], [-each for each in found if each < 0]


def figures(trained: list[float], validated: list[float], steps: int, first: int = 0) -> dict[str, Any]:
    """Return seconds: of each whole epoch, of a step, between epochs, of a validated batch; None where none is whole.

    An epoch lasts until the first batch of the next, and holds its validation. What lies between epochs is the time
    from an epoch's last batch to the next one's first, less that of a step.

    Args:
        trained: Moments of training, one after the other.
        validated: Moments of validation.
        steps: Batches of an epoch.
        first: Which batch of the training `trained` begins with, from 0.
    """
    took = [(number, after - before) for number, (before, after) in enumerate(pairwise(trained), first + 1)]
    step = median(found) if (found := [each for number, each in took if number % steps]) else None
    across = [each for number, each in took if number % steps == 0]
    starts = range(-first % steps, len(trained) - steps, steps)
    apart = [after - before for before, after in pairwise(validated)]
    return {
        "epochs": [trained[start + steps] - trained[start] for start in starts],
        "steps": steps,
        "step": step,
        "between": median(across) - step if across and step is not None else None,
        "validated": median(apart) if apart else None,
    }
