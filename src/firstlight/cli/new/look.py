"""Look at a person's data, and decide how to train on it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.data.amounts import Mark, find_decimal_marks, read_amount
from firstlight.data.cells import is_missing, same
from firstlight.data.columns import (
    Column,
    describe_column,
    infer_kind,
    is_number,
    likely_targets,
    number_for_people,
    shortened,
)
from firstlight.data.dates import DATE_PARTS
from firstlight.data.files import Csv, missing_column, read_bytes, read_table, read_text
from firstlight.errors import UsageError, about

_ARRAYS = (".npz", ".npy")
_TABLES = (".csv", ".tsv", ".tab", ".psv", ".gz", ".parquet", ".pq", ".data")
_JSON = (".json", ".jsonl", ".ndjson")
_WORDS = 1.5
"""Words in a text, on average, from which a column is a text to read and not a name."""
_MAX_NAMED = 6

_MAX_DECODED = 500
"""Images that are decoded to see whether they can be read."""
_FEW_IMAGES = 2000
"""Images below which a small network is better. Measured: docs/data.md."""
_LEAST_SHIFTED = 16
"""Pixels of the shorter side from which images are shifted: one pixel of 8 changes too much."""
_MIN_STEPS = 600
"""Steps for which a small network trains at least, within 100 epochs."""
_REFIT = "refit     the best steps are found on the validation rows; then all but the test rows are trained on"

TASKS = {
    "regression": ("Regression", "torch.nn.MSELoss"),
    "binary": ("BinaryClassification", "torch.nn.BCEWithLogitsLoss"),
    "multiclass": ("Classification", "torch.nn.CrossEntropyLoss"),
    "multilabel": ("MultilabelClassification", "torch.nn.BCEWithLogitsLoss"),
}


class Text(str):
    """Text that a configuration holds as it is, in a comment or as YAML. Other values are written as YAML."""


@dataclass
class Look:
    """What was seen in the data and what was chosen.

    Args:
        template: Name of the configuration's template: `table`, `text`, `images`, `corpus`, `arrays` or `digits`.
        seen: Lines that tell what was seen.
        chosen: Lines that tell what was chosen, each with its reason.
        values: What the template needs.
    """

    template: str
    seen: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def look_at(path: Path | None, target: str | None) -> Look:
    """Return what was seen in the data at `path`, and what was chosen; None stands for scikit-learn's digits.

    Raises:
        UsageError: If the data are not recognised, or cannot be trained on, or the target is ambiguous.
    """
    if path is None:
        if target:
            raise UsageError(f"--target {target} needs --data PATH, the table that has this column")
        seen = ["scikit-learn's digits: 1,797 images of 8 x 8 pixels, 10 classes; give --data PATH for your own data"]
        return Look("digits", seen)
    if not path.exists():
        raise UsageError(f"there is no {path}")
    suffix = path.suffix.lower()
    if suffix in _JSON:
        lines = "" if suffix == ".json" else ", lines=True"
        convert = f"pandas.read_json({path.name!r}{lines}).to_csv({path.stem + '.csv'!r}, index=False)"
        raise UsageError(f"{path} is JSON: write a table as CSV, for example {convert}, and a text to learn as .txt")
    is_table = path.is_file() and (suffix in _TABLES or (target is not None and suffix not in _ARRAYS))
    if target and not (is_table or suffix == ".npz"):
        raise UsageError(f"--target {target} names a column of a table or an array of a .npz, but {path} is neither")
    if path.is_dir():
        return _look_at_images(path)
    if suffix in _ARRAYS:
        return _look_at_arrays(path, target)
    return _look_at_table(path, target) if is_table else _look_at_corpus(path)


def _look_at_table(path: Path, target: str | None) -> Look:
    file = read_table(str(path))
    table = {name: [row[index] for row in file.rows] for index, name in enumerate(file.header)}
    marks = find_decimal_marks(table)
    examples = {name: next(value for value in table[name] if not is_missing(value)) for name in marks}
    read = {name: [_plain(value, mark) for value in table[name]] for name, mark in marks.items()}
    if target is None:
        target = _find_target(path, table)
    elif problem := missing_column(str(path), [target], file.header):
        raise UsageError(problem)
    if target in read and infer_kind({target: read[target]}) != "regression":
        del marks[target], read[target]  # A few values like 10% are classes.
    table |= read
    labels = [value for value in table[target] if not is_missing(value)]
    counts = Counter(map(same, labels))
    if len(counts) < 2:
        values = f"only the value {next(iter(counts))}" if counts else "no value"
        raise UsageError(f"{path}: column {target} has {values}: there is nothing to predict")
    kind = infer_kind({target: labels})
    if kind == "multiclass" and len(counts) > len(labels) / 2:
        found = f"{path}: column {target} has {len(counts):,} different texts in {len(labels):,} rows"
        means = number_for_people(labels)
        raise UsageError(f"{found}: " + (means or "it is neither a class nor a number to predict"))
    splits = [name for name in table if {*map(str.strip, table[name])} <= {"train", "val", "test"}]
    split = splits[0] if splits and {"train", "test"} <= {*map(str.strip, table[splits[0]])} else None
    columns = [describe_column(name, values) for name, values in table.items() if name not in (target, split)]
    used = [column for column in columns if column.kind != "ignore"]
    seen = [f"{path.name}: {len(file.rows):,} rows, {len(file.header):,} columns"]
    if copies := len(file.rows) - len({*map(tuple, file.rows)}):
        seen[0] += f"; {copies:,} of the rows {'is a copy' if copies == 1 else 'are copies'} of another one"
    texts = [column for column in columns if column.kind != "number" and _is_text(table[column.name])]
    if len(texts) == 1 and not [column for column in used if column not in texts] and kind in ("binary", "multiclass"):
        return _text(path, texts[0].name, target, split, table, counts, seen)
    if not used:
        reasons = "; ".join(f"{column.name}: {column.reason}" for column in columns)
        raise UsageError(f"{path} has no column to learn from ({reasons or 'only the target'})")
    marks = {name: mark for name, mark in marks.items() if name == target or name in [c.name for c in used]}
    if marks:
        numbers = [f"{name} ({examples[name]} is {_plain(examples[name], mark)})" for name, mark in marks.items()]
        seen.append("read as numbers: " + _listed(numbers))
    look = _table(path, file, target, kind, split, columns, counts, seen)
    look.values["decimal_marks"] = marks
    unread = [column.name for column in texts if column.kind == "ignore"]
    if unread and kind in ("binary", "multiclass"):
        look.chosen.append(
            f"texts     {_listed(unread)}: not used; a network for texts needs a file of one such column and {target}"
        )
    return look


def _table(
    path: Path,
    file: Csv,
    target: str,
    kind: str,
    split: str | None,
    columns: Sequence[Column],
    counts: Counter[str],
    seen: list[str],
) -> Look:
    by_kind = {kind: [c for c in columns if c.kind == kind] for kind in ("number", "category", "date", "ignore")}
    names = {"number": ("number", "numbers"), "category": ("category", "categories"), "date": ("date", "dates")}
    named = {kind: names.get(kind, ("left out",) * 2)[len(found) > 1] for kind, found in by_kind.items()}
    seen.append("; ".join(f"{len(found):,} {named[kind]}" for kind, found in by_kind.items() if found))
    for c in by_kind["category"]:
        if means := number_for_people(row[file.header.index(c.name)] for row in file.rows):
            seen.append(f"{c.name} counts as categories, because {means}")
    gaps = sorted((c for c in columns if c.missing and c.kind != "ignore"), key=lambda c: -c.missing)
    if gaps:
        rows = len(file.rows)
        seen.append("missing: " + _listed([f"{c.name} {c.missing / rows:.1%}" for c in gaps]))
    if by_kind["ignore"]:
        seen.append("left out: " + _listed([f"{c.name} ({c.reason})" for c in by_kind["ignore"]], "; "))
    seen.append(_described_target(target, kind, counts))
    without = len(file.rows) - counts.total()
    task, loss = TASKS[kind]
    table = {name: index for index, name in enumerate(file.header)}
    rows = len(file.rows)
    splits = Counter(row[table[split]].strip() for row in file.rows) if split else None
    train = splits["train"] if splits else round(0.7 * rows)
    look = Look("table", seen)
    look.values = {
        "file": Text(path.name),
        "target": target,
        "kind": kind,
        "task": Text(task),
        "loss": Text(loss),
        "split": split,
        "categorical": [c.name for c in by_kind["category"]],
        "dates": [c.name for c in by_kind["date"]],
        "ignore": [c.name for c in by_kind["ignore"]],
        "numbers": len(by_kind["number"]) + DATE_PARTS * len(by_kind["date"]),
        "has_gaps": bool(gaps),
        "drop_targets": bool(without),
        "rows": rows,
        "train": train,
        "classes": len(counts) if kind == "multiclass" else None,
    }
    why = {
        "regression": f"{len(counts):,} different numbers",
        "binary": f"two classes, {' and '.join(sorted(counts))}",
        "multiclass": f"{len(counts):,} classes",
    }
    look.values["task_reason"] = Text(why[kind])
    look.chosen.append(f"task      {task}: {target} has {why[kind]}")
    look.chosen.append("network   TabM: many small networks in one, strong on tables of any size")
    told = f"the column {split}: " + ", ".join(f"{n:,} {each}" for each, n in splits.items()) if splits else ""
    look.values["split_reason"] = Text(told or "70 % train, 15 % val, 15 % test")
    look.chosen.append(f"split     {told or '70 % train, 15 % val, 15 % test, drawn with a fixed seed'}")
    look.chosen.append(_REFIT)
    if gaps:
        look.chosen.append(
            "missing   the median of the training rows, and a feature that says that the value is missing"
        )
    if without:
        look.chosen.append(f"targets   {without:,} rows without a {target} are dropped")
    return look


def _plain(value: str, mark: Mark) -> str:
    """Return a number for people as a computer writes it; other values as they are."""
    amount = read_amount(value, mark)
    return amount[0] if amount else value


def _described_target(target: str, kind: str, counts: Counter[str]) -> str:
    if kind == "regression":
        numbers = [*map(float, counts)]
        return f"target {target}: numbers from {min(numbers):g} to {max(numbers):g}"
    shares = [f"{shortened(name)} {count / counts.total():.1%}" for name, count in counts.most_common()]
    return f"target {target}: {len(counts):,} classes, {_listed(shares)}"


def _text(
    path: Path,
    text: str,
    target: str,
    split: str | None,
    table: Mapping[str, Sequence[str]],
    counts: Counter[str],
    seen: list[str],
) -> Look:
    lengths = sorted(len(value.encode()) for value in table[text])
    seen.append(f"text {text}: median {lengths[len(lengths) // 2]:,} bytes, at most {lengths[-1]:,}")
    seen.append(_described_target(target, "multiclass", counts))
    look = Look("text", seen)
    look.chosen.append(f"task      Classification: {target} has {len(counts):,} classes")
    look.chosen.append("network   NgramClassifier: it reads pieces of words, fast and strong on short texts")
    look.chosen.append(_REFIT)
    without = sum(map(is_missing, table[target]))
    if without:
        look.chosen.append(f"targets   {without:,} rows without a {target} are dropped")
    look.values = {"file": Text(path.name), "text": text, "target": target, "rows": len(table[text]), "split": split}
    look.values["missing_targets"] = "drop" if without else "refuse"
    empty = table[text].count("")
    if empty:
        look.chosen.append(f"missing   {empty:,} row{'s' * (empty != 1)} without a {text}: dropped")
    look.values["missing"] = "drop" if empty else "refuse"
    look.values["split_reason"] = Text(f"the column {split}" if split else "70 % train, 15 % val, 15 % test")
    look.values["task_reason"] = Text(f"{len(counts):,} classes")
    return look


def _look_at_images(path: Path) -> Look:
    import torch  # Imported here: it takes seconds.

    from firstlight.data.pictures import decode, in_threads, read_header
    from firstlight.data.sources.image_folder import find_images, read_layout

    images, ignored = find_images(path, str(path))
    if not images:
        raise UsageError(f"{path} holds no image")
    labels, splits, no_classes = read_layout(images, [], str(path))
    if no_classes:
        raise UsageError(f"{no_classes}: to train, put the images of each class into a folder of its name")
    counts = Counter(label for label in labels if label)
    if len(counts) < 2:
        raise UsageError(f"{path} holds the class {next(iter(counts))} only: there is nothing to predict")

    def read(name: str) -> Any:
        with suppress(Exception):  # Pillow raises errors of many classes.
            decode((path / name).read_bytes(), (32, 32), 1, "stretch")
            return read_header(path / name)

    looked_at = images[:: -(-len(images) // _MAX_DECODED)]
    read_headers = [*in_threads(read, looked_at)]
    headers = [each for each in read_headers if each]
    unreadable = [name for name, header in zip(looked_at, read_headers, strict=True) if not header]
    sides = sorted(min(each.height, each.width) for each in headers) or [32]
    seen = [f"{path.name}: {len(images):,} images in {len(counts):,} folders of classes"]
    grey = sum(each.is_grey for each in headers)
    colours = "grey" if grey == len(headers) else "in colour" if not grey else "grey and in colour"
    seen.append(f"shorter side {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}, {colours}")
    if unreadable:
        of = f"{len(images):,}" if len(looked_at) == len(images) else f"{len(looked_at):,} that were looked at"
        seen.append(f"cannot be read: {len(unreadable):,} of {of}, like {unreadable[0]}")
    if ignored:
        seen.append(f"left out: {len(ignored):,} other files, without an image or a class, like {ignored[0]}")
    seen.append(_described_target("class", "multiclass", counts))
    look = Look("images", seen)
    look.chosen.append(f"task      Classification: {len(counts):,} classes")
    side, batch_size = sides[len(sides) // 2], 16 if len(images) < 1000 else 64
    has_splits = Counter(each for each in splits if each)
    is_small, are_few = side < 64, len(images) < _FEW_IMAGES
    augment = ""
    if are_few:
        widths = [128 >> step for step in reversed(range(min(4, max(1, side.bit_length() - 1))))]
        network, options = "ConvNet", f"widths: {widths}, dropout: 0.2"
        steps = math.ceil((has_splits["train"] or round(0.7 * len(images))) / batch_size)  # An epoch
        # With few validation images, a pause of the loss says little.
        max_epochs = patience = min(100, max(30, math.ceil(_MIN_STEPS / steps)))
        look.chosen.append(
            f"network   ConvNet with {len(widths)} stages: with few images, better and faster than a large network"
        )
        if side >= _LEAST_SHIFTED:
            augment = "firstlight.data.RandomShift"
            look.chosen.append("augment   RandomShift, by at most 1/8 of height and width: images keep their classes")
    else:
        network, depth = ("ResNet", 14) if is_small else ("ImageNetResNet", 18)
        options, why = f"depth: {depth}", "the form for small images" if is_small else "the form for photographs"
        max_epochs, patience = 30 if len(images) < 5000 else 20, 8
        look.chosen.append(f"network   {network} with {depth} layers: {why}")
    told = ", ".join(f"{count:,} {name}" for name, count in has_splits.items())
    look.chosen.append(
        "split     " + (f"the folders: {told}" if told else "70 % train, 15 % val, 15 % test, with a seed")
    )
    size = None if is_small or (torch.accelerator.is_available() and not are_few) else 64
    why = "there are few images" if are_few else "there is no GPU"
    told = "what fits the files" if size is None else f"64 x 64 pixels, because {why}"
    look.chosen.append(f"size      {told}")
    if unreadable:
        look.chosen.append("missing   images that cannot be read are dropped, and the run names them")
    look.values = {
        "file": Text(path.name),
        "network_class": Text(network),
        "network": Text(options),
        "is_image": True,
        "size": size,
        "missing": "drop" if unreadable else "refuse",
        "augment": Text(augment),
        "lr": 0.003 if are_few else 0.001,
        "batch_size": batch_size,
        "max_epochs": max_epochs,
        "patience": patience,
    }
    return look


def _look_at_arrays(path: Path, target: str | None) -> Look:
    from firstlight.data.clean import Missing, clean
    from firstlight.data.sources.arrays import Arrays  # It imports torch.
    from firstlight.data.stored import Stored

    if path.suffix.lower() == ".npy":
        raise UsageError(f"{path} holds one array: write inputs and targets into one .npz, numpy.savez(PATH, X=, y=)")
    samples = Arrays(str(path), targets_name=target, in_memory=False).load()
    inputs, targets, names = samples.inputs, samples.targets, samples.class_names
    if not len(inputs):
        raise UsageError(f"{path} holds no sample")
    if targets is None:
        raise UsageError(f"{path} holds no targets: name them y, targets or labels, or give --target NAME")
    if inputs.dtype.kind == "i":
        raise UsageError(
            f"{path} holds integers, which are tokens: if they are numbers, save X.astype('float32'); for tokens, "
            "write a configuration with firstlight.data.Arrays, see docs/data.md"
        )
    gaps = 0
    if inputs.dtype.kind == "f":
        parts = inputs.chunks() if isinstance(inputs, Stored) else [inputs]
        gaps = sum(int(np.isnan(part.reshape(len(part), -1)).any(axis=1).sum()) for part in parts)
    missing: Missing = "mean" if gaps else "refuse"
    with about(str(path)):
        kept, rows = clean(samples, missing, "drop")
        cleaned = kept.targets
        if kept.missing_reason or cleaned is None:
            raise UsageError("there is no target in any sample")
        if not names and (cleaned.dtype.kind != "f" or cleaned.shape[1:] != (1,)):
            raise UsageError(
                f"the targets are {targets.dtype} {targets.shape}: they must be classes, integers or texts (N,), or "
                "numbers to predict, floats (N,) or (N, 1)"
            )
    without = len(inputs) - len(rows)
    shape = " x ".join(map(str, inputs.shape[1:]))
    seen = [f"{path.name}: {len(inputs):,} samples of {shape}, {inputs.dtype}"]
    look = Look("arrays", seen)
    kind = "regression" if not names else "multiclass" if targets.ndim == 1 else "binary"
    if kind == "multiclass":
        found = Counter(names[int(each)] for each in cleaned[:])
        if len(found) < 2:
            raise UsageError(f"{path} has only the class {next(iter(found))}: there is nothing to predict")
        seen.append(_described_target("class", kind, found))
    else:
        seen.append(f"targets: {'numbers' if kind == 'regression' else ', '.join(names[:_MAX_NAMED])}")
    if gaps:
        seen.append(f"missing: a value in {gaps / len(inputs):.1%} of the samples")
    task, loss = TASKS[kind]
    is_image = inputs.ndim == 4
    network, options = ("ConvNet", "widths: [32, 64, 128], dropout: 0.2") if is_image else ("TabM", "")
    look.chosen.append(f"task      {task}: " + (f"{len(names):,} classes" if names else "the targets are numbers"))
    look.chosen.append(f"network   {network}: the samples are {'images' if is_image else 'numbers'}")
    splits = Counter() if samples.split is None else Counter(samples.split.tolist())
    if splits and "val" not in splits:
        told = f"the arrays: {splits['train']:,} train, of which 15 % become val, {splits['test']:,} test"
    else:
        told = "the arrays: " + ", ".join(f"{count:,} {name}" for name, count in splits.items())
    look.chosen.append(f"split     {told if splits else '70 % train, 15 % val, 15 % test, drawn with a fixed seed'}")
    look.chosen.append(_REFIT)
    if gaps:
        look.chosen.append("missing   the mean of the training samples")
    if without:
        look.chosen.append(f"targets   {without:,} samples without a valid target are dropped")
    look.values = {"file": Text(path.name), "task": Text(task), "loss": Text(loss)}
    look.values |= {"network_class": Text(network), "network": Text(options)}
    look.values |= {"missing": missing, "missing_targets": "drop" if without else "refuse"}
    train = splits["train"] if "val" in splits else round(0.85 * splits["train"]) or round(0.7 * len(inputs))
    look.values |= {"train": train, "is_image": is_image, "target": target}
    return look


def _look_at_corpus(path: Path) -> Look:
    size = len(read_text(read_bytes(str(path)), str(path), hint="; a table must be named .csv, .tsv or .parquet"))
    seen = [
        f"{path.name}: a text of {size:,} bytes",
        "a table would be named .csv, .tsv or .parquet, or be given with --target NAME",
    ]
    chosen = [
        "task      LanguageModel: it predicts the next byte of the text",
        "network   TransformerLM: attention over the bytes before",
        "split     the text in order: train, then val, then test",
    ]
    return Look("corpus", seen, chosen, {"file": Text(path.name), "size": size})


def _find_target(path: Path, table: Mapping[str, Sequence[str]]) -> str:
    """Return the only likely target, or refuse with the candidates."""
    likely = likely_targets(table)
    if len(likely) == 1:
        return likely[0]
    candidates = likely or [
        name
        for name, values in table.items()
        if describe_column(name, values).kind in ("number", "category") and name != "split"
    ]
    if len(candidates) == 1:
        return candidates[0]
    some = _listed(candidates[:-1][: _MAX_NAMED - 1] + candidates[-1:]) if candidates else "none"
    raise UsageError(f"which column of {path} is to be predicted? Give --target NAME; candidates: {some}")


def _is_text(values: Sequence[str]) -> bool:
    """Return whether values are texts of words or lines of words to read."""
    present = [value for value in values if not is_missing(value)]
    distinct = {*present}
    if len(distinct) < max(3, 0.5 * len(present)) or all(map(is_number, distinct)):
        return False
    return sum(len(value.split()) for value in distinct) / len(distinct) >= _WORDS


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}{len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return separator.join(names[:_MAX_NAMED]) + more
