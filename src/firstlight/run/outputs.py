"""The outputs of a run for each sample of a split, in `RUN/outputs/test.npz` and `val.npz`.

`firstlight compare` and `firstlight report` read them. Shapes: `N` samples, `K` classes, `L` labels.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.errors import UsageError
from firstlight.run.directory import atomic

KINDS = ("classes", "binary", "labels", "numbers", "tokens", "embeddings", "other")
"""What `outputs` are: probabilities `(N, K)`, the probability `(N,)` of class 1, probabilities `(N, L)`, values in the
units of the data; `tokens` and `embeddings` have none; `other` is what the `predict_step` of a module returns."""

_LARGE = 2**20  # More probabilities than this are not searched for equal ones.


def outputs_path(folder: Path, split: str) -> Path:
    """Return the path of the outputs of a split, `"test"` or `"val"`."""
    return folder / "outputs" / f"{split}.npz"


def write_outputs(folder: Path, split: str, arrays: Mapping[str, Any]) -> Path:
    """Write the arrays of a split, see `read_outputs`, and return the path."""
    path = outputs_path(folder, split)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    with atomic(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def read_outputs(folder: Path, split: str) -> dict[str, Any]:
    """Return the arrays of a split by name.

    Returns:
        `kind`, one of `KINDS`; `index` `(N,)`, the row of each sample in the data; and those that exist of `targets`,
        `outputs`, `predictions` (indices of classes or labels, without the rounding of `outputs`), `logits` (of the
        probabilities of 0 and 1, because those of large logits are equal), `loss` `(N,)`, and `weight` `(N,)`, the
        weight of each sample in the mean loss.

    Raises:
        UsageError: If the file does not exist, or is damaged.
    """
    path = outputs_path(folder, split)
    if not path.is_file():
        verb = "test" if split == "test" else "validate"
        raise UsageError(f"there is no {path}: firstlight {verb} --run {folder} writes it")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
        found["kind"] = str(found["kind"])
        lengths = {len(each) for name, each in found.items() if name != "kind"}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is damaged ({error!r:.100}): remove it") from error
    if found["kind"] not in KINDS or "index" not in found or len(lengths) != 1:
        raise UsageError(f"{path} does not hold the outputs of a run: remove it")
    return found


def compact(probabilities: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return float32 probabilities, or float64 if different ones would become equal.

    >>> compact(np.array([0.25, 0.5])).dtype, compact(np.array([1 - 1e-12, 1.0])).dtype
    (dtype('float32'), dtype('float64'))
    """
    rounded = probabilities.astype(np.float32)
    is_small = probabilities.size <= _LARGE
    is_exact = not is_small or len(np.unique(rounded)) == len(np.unique(probabilities))
    return rounded if is_exact else probabilities
