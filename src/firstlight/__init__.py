"""PyTorch Lightning experiments made of parts that you can run, watch and use in your own project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from firstlight.run.predictor import Predictor

__version__ = "0.1.0"


def load(
    run_or_checkpoint: str | Path,
    which: str | None = None,
    *,
    trust: str | Collection[str] = (),
    device: str | None = None,
) -> Predictor:
    """Return a predictor that takes raw inputs, for a run directory or a checkpoint of the command line.

    A run directory is yours, so its configuration is trusted. A checkpoint alone is not: no code of its author runs,
    and no file and no address in it is opened. The training data is not read.

    Args:
        run_or_checkpoint: A run directory, also `runs/NAME/latest`, or the file of a checkpoint.
        which: `"best"`, `"last"`, `"final"` or `"refit"`, a checkpoint of the run. None: the one that
            `firstlight predict` takes, usually the best.
        trust: Modules whose classes a checkpoint may name, besides the parts of firstlight, torch and torchmetrics.
        device: `"cpu"`, `"cuda"`, ... None: as the run, which is a GPU if there is one.

    Raises:
        UsageError: If there is no such run or checkpoint, it is damaged, or it names a class that is not trusted.
    """
    from firstlight.run import predictor  # Imported here, because it takes seconds.

    return predictor.load(run_or_checkpoint, which, trust=trust, device=device)
