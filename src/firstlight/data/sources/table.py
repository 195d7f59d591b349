"""A CSV file with columns of numbers and categories, and targets to predict.

Shapes: `N` rows, `B` batch, `K` targets per row, `C` input columns, `F` features: one per number and per category.
"""

import itertools
import logging
import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.data.amounts import Mark, read_amount
from firstlight.data.base import DataModule
from firstlight.data.cells import codes, distinct, encode_labels, is_missing, notation, same, warn_alike, warn_doubtful
from firstlight.data.columns import TargetKind, infer_kind, is_number
from firstlight.data.dates import one_format, seconds, unordered_months
from firstlight.data.encoder import Kind, Scale, TableEncoder
from firstlight.data.files import Csv, from_frame, missing_column, read_table
from firstlight.data.raw import as_frame
from firstlight.data.samples import Samples, SplitBy
from firstlight.errors import UsageError, check_range, check_saved, restoring

_log = logging.getLogger(__name__)

_MAX_LISTED = 5
"""Unknown categories, and columns, that a message names."""
_EXACT_DIGITS = 15
"""Integers with so many digits are exact in float64."""


class Table(DataModule):
    """A table in a CSV or Parquet file: inputs `(B, F)` float32, targets as `kind` says.

    `TableEncoder` describes the features: scaled numbers and parts of dates first, then one for each category, then
    indicators of missing values. Categories are those of the training split. A category that it does not have is
    encoded as zeros, with a warning, or as a rare one if there are rare ones.

    In every column, the texts of `cells.MISSING` (empty, `NA`, `?`, ...) mean a missing value. Categories and labels
    that differ only in spaces, or as the numbers 0 and 0.0, are the same.

    If a checkpoint was trained on another content, the file needs the input columns, in any order, and all its rows are
    test samples. Prediction does not need the target column.

    Args:
        path: Path of a file with a header: CSV in UTF-8, also compressed by gzip, separated by commas, semicolons, tabs
            or bars; or Parquet.
        target: Name of the column to predict; a list of names for `multilabel` and `regression` with several targets.
        kind: `"multiclass"`: targets `(B,)` int64, indices of the sorted labels. `"binary"`: `(B, 1)` float32, 0 or 1
            for the two sorted labels. `"multilabel"`: `(B, K)` float32, columns of 0 and 1. `"regression"`: `(B, K)`
            float32, not scaled. None: as `infer_kind` finds.
        columns: Names of the input columns; None: all columns except `target`, `split` and those to ignore.
        categorical: Names of the input columns that hold categories. The others hold numbers.
        split: Name of a column that holds `train`, `val` or `test` for each row; None: the rows are split at random.
        dates: Names of the input columns that hold dates.
        decimal_marks: By name of an input column or target, `"."` or `","`: the column holds numbers for people, with
            this decimal mark, maybe with thousands separators, and all with the same percent or currency sign, or none.
            12% is read as 12.
        ignore: Names of columns to leave out.
        scale: `"standard"`: numbers get mean 0 and standard deviation 1. `"quantile"`: they become standard normal, and
            `missing="mean"` fills in the median.
        min_frequency: Training rows from which a category has a feature of its own, at least 1. Rarer ones share one.
        max_categories: How many categories of a column have a feature of their own at most; the most frequent ones do.
            None: all.
        group: Name of a column: rows with the same value are in one split, for example all rows of a patient. The split
            has classes in similar shares, and about the sizes of its fractions.
        time: Name of a column of dates or numbers: training rows are the earliest, test rows the latest. Rows of one
            time are in one split. `group` and `time` are not inputs unless `columns`, `categorical` or `dates` names
            them.
        indicators: Whether columns that are missing in some training row have a further feature, which is 1 for rows
            where they are missing. Needs `missing="mean"`.
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self,
        path: str,
        target: str | list[str],
        kind: TargetKind | None = None,
        columns: list[str] | None = None,
        categorical: list[str] | None = None,
        split: str | None = None,
        dates: list[str] | None = None,
        decimal_marks: dict[str, Mark] | None = None,
        ignore: list[str] | None = None,
        scale: Scale = "standard",
        min_frequency: int = 1,
        max_categories: int | None = None,
        group: str | None = None,
        time: str | None = None,
        indicators: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_range("Table", "[1, inf)", min_frequency=min_frequency, max_categories=max_categories or 1)
        self.path = path
        self.targets = [target] if isinstance(target, str) else target
        self.kind = kind
        self.columns = columns
        self.categorical = categorical or []
        self.dates = dates or []
        self.decimal_marks = decimal_marks or {}
        self.ignore = ignore or []
        self.scale = scale
        self.min_frequency = min_frequency
        self.max_categories = max_categories
        self.indicators = indicators
        self.split_column = split
        self.group = group
        self.time = time
        if group and time:
            raise UsageError(f"Table was given group={group} and time={time}: one of them can decide the split")
        self._columns: list[str] = []
        self._categories: dict[str, list[str]] = {}  # By column, all categories of the file; inputs hold their indices.
        self._date_formats: dict[str, str] = {}
        self._signs: dict[str, str] = {}  # By column of `decimal_marks`.
        if indicators and self.missing != "mean":
            raise UsageError(f"Table was given indicators=true and missing={self.missing}: it must be missing=mean")
        if {*self.decimal_marks.values()} - {".", ","}:
            raise UsageError(f"Table was given decimal_marks={decimal_marks}: a mark must be . or ,")
        if twice := next((name for name in self.targets if self.targets.count(name) > 1), ""):
            raise UsageError(f"Table was given target={self.targets}: {twice} is named twice")
        if columns and (both := {*columns} & {*self.ignore}):
            raise UsageError(f"Table was given {min(both)} in columns and in ignore: it must be in one of them")
        for one, other in itertools.combinations(("categorical", "dates", "decimal_marks"), 2):
            if both := {*getattr(self, one)} & {*getattr(self, other)}:
                raise UsageError(f"Table was given {min(both)} in {one} and in {other}: it must be in one of them")
        count = len(self.targets)
        if kind in ("multiclass", "binary") and count != 1:
            raise UsageError(f"Table was given kind={kind} and {count} targets: it must have 1")
        if kind == "multilabel" and count < 2:
            raise UsageError(f"Table was given kind=multilabel and {count} target: it must have one for each label")

    def load(self) -> Samples:
        """Return the table. Categories are indices of the categories of the file, dates seconds, other inputs text."""
        return self._samples_of(read_table(self.path, self._commas()))

    def samples_from(self, raw: Any) -> Samples:
        """Return a DataFrame or a list of dicts as the table that a file with these columns would be.

        Only the input columns are read.
        """
        frame = as_frame(raw, f"{type(self).__name__} has columns")
        self.path = "the input"
        frame = frame.drop(columns=self.targets, errors="ignore")
        return self._samples_of(from_frame(frame, self.path, commas=self._commas()))

    def _commas(self) -> list[str]:
        return [name for name, mark in self.decimal_marks.items() if mark == ","]

    def _samples_of(self, file: Csv) -> Samples:
        header = file.header
        self._categories, self._date_formats, self._signs = {}, {}, {}
        table = {name: np.array([row[index] for row in file.rows], object) for index, name in enumerate(header)}
        splits = [] if self.split_column is None else [self.split_column]
        if problem := not self.fitted and missing_column(self.path, self.ignore, header):
            raise UsageError(problem)
        for name in self.decimal_marks:
            if name in table:
                table[name] = self._plain_numbers(name, table[name], file.lines)
            elif name not in self.targets or not self.fitted:
                raise UsageError(missing_column(self.path, [name], header))
        is_new = bool(self.fitted) and self.fitted["digest"] != file.digest  # All its rows are test samples.
        split_by = None if is_new else self._split_by(table, file.lines)
        named = [*self.categorical, *self.dates]
        no_inputs = {*self.targets, *splits, *self.ignore, *({self.group, self.time} - {*named})}
        others = [name for name in header if name not in no_inputs]
        columns = self.columns or (self.fitted["columns"][: -len(self.targets)] if self.fitted else others)
        wanted = columns if self.fitted else [*columns, *self.targets]
        if problem := missing_column(self.path, wanted, header) or missing_column(self.path, named, columns):
            raise UsageError(problem)
        if not columns:
            raise UsageError(f"{self.path} has no input columns, only {', '.join(header)}")
        for name in columns:
            if columns.count(name) > 1 or name in [*self.targets, *splits]:
                role = "an input twice" if columns.count(name) > 1 else "an input and also the target or the split"
                raise UsageError(f"{self.path}: column {name} is {role}: leave it out of columns")
        if self.kind is None:
            self.kind = self.hparams["kind"] = infer_kind({name: table[name].tolist() for name in self.targets})
        numbers = [name for name in columns if name not in named]
        if self.kind == "regression":
            numbers += [name for name in self.targets if name in table]  # A file to predict may have none.
        self._refuse_long_integers({name: table[name] for name in numbers}, file.lines)
        if not self.fitted:
            numeric = [*columns, *(self.targets if self.kind == "regression" else [])]
            self._refuse_text({name: table[name] for name in numeric if name not in named})
        for name in self.categorical:
            self._categories[name] = distinct(table[name])
            if not self.fitted:
                warn_doubtful(self._categories[name], f"{self.path}: column {name}")
            else:
                known = self.fitted["categories"][name] + self.fitted["rare"][name]
                self._warn_unknown(name, known, "the checkpoint does not know")
            table[name] = codes(table[name], self._categories[name])
        for name in self.dates:
            table[name] = self._seconds(name, table[name], file.lines)
        self._columns = columns
        targets, names = self._labels(table, file.lines)
        return Samples(
            np.stack([table[name] for name in columns], axis=1),
            targets,
            names,
            np.array([*map(str.strip, table[self.split_column])]) if self.split_column in table else None,
            split_by=split_by,
            columns=[*columns, *self.targets],
            categories={name: self._categories[name] for name in columns if name in self.categorical},
            dates=self.dates,
            source=self.path,
            lines=file.lines,
            digest=file.digest,
            missing_reason=missing_column(self.path, [*self.targets, *splits], header),
        )

    def sizes(self) -> dict[str, Any]:
        """Return what the data determine, see `DataModule.sizes`; also `kind` and `numeric_features`."""
        sizes = super().sizes()
        return {**sizes, "kind": self.kind, "numeric_features": self.encoder().numeric_features}

    def _split_by(self, table: dict[str, NDArray[Any]], lines: list[int]) -> SplitBy | None:
        """Return the column that decides the split, if there is one."""
        kind: Literal["group", "time"] = "group" if self.group else "time"
        name = self.group or self.time
        if name is None:
            return None
        if problem := missing_column(self.path, [name], list(table)):
            raise UsageError(problem)
        values = table[name]
        if name in [*self.targets, self.split_column]:
            raise UsageError(f"{self.path}: column {name} is the {kind} and also the target or the split")
        for line, value in zip(lines, values, strict=True):
            if is_missing(value):
                raise UsageError(f"{self.path}: line {line} column {name} is empty: each row needs a {kind}")
        if kind == "group":
            if not self.fitted and name not in self.categorical:  # Categories are judged anyway.
                warn_alike(distinct(values), f"{self.path}: column {name}")
            names = np.array([*map(same, values)])
            return SplitBy(kind, name, np.unique(names, return_inverse=True)[1], names)
        if all(map(is_number, values)):
            if example := unordered_months(values):
                unordered = f"numbers like {example} are dates that do not sort by time"
                raise UsageError(f"{self.path}: column {name}: {unordered}: write dates like 2024-01-31")
            return SplitBy(kind, name, np.array([*map(float, values)]), values)
        style = one_format(dict.fromkeys(values), f"{self.path}: column {name}")
        return SplitBy(kind, name, np.array([seconds(value, style) for value in values]), values)

    def _plain_numbers(self, name: str, values: NDArray[Any], lines: list[int]) -> NDArray[Any]:
        """Return a column of `decimal_marks` as a computer writes its numbers; missing ones stay as they are."""
        mark = self.decimal_marks[name]
        found = []
        sign = self.fitted["signs"].get(name) if self.fitted else None
        for line, value in zip(lines, values, strict=True):
            if is_missing(value):
                found.append(value)
                continue
            read = read_amount(value, mark)
            where = f"{self.path}: line {line} column {name} is {value}"
            if read is None:
                raise UsageError(f"{where}: it must be a number with the decimal mark {mark}")
            sign = read[1] if sign is None else sign
            if read[1] != sign:
                others = f"other values have {sign}" if sign else "other values have no sign"
                raise UsageError(f"{where}: {others}, and all must have the same")
            found.append(read[0])
        self._signs[name] = sign or ""
        return np.array(found, object)

    def _seconds(self, name: str, values: NDArray[Any], lines: list[int]) -> NDArray[Any]:
        """Return a column of dates as seconds since 1970; missing ones stay as they are."""
        known = dict.fromkeys(value for value in values if not is_missing(value))
        where = f"{self.path}: column {name}"
        style = self.fitted["date_formats"][name] if self.fitted else one_format(known, where)
        found: dict[str, Any] = {}
        for line, value in zip(lines, values, strict=True):
            if value in known and value not in found:
                try:
                    found[value] = seconds(value, style)
                except ValueError as error:
                    raise UsageError(
                        f"{self.path}: line {line} column {name} is {value}: it must be a date like {style}"
                    ) from error
        self._date_formats[name] = style
        return np.array([found.get(value, value) for value in values], object)

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
        """Refuse integers that float64 rounds to another one. Inputs of this kind are identifiers."""
        for name, values in table.items():
            for line, value in zip(lines, values, strict=True):
                if _EXACT_DIGITS < len(value) < 300 and value.strip().lstrip("+-").isdecimal():
                    if int(value) != int(float(value)):
                        found = f"{self.path}: line {line} column {name} is {value}, which float64 rounds"
                        way_out = f"leave {name} out, or name it in categorical"
                        if name in self.targets:
                            way_out = "subtract one constant from all values of the column"
                        raise UsageError(f"{found}: {way_out}")

    def _warn_unknown(self, name: str, known: list[str], reason: str) -> None:
        names = {*map(same, known)}
        unknown = [category for category in self._categories[name] if same(category) not in names]
        if unknown:
            listed = ", ".join(unknown[:_MAX_LISTED]) + ", ..." * (len(unknown) > _MAX_LISTED)
            encoded = "zeros" if self.min_frequency == 1 and self.max_categories is None else "rare ones"
            _log.warning(
                f"{self.path}: column {name} has categories that {reason}: {listed}; they are encoded as {encoded}"
            )

    def _refuse_empty_columns(self, inputs: Tensor) -> None:
        """Refuse columns without a value in the training inputs `(N, C)`."""
        for name, is_empty in zip(self._columns, inputs.isnan().all(0).tolist(), strict=True):
            if is_empty:
                found = f"{self.path}: column {name} has no value in the training split"
                raise UsageError(f"{found}: leave it out with ignore=[{name}]")

    def fit(self, inputs: Tensor) -> dict[str, Any]:
        """Return the fitted encoder of training inputs `(N, C)`, and the categories of each column."""
        categories, rare, others = {}, {}, []
        for name, column in zip(self._columns, inputs.unbind(1), strict=True):
            if name not in self.categorical:
                continue
            found, counts = np.unique(column[~column.isnan()], return_counts=True)
            frequent = np.argsort(-counts, kind="stable")[: self.max_categories]
            kept = found[np.sort(frequent[counts[frequent] >= self.min_frequency])]
            categories[name] = [self._categories[name][int(code)] for code in kept]
            rare[name] = [self._categories[name][int(code)] for code in np.setdiff1d(found, kept)]
            others.append(len(kept) < len(found))
            self._warn_unknown(name, categories[name] + rare[name], "no training row has")
        self._refuse_empty_columns(inputs)
        kinds: list[Kind] = [self._kind(name) for name in self._columns]
        rows = self._with_indices(inputs, categories)
        sizes = [len(categories[name]) for name in self._columns if name in categories]
        encoder = TableEncoder.fit(rows, kinds, sizes, others, self.scale, self.indicators)
        formats = {"date_formats": self._date_formats, "signs": self._signs}
        return {"categories": categories, "rare": rare, **formats, "encoder": encoder.state}

    def check_fitted(self, state: dict[str, Any]) -> None:
        """Refuse a state of another form than `fit` gives it, or of columns of other kinds."""
        super().check_fitted(state)
        of_columns = dict[str, list[str]]
        check_saved("Table", state, categories=of_columns, rare=of_columns, encoder=dict)
        check_saved("Table", state, **dict.fromkeys(("date_formats", "signs"), dict[str, str]))
        columns, saved = state["columns"][: -len(self.targets)], state["encoder"]
        kinds = [self._kind(name) for name in columns]
        if saved.get("kinds") != kinds or any(name not in state["date_formats"] for name in self.dates):
            raise UsageError(
                f"the checkpoint was trained on the columns {columns}, and not all of them are of the kinds that "
                "categorical and dates say"
            )
        with restoring("the encoder of Table"):
            features = TableEncoder.from_state(saved)(torch.full((1, len(columns)), math.nan, dtype=torch.float64))
        named = [name for name, kind in zip(columns, kinds, strict=True) if kind == "category"]
        sizes = [len(state["categories"][name]) for name in named if name in state["categories"]]
        if {*state["categories"]} != {*named} or {*state["rare"]} != {*named} or sizes != saved["categories"]:
            raise UsageError("the checkpoint is damaged: the categories of Table are not those of its encoder")
        if features.shape[1] != len(state["mean"] if state["mean"] is not None else ()):
            raise UsageError("the checkpoint is damaged: mean of Table is not that of its encoder")

    def transform(self, inputs: Tensor) -> Tensor:
        """Return inputs `(N, C)` as features `(N, F)`."""
        features: Tensor = self.encoder()(self.numbers(inputs))
        return features

    def encoder(self) -> TableEncoder:
        """Return the fitted encoder."""
        return TableEncoder.from_state(self.fitted["encoder"])

    def numbers(self, inputs: Tensor) -> Tensor:
        """Return inputs `(N, C)` float64 with the index of each category among the fitted ones, -1 for others."""
        return self._with_indices(inputs, self.fitted["categories"])

    def columns_described(self) -> list[dict[str, Any]]:
        """Return kind, categories and format of each input column."""
        found = []
        for name in self.fitted["columns"][: -len(self.targets)]:
            described: dict[str, Any] = {"name": name, "kind": self._kind(name)}
            if name in self.fitted["categories"]:
                described |= {"unit": "index, -1 for others", "categories": self.fitted["categories"][name]}
            if name in self.fitted["date_formats"]:
                format = self.fitted["date_formats"][name]
                described |= {"unit": "seconds since 1970-01-01 in UTC", "format": format}
            if sign := self.fitted["signs"].get(name):
                described["unit"] = sign
            found.append(described)
        return found

    def scale_statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return a mean of 0 and a standard deviation of 1: the encoder has scaled the features."""
        return features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])

    def _kind(self, name: str) -> Kind:
        return "category" if name in self.categorical else "date" if name in self.dates else "number"

    def _with_indices(self, inputs: Tensor, categories: dict[str, list[str]]) -> Tensor:
        """Return inputs `(N, C)` with the index of each category among the fitted ones, -1 for an unknown one."""
        inputs = inputs.clone()
        for name, known in categories.items():
            indices = {same(category): index for index, category in enumerate(known)}
            fitted = torch.tensor([float(indices.get(same(each), -1)) for each in self._categories[name]] or [-1.0])
            column = inputs[:, self._columns.index(name)]
            column.copy_(fitted.double()[column.nan_to_num(0).long()].where(~column.isnan(), torch.nan))
        return inputs

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


def _is_numeric(value: str) -> bool:
    """Return whether a text is a number, or one in a notation that `clean` explains."""
    try:
        return not is_missing(value) and math.isfinite(float(value))
    except ValueError:
        return any(map(str.isdigit, value)) and bool(notation(value))
