"""A CSV file with numbers, categories and what is to be predicted from them.

Shapes: `N` rows, `K` targets of a row, `C` columns of inputs, `F` features: a number each, or one for each category.
"""

import logging
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.base import DataModule
from firstlight.data.files import missing_column, read_csv
from firstlight.data.samples import Samples
from firstlight.errors import UsageError

__all__ = ["Table"]

_log = logging.getLogger(__name__)

_CLASSES = ("multiclass", "binary")


class Table(DataModule):
    """Inputs `(B, F)` float32 in the order of the columns; targets as `kind` says.

    A category becomes a feature of its own, 1 in the rows that have it and 0 in others, if the training split has it; a
    row with any other category has 0 in all of them. With `missing="mean"`, a missing category becomes the share of
    training rows that have each.

    A file without the target column can be predicted for. One with another content than the checkpoint was trained on
    needs the columns of the inputs, in any order; all its rows are the test split.

    Args:
        path: A CSV file in UTF-8 with a header.
        target: Name of the column to predict, or of several for `multilabel` and `regression`.
        kind: `"multiclass"`: targets `(B,)` int64, an index in the labels' alphabetical order. `"binary"`: `(B, 1)`
            float32, 0 or 1 in alphabetical order. `"multilabel"`: `(B, K)` float32, columns of 0 and 1. `"regression"`:
            `(B, K)` float32, numbers as they are.
        columns: Names of the columns to predict from; default: all others.
        categorical: Names of those among them that hold categories; the others hold numbers.
        split: Name of the column that says `train`, `val` or `test`, where there is one.
        **options: What every `DataModule` takes.

    Raises:
        UsageError: When a value is out of its range.
    """

    def __init__(
        self,
        path: str,
        target: str | list[str],
        kind: Literal["multiclass", "binary", "multilabel", "regression"],
        columns: list[str] | None = None,
        categorical: list[str] | None = None,
        split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.targets = [target] if isinstance(target, str) else target
        self.kind = kind
        self.columns = columns
        self.categorical = categorical or []
        self.split_column = split
        self._columns: list[str] = []
        self._found: dict[str, list[str]] = {}
        if kind in _CLASSES and len(self.targets) != 1:
            raise UsageError(f"Table was given kind={kind} and {len(self.targets)} targets: it has one")
        if kind == "multilabel" and len(self.targets) < 2:
            raise UsageError("Table was given kind=multilabel and one target: it has a column for each label")

    def load(self) -> Samples:
        """Return the table: of a category its place among those of the file, and other inputs as text."""
        file = read_csv(self.path)
        header = file.header
        table = {name: np.array([row[place] for row in file.rows], object) for place, name in enumerate(header)}
        marks = [] if self.split_column is None else [self.split_column]
        others = [name for name in header if name not in [*self.targets, *marks]]
        columns = self.columns or (self.fitted["columns"][: -len(self.targets)] if self.fitted else others)
        missing_reason = missing_column(self.path, columns, header) or missing_column(
            self.path, self.categorical, columns
        )
        if not self.fitted:
            missing_reason = missing_reason or missing_column(self.path, self.targets, header)
        if missing_reason or not columns:
            raise UsageError(missing_reason or f"{self.path} has no column to predict from, but {', '.join(header)}")
        if not self.fitted:
            numeric = [*columns, *(self.targets if self.kind == "regression" else [])]
            self._refuse_text({name: table[name] for name in numeric if name not in self.categorical})
        for name in self.categorical:
            self._found[name] = _categories(table[name])
            self._say_unknown(name)
            table[name] = _codes(table[name], self._found[name])
        self._columns = columns
        targets, names = self._labels(table, file.lines)
        return Samples(
            np.stack([table[name] for name in columns], axis=1),
            targets,
            names,
            table[self.split_column] if self.split_column in table else None,
            columns=[*columns, *self.targets],
            source=self.path,
            lines=file.lines,
            digest=file.digest,
            missing_reason=missing_column(self.path, [*self.targets, *marks], header),
        )

    def _refuse_text(self, table: dict[str, NDArray[Any]]) -> None:
        """Refuse columns without a single number."""
        text = [name for name, values in table.items() if any(values) and not any(map(_is_number, values))]
        if text:
            held = ", ".join(f"{name} ({next(filter(None, table[name]))}, ...)" for name in text)
            raise UsageError(
                f"{self.path}: no number in {held}: categories are named in categorical, [{','.join(text)}]"
            )

    def _say_unknown(self, name: str) -> None:
        known = self.fitted["categories"][name] if self.fitted else self._found[name]
        unknown = [category for category in self._found[name] if category not in known]
        if unknown:
            _log.warning(f"{self.path}: {name} has {', '.join(unknown)}, which the checkpoint does not know")

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return by column the categories of the training inputs `(N, C)`."""
        codes = {name: np.unique(inputs[:, self._columns.index(name)]) for name in self.categorical}
        return {
            "categories": {
                name: [self._found[name][int(code)] for code in column if not np.isnan(code)]
                for name, column in codes.items()
            }
        }

    def transform(self, inputs: Tensor) -> Tensor:
        """Return inputs `(N, C)` as features `(N, F)`, NaN where a value is missing."""
        features = []
        for name, column in zip(self._columns, inputs.unsqueeze(2).unbind(1), strict=True):
            if name in self.categorical:
                place = {category: code for code, category in enumerate(self._found[name])}
                codes = torch.tensor([place.get(category, -1) for category in self.fitted["categories"][name]])
                column = (column == codes).float().where(~column.isnan(), torch.nan)
            features.append(column)
        return torch.cat(features, dim=1)

    def _labels(self, table: dict[str, NDArray[Any]], lines: list[int]) -> tuple[NDArray[Any] | None, list[str]]:
        """Return the targets, none where a column of them is not there, and the class names."""
        if missing_column(self.path, self.targets, list(table)):
            return None, []
        columns = [table[name] for name in self.targets]
        if self.kind == "regression":
            return np.stack(columns, axis=1), []
        if self.kind == "multilabel":
            return np.stack(columns, axis=1), self.targets
        labels, (target,) = columns[0], self.targets
        names = self.class_names or _categories(labels)
        unknown = np.flatnonzero(~np.isin(labels, [*names, ""]))
        if len(unknown):
            where = f"{self.path}: line {lines[unknown[0]]} column {target}"
            raise UsageError(
                f"{where} is {labels[unknown[0]]}, but the checkpoint was trained on the classes {', '.join(names)}"
            )
        if self.kind == "binary" and len(names) != 2:
            raise UsageError(f"{self.path}: column {target} has {len(names)} classes, {', '.join(names)}: binary has 2")
        codes = _codes(labels, names)
        return codes[:, None] if self.kind == "binary" else codes, names


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _categories(values: NDArray[Any]) -> list[str]:
    return sorted({*values} - {""})


def _codes(values: NDArray[Any], categories: list[str]) -> NDArray[Any]:
    """Return the place of each value among the categories, and what is empty as it is."""
    place: dict[str, Any] = {category: code for code, category in enumerate(categories)}
    return np.array([place.get(value, value) for value in values], object)
