"""A CSV file with columns of numbers and categories, and targets to predict.

Shapes: `N` rows, `B` batch, `K` targets per row, `C` input columns, `F` features: one per number and per category.
"""

import logging
import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.base import DataModule
from firstlight.data.cells import codes, distinct, encode_labels, is_missing, notation, same, warn_doubtful
from firstlight.data.files import missing_column, read_csv
from firstlight.data.samples import Samples
from firstlight.errors import UsageError

_log = logging.getLogger(__name__)

_MAX_LISTED = 5
"""Unknown categories, and columns, that a message names."""
_EXACT_DIGITS = 15
"""Integers with so many digits are exact in float64."""
_MIN_ROWS = 20
"""Training rows from which a column that identifies each of them is no accident."""


class Table(DataModule):
    """A CSV file: inputs `(B, F)` float32 in the order of the columns, targets as `kind` says.

    Categories are one-hot encoded. The categories are those of the training split; a category that it does not have is
    encoded as zeros, with a warning. With `missing="mean"`, a missing category is encoded as the share of each category
    in training.

    In every column, the texts of `cells.MISSING` (empty, `NA`, `?`, ...) mean a missing value. Categories and labels
    that differ only in spaces, or as the numbers 0 and 0.0, are the same.

    If a checkpoint was trained on another content, the file needs the input columns, in any order, and all its rows are
    test samples. Prediction does not need the target column.

    Args:
        path: Path of a CSV file in UTF-8 with a header.
        target: Name of the column to predict; a list of names for `multilabel` and `regression` with several targets.
        kind: `"multiclass"`: targets `(B,)` int64, indices of the sorted labels. `"binary"`: `(B, 1)` float32, 0 or 1
            for the two sorted labels. `"multilabel"`: `(B, K)` float32, columns of 0 and 1. `"regression"`: `(B, K)`
            float32, not scaled.
        columns: Names of the input columns; None: all columns except `target` and `split`.
        categorical: Names of the input columns that hold categories. The others hold numbers.
        split: Name of a column that holds `train`, `val` or `test` for each row; None: the rows are split at random.
        **options: Arguments of `DataModule`.
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
        self._categories: dict[str, list[str]] = {}  # By column, all categories of the file; inputs hold their indices.
        if twice := next((name for name in self.targets if self.targets.count(name) > 1), ""):
            raise UsageError(f"Table was given target={self.targets}: {twice} is named twice")
        count = len(self.targets)
        if kind in ("multiclass", "binary") and count != 1:
            raise UsageError(f"Table was given kind={kind} and {count} targets: it must have 1")
        if kind == "multilabel" and count < 2:
            raise UsageError(f"Table was given kind=multilabel and {count} target: it must have one for each label")

    def load(self) -> Samples:
        """Return the table. Categories are indices of the categories of the file, other inputs are text."""
        file = read_csv(self.path)
        header = file.header
        table = {name: np.array([row[index] for row in file.rows], object) for index, name in enumerate(header)}
        splits = [] if self.split_column is None else [self.split_column]
        others = [name for name in header if name not in [*self.targets, *splits]]
        columns = self.columns or (self.fitted["columns"][: -len(self.targets)] if self.fitted else others)
        wanted = columns if self.fitted else [*columns, *self.targets]
        if problem := missing_column(self.path, wanted, header) or missing_column(self.path, self.categorical, columns):
            raise UsageError(problem)
        if not columns:
            raise UsageError(f"{self.path} has no input columns, only {', '.join(header)}")
        for name in columns:
            if columns.count(name) > 1 or name in [*self.targets, *splits]:
                role = "an input twice" if columns.count(name) > 1 else "an input and also the target or the split"
                raise UsageError(f"{self.path}: column {name} is {role}: leave it out of columns")
        numbers = [name for name in columns if name not in self.categorical]
        self._refuse_long_integers({name: table[name] for name in numbers}, file.lines)
        if not self.fitted:
            numeric = [*columns, *(self.targets if self.kind == "regression" else [])]
            self._refuse_text({name: table[name] for name in numeric if name not in self.categorical})
        for name in self.categorical:
            self._categories[name] = distinct(table[name])
            warn_doubtful(self._categories[name], f"{self.path}: column {name}")
            if self.fitted:
                self._warn_unknown(name, self.fitted["categories"][name], "the checkpoint does not know")
            table[name] = codes(table[name], self._categories[name])
        self._columns = columns
        targets, names = self._labels(table, file.lines)
        return Samples(
            np.stack([table[name] for name in columns], axis=1),
            targets,
            names,
            np.array([*map(str.strip, table[self.split_column])]) if self.split_column in table else None,
            columns=[*columns, *self.targets],
            source=self.path,
            lines=file.lines,
            digest=file.digest,
            missing_reason=missing_column(self.path, [*self.targets, *splits], header),
        )

    def _refuse_text(self, table: dict[str, NDArray[Any]]) -> None:
        """Refuse columns that hold words but no number."""
        words = {name: values for name, values in table.items() if not any(map(_is_numeric, values))}
        first = {name: next((value for value in values if not is_missing(value)), "") for name, values in words.items()}
        text = [name for name in first if first[name]]
        if text:
            examples = ", ".join(f"{name} ({first[name]}, ...)" for name in text)
            way_out = f"columns of categories must be named in categorical=[{','.join(text)}]"
            if {*text} & {*self.targets}:
                way_out = "kind=regression needs numbers, kind=multiclass takes classes"
            raise UsageError(f"{self.path}: no numbers in {examples}: {way_out}")

    def _refuse_long_integers(self, table: dict[str, NDArray[Any]], lines: list[int]) -> None:
        """Refuse integers that float64 rounds to another one; they are identifiers."""
        for name, values in table.items():
            for line, value in zip(lines, values, strict=True):
                if _EXACT_DIGITS < len(value) < 300 and value.strip().lstrip("+-").isdecimal():
                    if int(value) != int(float(value)):
                        found = f"{self.path}: line {line} column {name} is {value}, which float64 rounds"
                        raise UsageError(f"{found}: leave {name} out, or name it in categorical")

    def _warn_unknown(self, name: str, known: list[str], reason: str) -> None:
        known = [*map(same, known)]
        unknown = [category for category in self._categories[name] if same(category) not in known]
        if unknown:
            listed = ", ".join(unknown[:_MAX_LISTED]) + ", ..." * (len(unknown) > _MAX_LISTED)
            _log.warning(
                f"{self.path}: column {name} has categories that {reason}: {listed}; they are encoded as zeros"
            )

    def _check_columns(self, inputs: Tensor) -> None:
        """Refuse empty columns of the training inputs `(N, C)`; warn if one is constant, a date or identifies a row."""
        rows = torch.from_numpy(self.rows("train"))
        constant = []
        for name, column in zip(self._columns, inputs.unbind(1), strict=True):
            values = column[~column.isnan()]
            if not len(values):
                found = f"{self.path}: column {name} has no value in the training split"
                raise UsageError(f"{found}: {self._without(name)}")
            if len(values) > 1 and (values == values[0]).all():
                constant.append(f"{name} ({self._shown(name, values)})")
            elif name in self.categorical:
                if len(values) >= _MIN_ROWS and len(np.unique(values)) == len(values):
                    _log.warning(
                        f"{self.path}: column {name} has another category in each training row: {self._without(name)}"
                    )
            elif len(values) >= _MIN_ROWS and _are_dates(values):
                _log.warning(
                    f"{self.path}: column {name} seems to hold dates like {values[0]:.0f}: write days, for example"
                )
            elif len(values) >= _MIN_ROWS and (column - rows == column[0] - rows[0]).all():
                _log.warning(f"{self.path}: column {name} counts the rows of the file: {self._without(name)}")
        if constant:
            listed = ", ".join(constant[:_MAX_LISTED])
            listed += f" and {len(constant) - _MAX_LISTED:,} more" * (len(constant) > _MAX_LISTED)
            columns = f"column {listed} has" if len(constant) == 1 else f"columns {listed} have"
            _log.warning(f"{self.path}: {columns} one value in all training rows")

    def _without(self, name: str) -> str:
        """Return how to leave a column out."""
        others = [each for each in self._columns if each != name]
        listed = ",".join(others[:_MAX_LISTED]) + ",..." * (len(others) > _MAX_LISTED)
        return f"leave it out with columns=[{listed}]"

    def _shown(self, name: str, values: Tensor) -> str:
        return self._categories[name][int(values[0])] if name in self.categorical else f"{values[0]:g}"

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return the categories of each column in the training inputs `(N, C)`."""
        categories = {}
        for name in self.categorical:
            column = inputs[:, self._columns.index(name)]
            categories[name] = [self._categories[name][int(code)] for code in np.unique(column[~column.isnan()])]
            self._warn_unknown(name, categories[name], "no training row has")
        self._check_columns(inputs)
        return {"categories": categories}

    def transform(self, inputs: Tensor) -> Tensor:
        """Return inputs `(N, C)` as one-hot encoded features `(N, F)`, NaN for missing values."""
        features = []
        for name, column in zip(self._columns, inputs.unsqueeze(2).unbind(1), strict=True):
            if name in self.categorical:
                # scikit-learn's OneHotEncoder encodes 100,000 rows in 87 ms instead of 10, and does not keep NaN.
                indices = {same(category): index for index, category in enumerate(self._categories[name])}
                known = torch.tensor([indices.get(same(category), -1) for category in self.fitted["categories"][name]])
                column = (column == known).float().where(~column.isnan(), torch.nan)
            features.append(column)
        return torch.cat(features, dim=1)

    def _labels(self, table: dict[str, NDArray[Any]], lines: list[int]) -> tuple[NDArray[Any] | None, list[str]]:
        """Return the targets, None if a target column is missing, and the class names."""
        if missing_column(self.path, self.targets, list(table)):
            return None, []
        columns = [table[name] for name in self.targets]
        if self.kind == "regression":
            return np.stack(columns, axis=1), []
        if self.kind == "multilabel":
            return np.stack(columns, axis=1), self.targets
        (target,) = self.targets
        encoded, names = encode_labels(columns[0], self.class_names, self.path, target, lines)
        if self.kind == "binary" and len(names) != 2:
            raise UsageError(
                f"{self.path}: column {target} has {len(names)} classes, {', '.join(names)}: kind=binary must have 2"
            )
        return encoded[:, None] if self.kind == "binary" else encoded, names


def _are_dates(values: Tensor) -> bool:
    """Return whether all numbers are dates written as yyyymmdd, for example 20240131."""
    day, month = values % 100, values // 100 % 100
    valid = (values >= 19000101) & (values < 21000000) & (day >= 1) & (day <= 31) & (month >= 1) & (month <= 12)
    return bool((valid & (values % 1 == 0)).all())


def _is_numeric(value: str) -> bool:
    """Return whether a text is a number, or one in a notation that `clean` explains."""
    try:
        return not is_missing(value) and math.isfinite(float(value))
    except ValueError:
        return any(map(str.isdigit, value)) and bool(notation(value))
