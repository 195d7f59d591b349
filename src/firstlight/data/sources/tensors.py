"""Arrays or tensors of a program as a data module.

Shapes: `N` samples, `K` targets per sample; `...` shape of one sample.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.base import DataModule
from firstlight.data.files import digest_of
from firstlight.data.samples import Samples
from firstlight.errors import UsageError


class Tensors(DataModule):
    """Arrays or tensors in memory; `Samples` describes the types and shapes.

    Args:
        inputs: `(N, ...)`: floats for numbers, uint8 for pixels, int8 to int64 for tokens.
        targets: `(N,)` classes or `(N, K)`; None to predict with a checkpoint. Integers `(N,)` without `class_names`
            are classes named 0, 1, and so on. Booleans `(N,)` become the classes False and True; a batch holds them as
            `(B, 1)`.
        class_names: Name of each class.
        split: `"train"`, `"val"` or `"test"` for each sample.
        **options: Arguments of `DataModule`.

    Raises:
        UsageError: If an argument is out of range, or inputs or targets are not numbers.
    """

    def __init__(
        self,
        inputs: NDArray[Any] | Tensor,
        targets: NDArray[Any] | Tensor | None = None,
        class_names: list[str] | None = None,
        split: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._inputs = _array(inputs, "inputs")
        self._targets = None if targets is None else _array(targets, "targets")
        if class_names and len({*class_names}) < len(class_names):
            raise UsageError(f"Tensors was given class_names={class_names}: no two names may be equal")
        self._class_names = class_names
        self._split = None if split is None else np.array(split)

    def load(self) -> Samples:
        """Return the arrays as samples."""
        targets, names = self._targets, self._class_names or self.class_names
        if targets is not None:
            targets, names = with_classes(targets, self._class_names, self.class_names, "Tensors was given")
        contents = [np.ascontiguousarray(values).data for values in (self._inputs, targets) if values is not None]
        digest = digest_of(*contents)
        missing_reason = "Tensors was given no targets" if targets is None else ""
        return Samples(self._inputs, targets, names, self._split, digest=digest, missing_reason=missing_reason)


def with_classes(
    targets: NDArray[Any], given: list[str] | None, known: list[str], has: str
) -> tuple[NDArray[Any], list[str]]:
    """Return the targets and the names of their classes; no names if the targets are not classes.

    Args:
        targets: Booleans `(N,)` are the classes False and True, and become `(N, 1)`. Integers `(N,)` are classes.
        given: Names of the classes that the user gave.
        known: Names of the classes of a checkpoint.
        has: Start of the message about targets that cannot be classes.
    """
    names = given or known
    if not given and targets.ndim == 1 and targets.dtype.kind == "b":
        return targets[:, None], ["False", "True"]
    if not names and targets.ndim == 1 and targets.dtype.kind in "iu" and len(targets):
        highest = int(targets.max())
        if highest >= len(targets):
            found = f"{has} {len(targets)} integer targets up to {highest}"
            raise UsageError(
                f"{found}: integers are classes, which need samples; targets of a regression must be floats"
            )
        names = [str(label) for label in range(max(highest, 0) + 1)]
    return targets, names


def _array(values: NDArray[Any] | Tensor, name: str) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.is_nested or values.layout != torch.strided:
            raise UsageError(f"Tensors was given {name} that are sparse or nested: they must be a dense tensor")
        # numpy has no bfloat16.
        array = (values.float() if values.dtype == torch.bfloat16 else values).resolve_conj().numpy()
    else:
        array = np.asarray(values)
        if np.ma.is_masked(values):
            raise UsageError(f"Tensors was given {name} with masked values: they must be NaN, like filled(nan)")
    if not array.ndim:
        raise UsageError(f"Tensors was given {name} without an axis: the first axis must be the samples")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"Tensors was given {name} of type {array.dtype}: they must be numbers")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise UsageError(f"Tensors was given {name} up to {array.max()}: integers must be below 2**63")
    return array
