"""The sections of a report: a chart, a table behind it, and a sentence that says what it shows.

Shapes: `N` samples, `K` classes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.insight.calibration import Calibration, calibration, scaled, temperature
from firstlight.insight.report import charts

Outputs = Mapping[str, NDArray[Any]]
"""What `RUN/outputs/SPLIT.npz` holds: `targets`, `outputs` and `index`, one entry for each sample."""

MAX_CLASSES = 30
"""Classes of the largest confusion matrix."""
_MISCALIBRATED = 0.01  # Calibration error from which it is not chance or rounding.
_ERRORS = 12
"""Errors that are shown."""
_ROWS = 40
"""Rows of a table of a curve."""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: Heading.
        text: A sentence or two that says what is seen.
        chart: SVG element; `""` for none.
        header: Names of the columns of the table.
        rows: Its rows.
        cards: Samples to show: each has `picture` (a data address), `text` or `row`, and `caption`.
    """

    title: str
    text: str = ""
    chart: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    cards: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The section's address in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    """What a report is made of.

    Args:
        series: By name, the steps and values that were logged.
        results: Content of `results.json`.
        outputs: Outputs of the validation and test split, by name of the split.
        class_names: Names of the classes; empty if targets are no classes.
        shown: By position in the split, samples that were predicted badly: each has a `picture` (a data address), a
            `text`, or a `row` of values by column.
    """

    series: Mapping[str, charts.Line]
    results: Mapping[str, Any]
    outputs: Mapping[str, Outputs]
    class_names: Sequence[str] = ()
    shown: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def number(value: Any) -> str:
    """Return a number with four significant digits.

    >>> number(0.123456), number(1840), number(None)
    ('0.1235', '1,840', '')
    """
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def title(name: str) -> str:
    """Return the name of a metric as a heading.

    >>> title("auroc"), title("balanced_accuracy")
    ('AUROC', 'Balanced accuracy')
    """
    known = {"auroc": "AUROC", "r2": "R²", "rmse": "RMSE", "mae": "MAE"}
    return known.get(name, name[:1].upper() + name[1:].replace("_", " "))


def curves(run: Run) -> list[Section]:
    """Return a chart for each metric, training against validation."""
    found = []
    # `val/class_share/CLASS` is for findings.
    names = [name[4:] for name in run.series if name.startswith("val/") and name.count("/") == 1]
    if "train/loss" in run.series:
        names.insert(0, "loss")
    names = sorted(dict.fromkeys(names), key=lambda name: name != "loss")
    best = run.results.get("best", {})
    for name in names:
        of = {split: run.series[f"{split}/{name}"] for split in ("train", "val") if f"{split}/{name}" in run.series}
        of = {split: line for split, line in of.items() if np.isfinite(line[1]).any()}
        if not of:
            continue
        mark = (float(best["step"]), "best checkpoint") if "step" in best and "val" in of else None
        last = {split: line[1][-1] for split, line in of.items()}
        words = {"train": "training", "val": "validation"}
        text = ", ".join(f"{words[split]} ends at {number(float(value))}" for split, value in last.items())
        text = text[:1].upper() + text[1:]
        if f"val/{name}" in best:
            text += f"; {number(best[f'val/{name}'])} at the best checkpoint"
        steps = [*dict.fromkeys(int(step) for line in of.values() for step in line[0])]
        by_step = {split: dict(zip(map(int, line[0]), line[1], strict=True)) for split, line in of.items()}
        rows = [[f"{step:,}", *(number(each.get(step)) for each in by_step.values())] for step in _few(sorted(steps))]
        chart = charts.lines(of, "optimiser step", name, log=name == "loss", mark=mark)
        found.append(Section(title(name), text + ".", chart, ["step", *of], rows))
    return found


def schedule(run: Run) -> list[Section]:
    """Return the learning rate at each logged step."""
    rates = {name: line for name, line in run.series.items() if name == "lr" or name.startswith("lr/")}
    if not rates:
        return []
    first = next(iter(rates.values()))
    peak = int(np.argmax(first[1]))
    text = f"Peak {number(float(first[1][peak]))} at step {first[0][peak]:,}, {number(float(first[1][-1]))} at the end."
    rows = [[f"{int(step):,}", number(float(rate))] for step, rate in _few([*zip(*first, strict=True)])]
    chart = charts.lines(dict([*rates.items()][:3]), "optimiser step", "learning rate", ends=False)
    return [Section("Learning rate", text, chart, ["step", "learning rate"], rows)]


def gradients(run: Run) -> list[Section]:
    """Return the norm of the gradient of each block over time."""
    prefix = "grad_norm/"
    norms = {name.removeprefix(prefix): line for name, line in run.series.items() if name.startswith(prefix)}
    blocks = {name: each for name, each in norms.items() if name.rpartition("/")[2] != "total" and len(each[0]) > 1}
    norms = blocks or norms
    if not norms:
        return []
    steps = np.unique(np.concatenate([np.asarray(line[0]) for line in norms.values()]))
    if len(steps) < 2:
        return []
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 200)).astype(int))]
    values = np.full((len(norms), len(steps)), np.nan)
    for row, (at, norm) in enumerate(norms.values()):
        position = np.searchsorted(steps, at)
        hit = (position < len(steps)) & (steps[np.minimum(position, len(steps) - 1)] == at)
        values[row, position[hit]] = np.asarray(norm)[hit]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(values > 0, np.log10(values), np.nan)
    medians = {name: float(np.nanmedian(np.asarray(line[1]))) for name, line in norms.items()}
    least, most = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    text = f"Median norms from {number(medians[least])} ({least}) to {number(medians[most])} ({most}), before clipping."
    text += " Where a norm is 0, the map is empty." if (values == 0).any() else ""
    rows = [[name, number(value), number(float(np.max(norms[name][1])))] for name, value in medians.items()]
    chart = charts.heat_map(logs, steps, [*norms], "optimiser step", "log10 of the norm")
    return [Section("Gradient norms", text, chart, ["block", "median", "largest"], rows)]


def predictions(run: Run) -> list[Section]:
    """Return what the outputs of the test split, or else of the validation split, look like beside the targets."""
    split = "test" if "test" in run.outputs else "val"
    outputs = run.outputs.get(split, {})
    if "outputs" not in outputs or "targets" not in outputs or not len(outputs["targets"]):
        return []
    scores, targets = np.asarray(outputs["outputs"], float), outputs["targets"]
    if not np.isfinite(scores).all():
        return []
    if (found := class_probabilities(run, split)) is not None:
        return [*_confusion(run, split, *found), *_calibration(run, split), *_roc(run, split, *found)]
    is_number = targets.dtype.kind == "f" and scores.shape == targets.shape and not run.class_names
    return _residuals(split, scores, targets) if is_number else []


def worst(run: Run) -> tuple[str, NDArray[np.int64]]:
    """Return the split and the positions of the surest wrong predictions, or of the largest errors of a regression."""
    split = "test" if "test" in run.outputs else "val"
    outputs, found = run.outputs.get(split, {}), class_probabilities(run, split)
    if found is not None:
        scores, targets = found
        wrong = np.flatnonzero(scores.argmax(axis=1) != targets)
        return split, wrong[np.argsort(-scores.max(axis=1)[wrong], kind="stable")][:_ERRORS]
    if {"outputs", "targets"} <= outputs.keys() and outputs["targets"].dtype.kind == "f" and not run.class_names:
        values, truth = np.asarray(outputs["outputs"], float), np.asarray(outputs["targets"], float)
        if values.shape == truth.shape and len(truth):
            size = np.abs(values - truth).reshape(len(truth), -1).max(axis=1)
            return split, np.argsort(-size, kind="stable")[:_ERRORS]
    return split, np.zeros(0, np.int64)


def errors(run: Run) -> list[Section]:
    """Return the samples at the positions of `worst`, as pictures, texts or rows."""
    split, positions = worst(run)
    if not len(positions):
        return []
    outputs, found = run.outputs[split], class_probabilities(run, split)
    if found is not None:
        scores, targets = found
        guesses, names = scores.argmax(axis=1), run.class_names
        captions = [
            f"{names[targets[i]]} taken for {names[guesses[i]]} ({scores[i, guesses[i]]:.0%})" for i in positions
        ]
        wrong = int((guesses != targets).sum())
        title = "Most confident errors"
        text = f"{wrong:,} of {len(targets):,} {split} samples are wrong. The network is surest of these."
    else:
        title, text = "Largest errors", f"The {split} samples whose predictions are furthest from their targets."
        captions = [
            f"target {_shown(outputs['targets'][i])}, predicted {_shown(outputs['outputs'][i])}" for i in positions
        ]
    rows_in_data = [int(outputs["index"][i] if "index" in outputs else i) for i in positions]
    cards = [
        {**run.shown.get(int(i), {}), "caption": caption, "row_in_data": row}
        for i, row, caption in zip(positions, rows_in_data, captions, strict=True)
    ]
    rows = [[f"{card['row_in_data']:,}", str(card["caption"])] for card in cards]
    return [Section(title, text, header=["row", "prediction"], rows=rows, cards=cards)]


def class_probabilities(run: Run, split: str) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Return probabilities `(N, K)` and class targets `(N,)` of a split, also for two classes; None for others."""
    outputs = run.outputs.get(split, {})
    if "outputs" not in outputs or "targets" not in outputs or not run.class_names:
        return None
    scores, targets = np.asarray(outputs["outputs"], float), outputs["targets"]
    if targets.ndim == 1 and scores.ndim == 2 and scores.shape[1] == len(run.class_names):
        return scores, targets.astype(np.int64)
    if len(run.class_names) == 2 and targets.size == len(targets) == scores.size:
        both = 1 - scores.reshape(-1), scores.reshape(-1)
        if "logits" in outputs:  # 1 minus a probability near 1 has few digits.
            from scipy.special import expit

            both = expit(-outputs["logits"].astype(float)), expit(outputs["logits"].astype(float))
        return np.stack(both, axis=1), targets.reshape(-1).astype(np.int64)
    return None


def confusion(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the confusion matrix `(K, K)` of probabilities `(N, K)`: a row for each target."""
    counts = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
    np.add.at(counts, (targets, scores.argmax(axis=1)), 1)
    return counts


def _confusion(run: Run, split: str, scores: NDArray[Any], targets: NDArray[Any]) -> list[Section]:
    names, counts = run.class_names, confusion(scores, targets)
    right = int(np.trace(counts))
    text = f"{right:,} of {len(targets):,} {split} samples are right ({right / len(targets):.1%})."
    wrong = counts - np.diag(np.diag(counts))
    if wrong.any():
        a, b = np.unravel_index(wrong.argmax(), wrong.shape)
        times = "once" if wrong[a, b] == 1 else f"{wrong[a, b]:,} times"
        text += f" The most frequent mistake: {names[int(a)]} taken for {names[int(b)]}, {times}."
    if len(names) > MAX_CLASSES:
        pairs = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None)[:_ROWS], wrong.shape))[0]
        rows = [[names[int(a)], names[int(b)], f"{wrong[a, b]:,}"] for a, b in pairs if wrong[a, b]]
        return [Section("Confusion matrix", text, "", ["target", "predicted", "samples"], rows)]
    rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, counts, strict=True)]
    return [Section("Confusion matrix", text, charts.matrix(counts, names), ["target", *names], rows)]


def _calibration(run: Run, split: str) -> list[Section]:
    found, fitted_on = class_probabilities(run, split), class_probabilities(run, "val")
    if found is None:
        return []
    before = calibration(*found)
    of = {"as trained": _filled(before)}
    text = f"Expected calibration error {before.error:.3f} on the {split} split."
    if fitted_on is not None and split != "val":
        heat = temperature(*fitted_on)
        after = calibration(scaled(found[0], heat), found[1])
        of[f"temperature {heat:.2f}"] = _filled(after)
        text += f" With a temperature of {heat:.2f}, fitted on validation, it is {after.error:.3f}."
        if abs(math.log(heat)) > 0.1 and before.error >= _MISCALIBRATED:
            text += f" The network is {'too sure' if heat > 1 else 'less sure than it could be'}."
    header = ["confidence", "accuracy", "samples"]
    cells = zip(before.confidence, before.accuracy, before.samples, strict=True)
    rows = [[f"{c:.3f}", f"{a:.3f}", f"{n:,}"] for c, a, n in cells]
    chart = charts.diagonal(of, "mean probability of the predicted class", "share of right predictions", marker="o")
    return [Section("Calibration", text, chart, header, rows)]


def _filled(found: Calibration) -> charts.Line:
    """Return confidence and accuracy of the bins that hold 1 % of the samples; of fewer, chance decides."""
    is_shown = found.samples >= 0.01 * found.samples.sum()
    return found.confidence[is_shown], found.accuracy[is_shown]


def _roc(run: Run, split: str, scores: NDArray[Any], targets: NDArray[Any]) -> list[Section]:
    from sklearn.metrics import roc_auc_score, roc_curve

    count = len(run.class_names)
    present = [label for label in range(count) if 0 < (targets == label).sum() < len(targets)]
    if not present:
        return []
    if count == 2 and "logits" in run.outputs[split]:  # Probabilities of large logits are equal.
        scores = np.outer(run.outputs[split]["logits"], [-1, 1])
    areas = {label: float(roc_auc_score(targets == label, scores[:, label])) for label in present}
    # One curve says all of two classes; of more, those that are found worst.
    drawn = [1] if count == 2 else sorted(present, key=areas.__getitem__)[:3]
    of = {}
    for label in drawn:
        false, true, _ = roc_curve(targets == label, scores[:, label])
        of[f"{run.class_names[label]} (area {areas[label]:.3f})"] = (false, true)
    mean = f"{np.mean([*areas.values()]):.4f}, the mean of one class against the others"
    text = f"Area under the curve on the {split} split: {f'{areas[1]:.4f}' if count == 2 else mean}."
    rows = [[run.class_names[label], f"{areas[label]:.4f}"] for label in present]
    chart = charts.diagonal(of, "false positive rate", "true positive rate")
    return [Section("ROC curve", text, chart, ["class", "area"], rows)]


def _residuals(split: str, scores: NDArray[Any], targets: NDArray[Any]) -> list[Section]:
    first, truth = scores.reshape(len(scores), -1)[:, 0], targets.reshape(len(targets), -1)[:, 0]
    residual = first - truth
    which = "" if scores.size == len(scores) else " of the first target"
    text = (
        f"Predictions{which} on the {split} split: mean error {number(float(residual.mean()))}, root mean square "
        f"{number(float(np.sqrt((residual**2).mean())))}, largest {number(float(np.abs(residual).max()))}."
    )
    shares = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    values = np.quantile(residual, shares)
    rows = [[f"{share:.0%}", number(float(value))] for share, value in zip(shares, values, strict=True)]
    chart, header = charts.histogram(residual, "residual"), ["quantile", "residual"]
    return [
        Section("Predictions", text, charts.scatter(truth, first, "target", "prediction")),
        Section("Residuals", "Prediction minus target.", chart, header, rows),
    ]


def _few(rows: Sequence[Any]) -> list[Any]:
    """Return at most `_ROWS` rows, evenly chosen, with the first and the last one."""
    chosen = np.unique(np.linspace(0, max(len(rows) - 1, 0), min(_ROWS, len(rows))).astype(int))
    return [rows[index] for index in chosen]


def _shown(value: NDArray[Any]) -> str:
    return ", ".join(number(float(each)) for each in np.atleast_1d(value)[:3])
