"""The checks of data. Each returns findings about classes, copies or columns.

Shapes: `N` samples of a split.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from firstlight.data.columns import IDENTIFIER
from firstlight.data.quality.finding import Finding, Severity, listed
from firstlight.data.quality.statistics import bins_score, category_distance, group_scores, number_distance, tree_score
from firstlight.data.quality.values import Column, few, some
from firstlight.data.samples import Samples, Split
from firstlight.data.stored import Indices, Stored

Advice = Callable[[Sequence[str]], str]

_BYTES = 200_000_000
"""Bytes of a split whose samples are compared with those of another split."""
_LISTED = 5
"""Columns and classes that a text names."""
_MIN_ROWS = 20
"""Samples from which values that are all different, or all equal, are no accident."""
_IDENTIFIES = 0.95
"""Share of different values from which a category identifies a row."""
_LEAK = 0.98
"""Balanced accuracy or R² of one column that is too good."""
_SURE_LEAK = 0.95
"""Score from which it is no accident: of `n` samples without an error, at most `3 / n` are wrong in 95 % of cases."""
_SCREEN = 0.7
"""Score of a column's bins from which a tree is fitted to it."""
_FAR = 5
"""Widths of the training range from which a value is far outside. Columns with heavy tails reach 2."""
_MIN_OF_CLASS = 10
"""A class with fewer training samples than this is told."""
_MIN_TRAINED = 5
"""Training samples of a class from which something can be learnt."""
_MIN_SCORED = 5
"""Samples of a class from which its scores in another split say something."""
_MAJORITY = 0.8
_MISSING = 0.5
_MIN_CODES, _CODES = 5, 0.005
"""How often, and in which share of the rows, a value that stands for a missing one is found at least."""
_MIN_KINDS, _ROWS_OF_KIND = 12, 10
"""Different values of a column of codes at least, and rows for each of them."""
_EXPLAINS, _IN_ORDER = 0.2, 0.5
"""Share of the target that codes explain at least, and the part of it that few ranges of codes explain at most."""
_DROPPED = 0.1
_DRIFT = 0.1
"""Smallest distance of two distributions that is told, in [0, 1]."""
_CHANCE = 1e-3
"""Probability that any column of a random split shows drift."""


def absent_classes(labels: Mapping[Split, Indices], names: Sequence[str]) -> list[Finding]:
    """Return the classes without a sample in the validation or the test split; `labels` are indices of `names`."""
    absent: dict[Split, list[str]] = {}
    for split, each in labels.items():
        counts = np.bincount(each, minlength=len(names))
        absent[split] = [name for name, count in zip(names, counts, strict=True) if not count]
    found = []
    for split, classes in absent.items():
        if classes and split != "train":
            text = f"{_classes(classes)} no sample in the {split} split"
            advice = f"metrics leave {_verb(len(classes), 'it', 'them')} out or are undefined there"
            found.append(Finding("absent_class", "warning", text, {"classes": len(classes)}, advice))
    return found


def few_samples(labels: Mapping[Split, Indices], names: Sequence[str]) -> list[Finding]:
    """Return the classes with some, but fewer than 10 training samples, or fewer than 5 in validation or test."""
    splits = [*labels]
    counts = {
        name: numbers
        for name, *numbers in zip(
            names, *(np.bincount(each, minlength=len(names)).tolist() for each in labels.values()), strict=True
        )
    }
    enough = [_MIN_OF_CLASS if split == "train" else _MIN_SCORED for split in splits]
    rare = {
        name: min(number for number in numbers if number)
        for name, numbers in counts.items()
        if any(0 < number < least for number, least in zip(numbers, enough, strict=True))
    }
    if not rare:
        return []
    rare = dict(sorted(rare.items(), key=lambda item: item[1]))
    shown = [
        f"{name} ({', '.join(f'{number:,} {split}' for number, split in zip(counts[name], splits, strict=True))})"
        for name in rare
    ]
    text = f"class {shown[0]} has few samples"
    if len(rare) > 1:
        text = f"{len(rare)} of {len(names)} classes have few samples: {_listed(shown)}"
    advice = f"one sample changes {_verb(len(rare), 'its', 'their')} recall by up to {1 / min(rare.values()):.2f}; add "
    advice += "samples, or join classes"
    is_train = any(0 < counts[name][splits.index("train")] < _MIN_TRAINED for name in rare)
    severity: Severity = "warning" if is_train else "info"
    return [Finding("few_samples", severity, text, dict([*rare.items()][:_LISTED]), advice)]


def imbalance(labels: Indices, names: Sequence[str]) -> list[Finding]:
    """Return whether one class has most of the training samples."""
    shares = np.bincount(labels, minlength=len(names)) / len(labels)
    largest = int(shares.argmax())
    if shares[largest] < _MAJORITY:
        return []
    text = f"{shares[largest]:.1%} of the samples have the class {names[largest]}"
    advice = f"an accuracy of {shares[largest]:.3f} needs no learning, so read balanced accuracy, F1 or AUROC"
    return [Finding("class_imbalance", "warning", text, {"share": float(shares[largest])}, advice)]


def copies(samples: Samples, rows: Indices, parts: Mapping[Split, Indices]) -> list[Finding]:
    """Return how many samples of validation and test are in the training split, too, or are twice in the only split.

    A sample of a table is its inputs and targets. In a table with few different values, rows are often equal by
    chance: copies are told only if there are more than twice as many.
    """
    of_train, train = _keys(samples, parts["train"])
    first: dict[bytes, int] = {}
    twice: list[tuple[int, int]] = []
    for key, index in zip(of_train, train, strict=True):
        other = first.setdefault(key, index)
        if other != index:
            twice.append((other, index))
    chance = _chance_of_equal_rows(samples, np.array([*first.values()]))
    found = []
    for split in parts if len(parts) == 1 else [split for split in parts if split != "train"]:
        pairs = twice
        compared = len(train)
        if split != "train":
            keys, indices = _keys(samples, parts[split])
            compared = len(indices)
            pairs = [(first[key], index) for key, index in zip(keys, indices, strict=True) if key in first]
        if len(pairs) <= 2 * compared * min(1.0, len(train) * chance):
            continue
        share = len(pairs) / compared
        where = " and ".join(samples.location(int(rows[index])) for index in pairs[0])
        least = "at least " if len(train) < len(parts["train"]) or compared < len(parts[split]) else ""
        what = "copies of another one" if split == "train" else "in the training split, too"
        kind = "samples" if split == "train" else f"{split} samples"
        text = f"{least}{len(pairs):,} of {compared:,} {kind} ({share:.1%})"
        text = f"{text} {_verb(len(pairs), 'is', 'are')} {what}, for example {where}"
        advice = "remove the copies, or keep them in one split; their scores may be too good"
        severity: Severity = "fault" if share >= 0.05 else "warning" if share >= 0.01 else "info"
        found.append(Finding("duplicate_samples", severity, text, {"samples": len(pairs), "share": share}, advice))
    return found


def constant(columns: Sequence[Column], advice: Advice, of: str = "all rows") -> list[Finding]:
    """Return the columns with one value in the training split; `of` says which of its rows the columns hold."""
    same = [each for each in columns if len(each.train) > 1 and (each.train == each.train[0]).all()]
    if not same:
        return []
    listed = _listed([f"{each.name} ({each.shown(each.train[0])})" for each in same])
    text = f"{_have('column', listed, len(same))} one value in {of}"
    return [Finding("constant", "info", text, {"columns": len(same)}, advice([each.name for each in same]))]


def duplicates(columns: Sequence[Column], advice: Advice, of: str = "all rows") -> list[Finding]:
    """Return the columns that are equal to an earlier one in the training split; categories may have other names.

    Args:
        columns: Of all samples.
        advice: Returns what to do about columns of these names.
        of: Which rows of the training split the columns hold.
    """
    first: dict[bytes, Column] = {}
    equal: list[tuple[Column, Column]] = []
    for column in columns:
        values = column.train
        if (values == values[:1]).all():
            continue
        if column.kind == "category":
            _, first_row, code = np.unique(values, return_index=True, return_inverse=True)
            values = first_row[code].astype(np.float64)
        other = first.setdefault(column.kind.encode() + (values + 0.0).tobytes(), column)
        if other is not column:
            equal.append((other, column))
    if not equal:
        return []
    listed = _listed([f"{column.name} ({other.name})" for other, column in equal])
    text = f"{_have('column', listed, len(equal))} the values of another one in {of}"
    names = [column.name for _, column in equal]
    return [Finding("duplicate", "info", text, {"columns": len(equal)}, advice(names))]


def identifiers(columns: Sequence[Column], advice: Advice, rows: Indices) -> list[Finding]:
    """Return the columns that name or count the rows.

    Args:
        columns: Of all samples.
        advice: Returns what to do about columns of these names.
        rows: Row in the file of each training sample.
    """
    names: dict[str, str] = {}
    for column in columns:
        present = ~np.isnan(column.train)
        values = column.train[present]
        count = len(values)
        if count < _MIN_ROWS or column.kind == "date":
            continue
        distinct = len(np.unique(values))
        if column.kind == "category" and distinct >= _IDENTIFIES * count:
            names[column.name] = f"{column.name} ({distinct:,} different values in {count:,} rows)"
        elif column.kind == "number" and len(column.train) == len(rows):
            offset = values - rows[present]
            if (offset == offset[0]).all() and offset[0] in (0, 1):
                names[column.name] = f"{column.name} (it counts the rows)"
            elif distinct == count and (values % 1 == 0).all() and IDENTIFIER.fullmatch(column.name):
                names[column.name] = f"{column.name} (another integer in each row)"
    if not names:
        return []
    text = f"{_plural('column', len(names))} {_listed([*names.values()])} {_verb(len(names), 'identifies', 'identify')}"
    text += " rows and cannot help with new ones"
    return [Finding("identifier", "warning", text, {"columns": len(names)}, advice([*names]))]


def dates_as_numbers(columns: Sequence[Column], has_dates: bool) -> list[Finding]:
    """Return the columns of numbers that are dates like 20240131; `has_dates`: whether the data take `dates`."""
    names = {}
    for column in columns:
        values = column.train[~np.isnan(column.train)]
        if column.kind != "number" or len(values) < _MIN_ROWS or not (values % 1 == 0).all():
            continue
        day, month = values % 100, values // 100 % 100
        valid = (values >= 19000101) & (values < 21000000) & (day >= 1) & (day <= 31) & (month >= 1) & (month <= 12)
        if valid.all():
            names[column.name] = f"{column.name} ({values[0]:.0f})"
    if not names:
        return []
    text = f"{_plural('column', len(names))} {_listed([*names.values()])} {_verb(len(names), 'seems', 'seem')} to hold"
    advice = f"name {_verb(len(names), 'it', 'them')} in dates=[{','.join(names)}]"
    advice = advice if has_dates else "write numbers, for example the days since a first day"
    return [Finding("dates", "warning", f"{text} dates", {"columns": len(names)}, advice)]


def missing(columns: Sequence[Column]) -> list[Finding]:
    """Return the columns that are missing in at least half of the training rows."""
    shares = {each.name: float(np.isnan(each.train).mean()) for each in columns}
    most = dict(sorted(((name, share) for name, share in shares.items() if share >= _MISSING), key=lambda x: -x[1]))
    if not most:
        return []
    listed = _listed([f"{name} ({share:.0%})" for name, share in most.items()])
    text = f"{_have('column', listed, len(most))} no value in at least half of the rows"
    advice = "check that new rows have it as often, or leave it out"
    return [Finding("missing", "info", text, dict([*most.items()][:_LISTED]), advice)]


def missing_codes(columns: Sequence[Column]) -> list[Finding]:
    """Return the columns of numbers in which one value is so frequent and so far off that it may mean a missing one."""
    names = {}
    for column in columns:
        values = column.train[~np.isnan(column.train)]
        if column.kind != "number" or len(values) < _MIN_ROWS:
            continue
        for code in (values.min(), values.max()):
            others = values[values != code]
            count = len(values) - len(others)
            if count < max(_MIN_CODES, _CODES * len(values)) or len(np.unique(others)) < _MIN_ROWS:
                continue
            if np.abs(others - code).min() > others.max() - others.min():
                names[column.name] = f"{column.name} ({code:g} in {count / len(values):.1%})"
    if not names:
        return []
    text = f"{_have('column', _listed([*names.values()]), len(names))} a frequent value that is far from all others"
    advice = "if it means a missing value, leave these cells empty: it hides the differences of the others"
    return [Finding("missing_code", "warning", text, {"columns": len(names)}, advice)]


def codes_as_numbers(columns: Sequence[Column], targets: Sequence[Column], can_name: bool) -> list[Finding]:
    """Return the columns of whole numbers whose values predict the target, but whose order does not: codes of things.

    Args:
        columns: Of the inputs.
        targets: Numbers, or indices of classes.
        can_name: Whether the data module takes `categorical`.
    """
    names: dict[str, str] = {}
    for column in columns:
        values = column.train
        if column.kind != "number" or np.isnan(values).any() or not (values % 1 == 0).all():
            continue
        known, code = np.unique(values, return_inverse=True)
        if not _MIN_KINDS <= len(known) <= len(values) / _ROWS_OF_KIND:
            continue
        for target in targets:
            wanted = target.train
            if target.kind == "category":
                wanted = (wanted == np.bincount(wanted.astype(np.int64)).argmax()) * 1.0
            of_values, of_order = group_scores(code, wanted)
            if of_values > _EXPLAINS and of_order < _IN_ORDER:
                names[column.name] = f"{column.name} ({len(known)} values explain {of_values:.0%} of the target)"
    if not names:
        return []
    text = f"{_have('column', _listed([*names.values()]), len(names))} numbers whose order says little"
    advice = f"if they are codes, name {_verb(len(names), 'it', 'them')} in categorical=[{','.join(names)}]"
    advice = advice if can_name else "if they are codes, give each value a column of 0 and 1, or an embedding"
    return [Finding("codes", "warning", text, {"columns": len(names)}, advice)]


def dropped_rows(dropped: int, kept: int) -> list[Finding]:
    """Return whether many rows were dropped."""
    share = dropped / (dropped + kept)
    if share < _DROPPED:
        return []
    text = f"{dropped:,} of {dropped + kept:,} rows ({share:.1%}) were dropped because a value is missing or invalid"
    advice = "rows like them are not scored; missing=mean keeps those with missing inputs"
    return [Finding("dropped", "warning", text, {"rows": dropped, "share": share}, advice)]


def out_of_range(columns: Sequence[Column]) -> list[Finding]:
    """Return the numbers of validation and test that are 5 times as far outside the training range as it is wide."""
    far: dict[str, tuple[float, str]] = {}
    for column in columns:
        train = column.train[~np.isnan(column.train)]
        if column.kind != "number" or len(train) < _MIN_ROWS:
            continue
        low, high = train.min(), train.max()
        for split, values in column.values.items():
            beyond = np.fmax(np.fmax(low - values, values - high), 0)
            if split == "train" or not (beyond > _FAR * (high - low)).any() or high == low:
                continue
            worst = float(values[np.nanargmax(beyond)])
            text = f"{column.name} ({worst:g} in {split}, training {low:g} to {high:g})"
            if column.name not in far or np.nanmax(beyond) > far[column.name][0]:
                far[column.name] = float(np.nanmax(beyond)), text
    if not far:
        return []
    listed = _listed([text for _, text in far.values()])
    text = f"{_have('column', listed, len(far))} values far outside the training range"
    advice = "check the values and their unit; a network says nothing sure there"
    return [Finding("out_of_range", "warning", text, {"columns": len(far)}, advice)]


def leaks(columns: Sequence[Column], targets: Sequence[Column], advice: Advice) -> list[Finding]:
    """Return the columns that predict a target alone, as a decision tree of one column does in cross-validation.

    Args:
        columns: Inputs.
        targets: What is to be predicted: categories are classes.
        advice: Returns what to do about columns of these names.
    """
    scores: dict[str, float] = {}
    is_sure = False
    for target in targets:
        rows = few(len(target.train), len(columns) * len(targets))
        truth = target.train[rows]
        is_class = target.kind == "category"
        if is_class:
            # Classes of few samples say little.
            _, index, counts = np.unique(truth, return_inverse=True, return_counts=True)
            kept = counts[index] >= _MIN_OF_CLASS
            rows, truth = rows[kept], truth[kept]
            if (counts >= _MIN_OF_CLASS).sum() < 2:
                continue
        elif len(truth) < _MIN_ROWS or (truth == truth[0]).all():
            continue
        for column in columns:
            values = column.train[rows]
            if column.kind != "date" and bins_score(column, values, truth, is_class) > _SCREEN:
                score = tree_score(values, truth, is_class, len(column.categories))
                if score >= _LEAK:
                    scores[column.name] = max(score, scores.get(column.name, 0.0))
                    is_sure = is_sure or score - 3 / len(truth) > _SURE_LEAK
    if not scores:
        return []
    listed = _listed([f"{name} ({score:.3f})" for name, score in scores.items()])
    measure = "balanced accuracy" if targets[0].kind == "category" else "R²"
    text = f"{_plural('column', len(scores))} {listed} alone {_verb(len(scores), 'predicts', 'predict')} the target"
    text = f"{text} ({measure} of a small tree)" if len(targets) == 1 else f"{text}s"
    todo = f"make sure that {_verb(len(scores), 'it is', 'they are')} known before the target, or {advice([*scores])}"
    severity: Severity = "fault" if is_sure else "info"
    return [Finding("leakage", severity, text, dict([*scores.items()][:_LISTED]), todo)]


def drift(columns: Sequence[Column]) -> list[Finding]:
    """Return the columns whose distribution in validation or test differs from that in training.

    The distance of numbers is that of Kolmogorov and Smirnov, the distance of categories half the sum of the
    differences of their shares. Told are distances of at least 0.1 that a random split has with a probability of less
    than 1/1000, for all columns together.
    """
    found = []
    columns = [each for each in columns if each.kind != "date"]
    for split in ("val", "test"):
        distances: dict[str, float] = {}
        for column in columns:
            if split not in column.values:
                continue
            train, other = (each[few(len(each), len(columns))] for each in (column.train, column.values[split]))
            distance, chance = (category_distance if column.kind == "category" else number_distance)(train, other)
            if distance >= _DRIFT and chance < _CHANCE / len(columns):
                distances[column.name] = distance
        if distances:
            distances = dict(sorted(distances.items(), key=lambda item: -item[1]))
            listed = _listed([f"{name} ({distance:.2f})" for name, distance in distances.items()])
            text = f"{listed} {_verb(len(distances), 'has', 'have')} another distribution in {split} than in training"
            advice = f"the {split} scores are those of other data; find out how the splits were made"
            evidence = dict([*distances.items()][:_LISTED])
            found.append(Finding("drift", "warning", text, evidence, advice))
    return found


def _keys(samples: Samples, part: Indices) -> tuple[list[bytes], Indices]:
    """Return for samples of a split digests that are equal for equal samples, and the indices of these samples."""
    size = math.prod(samples.inputs.shape[1:]) * samples.inputs.dtype.itemsize
    # On disk, a sample may be a file to decode.
    part = some(part, (_BYTES // 10 if isinstance(samples.inputs, Stored) else _BYTES) // max(size, 200))
    keys: list[bytes] = []
    for few_rows in np.array_split(part, 1 + len(part) * size // 2**23):  # Never a copy of all samples.
        values = samples.inputs[few_rows]
        if values.dtype.kind == "f":
            assert samples.targets is not None
            both = [each.reshape(len(few_rows), -1) for each in (values, samples.targets[few_rows])]
            values = np.concatenate(both, axis=1, dtype=np.float64) + 0.0
            values[np.isnan(values)] = np.nan  # One pattern of bits for all missing values.
        keys += [hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in values]
    return keys, part


def _chance_of_equal_rows(samples: Samples, rows: Indices) -> float:
    """Return about how probable it is that two rows are equal by chance; 0 if they are no rows of a table.

    For independent columns this is the product of the probabilities for each. Columns depend on each other, so its
    root is taken, as if every second column followed from another one.

    Args:
        samples: All samples.
        rows: Indices of different samples.
    """
    if samples.inputs.ndim != 2 or samples.inputs.dtype.kind != "f" or len(rows) < 2:
        return 0.0
    assert samples.targets is not None
    rows = rows[few(len(rows))]
    count = len(rows)
    values = [each.reshape(count, -1).astype(np.float64) for each in (samples.inputs[rows], samples.targets[rows])]
    chance = 1.0
    for column in np.concatenate(values, axis=1).T:
        times = np.unique(column, return_counts=True)[1]
        chance *= float((times * (times - 1)).sum()) / (count * (count - 1))
        if chance < 1e-30:
            break
    return math.sqrt(chance)


def leave_out(names: Sequence[str]) -> str:
    """Return the advice to leave out columns of a table."""
    return f"leave {_verb(len(names), 'it', 'them')} out"


def ignore(names: Sequence[str]) -> str:
    """Return the advice to leave out columns of data that take `ignore`."""
    shown = ",".join(names[:_LISTED]) + ",..." * (len(names) > _LISTED)
    return f"{leave_out(names)} with ignore=[{shown}]"


def collect_alike(names: Sequence[str]) -> str:
    """Return the advice about texts or images of which a figure tells the class."""
    return "collect the samples of all classes in the same way"


def _listed(names: Sequence[str]) -> str:
    return listed(names, _LISTED)


def _verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _plural(noun: str, count: int) -> str:
    return noun + "s" * (count != 1)


def _have(noun: str, listed: str, count: int) -> str:
    return f"{_plural(noun, count)} {listed} {_verb(count, 'has', 'have')}"


def _classes(names: Sequence[str]) -> str:
    return f"class {names[0]} has" if len(names) == 1 else f"{len(names)} classes ({_listed(names)}) have"
