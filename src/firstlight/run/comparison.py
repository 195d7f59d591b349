"""Compare finished runs: read them, group them, and tell how they differ. It imports neither torch nor Lightning."""

import glob
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from firstlight.errors import UsageError, did_you_mean
from firstlight.insight import compare
from firstlight.insight.compare import Difference, Interval
from firstlight.insight.contributions import contributions
from firstlight.run import directory
from firstlight.run.outputs import read_outputs

LETTERS = ascii_uppercase
"""Names of the sides, in their order."""

_BOOKKEEPING = {*directory.PER_COMMAND, "experiment", "runs", "report", "seed_everything"}
"""Options that do not make another configuration."""

_HIGHER = {"accuracy", "auroc", "balanced_accuracy", "f1", "nn_accuracy", "r2", "recall_at_k"}
_LOWER = {"bits_per_byte", "log_loss", "loss", "mae", "perplexity", "rmse"}
_SHARES = _HIGHER - {"r2"}  # Their differences are told in points of 100.
_MAIN = ("accuracy", "r2", "bits_per_byte", "nn_accuracy", "loss")
_DECIDES_LOSS = ("model.loss", "model.class_weights", "model.pos_weight")
_PER_SAMPLE = ("index", "targets")
_DECIDES_SAMPLES = {
    *("data", "data.path", "data.root", "data.target", "data.missing", "data.missing_targets", "data.group"),
    *("data.time", "data.split_seed", "data.val_fraction", "data.test_fraction"),
}
"""Options that decide which samples are in a split."""


@dataclass
class Run:
    """A finished run.

    Args:
        path: Its directory.
        config: Content of its `config.yaml`.
        results: Content of its `results.json`.
        metrics: Metrics of the compared split by name, without the name of the split.
        samples: By metric, what each sample adds, `(N,)`; empty without outputs.
        outputs: The arrays of `read_outputs`, or why there are none.
    """

    path: Path
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] | str = ""

    @property
    def seed(self) -> Any:
        """The seed of weights and order."""
        return self.config.get("seed_everything")

    @property
    def group(self) -> dict[str, Any]:
        """The place of the run in a group of `firstlight repeat`; empty without one."""
        return directory.read_group(self.path) or {}

    def load(self, split: str) -> None:
        """Read the metrics of a split, and its outputs if there are any."""
        known = self.results["metrics"] if split == "test" else self.results.get("best") or {}
        self.metrics = {
            name.partition("/")[2]: float(value)
            for name, value in known.items()
            if name.startswith(f"{split}/") and isinstance(value, int | float)
        }
        try:
            self.outputs = read_outputs(self.path, split)
        except UsageError as error:
            self.outputs = str(error)
            return
        self.samples = contributions(self.outputs)
        self.metrics = {**self.metrics, **{name: float(each.mean()) for name, each in self.samples.items()}}


@dataclass
class Side:
    """Runs of one configuration: what is compared with other sides.

    Args:
        label: Its name in the tables.
        kind: `"run"` for a single one, `"seeds"` or `"folds"`.
        runs: In the order of their seeds or folds.
    """

    label: str
    kind: str
    runs: list[Run]

    def values(self, metric: str) -> Any:
        """Return the metric of each run: for each sample `(S, N)` if all have outputs, else `(S,)`."""
        if self.kind != "folds" and all(metric in run.samples for run in self.runs):
            return np.array([run.samples[metric] for run in self.runs])
        return np.array([run.metrics[metric] for run in self.runs])

    def interval(self, metric: str) -> Interval:
        """Return the metric with its interval, whose ends are NaN if they are unknown."""
        values = self.values(metric)
        if self.kind == "folds":
            return compare.of_folds(values)
        if len(self.runs) > 1:
            return _within(metric, compare.of_runs(values))
        if values.ndim == 1:
            return Interval(float(values[0]))
        is_share = np.isin(values, (0, 1)).all() and metric == "accuracy"
        return compare.of_share(values[0]) if is_share else _within(metric, compare.of_samples(values[0]))


@dataclass
class Comparison:
    """What `firstlight compare` prints.

    Args:
        split: `"test"` or `"val"`.
        sides: The first one is what the others are compared with.
        metric: The metric of the verdicts.
        options: By path, the options that differ, a value for each side.
        metrics: By name, an interval for each side.
        differences: By name, the difference of each side but the first to the first one.
        verdicts: A sentence for each side but the first.
        notes: What limits the comparison.
    """

    split: str
    sides: list[Side]
    metric: str
    options: dict[str, list[str]]
    metrics: dict[str, list[Interval]]
    differences: dict[str, list[Difference]]
    verdicts: list[str]
    notes: list[str]


def compare_runs(paths: Sequence[str], metric: str | None = None, split: str | None = None) -> Comparison:
    """Compare runs, experiments and groups.

    Args:
        paths: Run directories, folders of experiments, or patterns of them with `*`.
        metric: Name of the metric of the verdicts; None: accuracy, r2, bits_per_byte, nn_accuracy or loss.
        split: `"test"` or `"val"`; None: `test`, but `val` for folds.

    Raises:
        UsageError: If there is nothing to compare, or if the runs cannot be compared.
    """
    notes: list[str] = []
    sides = _sides(paths, notes)
    kinds = {side.kind for side in sides}
    if "folds" in kinds and kinds != {"folds"}:
        other = next(side for side in sides if side.kind != "folds")
        raise UsageError(f"folds compare with folds only, but {other.label} has none: repeat it with --folds")
    if "folds" in kinds and split == "test":
        raise UsageError(
            "folds are compared on the validation samples of each fold, because all of them share the test samples: "
            "leave --split test out"
        )
    split = split or ("val" if "folds" in kinds else "test")
    for side in sides:
        for run in side.runs:
            run.load(split)
    _check_outputs(sides, split)
    options = _differing_options(sides)
    of_data = [name for name in options if name in _DECIDES_SAMPLES]
    if of_data and any(isinstance(run.outputs, str) for side in sides for run in side.runs):
        notes.append(f"{split} samples may differ: {', '.join(of_data)} differs, and not all runs have outputs")
    names = _common_metrics(sides, split)
    if (
        "loss" in names
        and len(names) > 1
        and any(name.startswith(_DECIDES_LOSS) or name == "model" for name in options)
    ):
        names.remove("loss")
        note = "loss is left out: the sides minimise different losses"
        notes.append(note)
        if metric == "loss":
            raise UsageError(f"{note}; available: {', '.join(names)}")
    if metric is not None and metric not in names:
        raise UsageError(f"unknown metric {metric}; available: {', '.join(names)}" + did_you_mean(metric, names))
    chosen = metric or next((name for name in _MAIN if name in names), names[0])
    names = [chosen, *(name for name in names if name != chosen)]
    first, *others = sides
    level = 1 - (1 - compare.LEVEL) / len(others)
    if len(others) > 1:
        notes.append(
            f"{len(others)} comparisons: each interval of a difference covers {100 * level:.3g} %, so that all of them "
            "together are right in 95 %"
        )
    differences = {name: [_difference(first, other, name, level) for other in others] for name in names}
    for letter, other in zip(LETTERS[1:], others, strict=False):
        notes += _notes(first, other, chosen, letter)
    return Comparison(
        split,
        sides,
        chosen,
        options,
        {name: [side.interval(name) for side in sides] for name in names},
        differences,
        [verdict("A", letter, chosen, found) for letter, found in zip(LETTERS[1:], differences[chosen], strict=False)],
        list(dict.fromkeys(notes)),
    )


def verdict(first: str, other: str, metric: str, found: Difference) -> str:
    """Return in words what a difference `other - first` shows.

    >>> verdict("A", "B", "accuracy", Difference(0.009, 0.002, 0.016, True))
    'B is better than A by 0.9 points of accuracy (0.2 to 1.6)'
    >>> verdict("A", "B", "loss", Difference(-0.01, -0.03, 0.01, False, 0.2, "14 more seeds would be needed"))
    'no difference in loss shown between A and B (B - A: -0.03 to 0.01); 14 more seeds would be needed'
    """
    if math.isnan(found.low):
        return f"no verdict on {metric}: the difference has no interval"
    scale, unit = (100, " points") if metric in _SHARES else (1, "")
    size, low, high = (scale * each for each in (found.value, found.low, found.high))
    width = high - low
    digits = min(max(-math.floor(math.log10(width / 4)), 0), 9) if width else 4

    def number(value: float) -> str:
        return f"{value:.{digits}f}"

    if not found.is_shown:
        more = f"; {found.needed}" if found.needed else ""
        ends = f"{other} - {first}: {number(low)} to {number(high)}{unit}"
        return f"no difference in {metric} shown between {first} and {other} ({ends}){more}"
    if size < 0:
        low, high = -high, -low
    word = "higher" if size > 0 else "lower"
    if metric in _HIGHER | _LOWER:
        word = "better" if (size > 0) == (metric in _HIGHER) else "worse"
    amount = f"{number(abs(size))} points of {metric}" if unit else f"{number(abs(size))} in {metric}"
    return f"{other} is {word} than {first} by {amount} ({number(low)} to {number(high)})"


def _sides(paths: Sequence[str], notes: list[str]) -> list[Side]:
    """Return the runs of all paths by configuration."""
    found: dict[Path, Run] = {}
    single = True
    for path in paths:
        runs, is_run = _runs(path, notes)
        single &= is_run
        found |= {run.path.resolve(): run for run in runs}
    runs = list(found.values())
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(_key(run), []).append(run)
    if len(by_key) == 1 and single and len(runs) > 1:
        by_key = {str(number): [run] for number, run in enumerate(runs)}  # Two runs that the user has named.
    sides = [_side(each, notes) for each in by_key.values()]
    if not sides:
        raise UsageError("nothing to compare: give two runs, or folders of experiments")
    if len(sides) == 1:
        count = len(sides[0].runs)
        what = "one run" if count == 1 else f"{count} runs of one configuration"
        raise UsageError(f"nothing to compare: {sides[0].label} is {what}; give another run or experiment")
    if len(sides) > len(LETTERS):
        raise UsageError(f"{len(sides)} configurations are too many: give at most {len(LETTERS)}")
    labels = [side.label for side in sides]
    for side in sides:
        if labels.count(side.label) > 1:
            side.label = str(side.runs[0].path)
    return sides


def _runs(path: str, notes: list[str]) -> tuple[list[Run], bool]:
    """Return the finished runs that a path means, and whether it is that of a run."""
    given = Path(path).expanduser()
    if not given.exists() and glob.has_magic(path):
        matches = [Path(each) for each in sorted(glob.glob(str(given)))]
        folders = [each for each in matches if each.is_dir()]
        if not folders:
            raise UsageError(f"no run matches {path}")
        return [run for each in folders for run in _runs(str(each), notes)[0]], False
    inside = sorted(each.parent for each in given.glob("*/config.yaml")) if given.is_dir() else []
    if inside and not (given / "config.yaml").is_file():
        finished = [each for each in inside if directory.is_finished(each)]
        if len(finished) < len(inside):
            notes.append(f"{len(inside) - len(finished)} of {len(inside)} runs in {path} have not finished: left out")
        if not finished:
            raise UsageError(f"{path} has no finished run")
        return [_read(each) for each in finished], False
    return [_read(directory.find(given))], True


def _read(path: Path) -> Run:
    if not directory.is_finished(path):
        raise UsageError(f"{path} has not finished: resume it with firstlight run --run {path}")
    return Run(path, directory.load_config(path), directory.read_results(path))


def _key(run: Run) -> str:
    """Return a text that is equal for the runs of one side."""
    if run.group:
        return f"group {run.path.parent.resolve()} {run.group['name']}"
    return json.dumps(_options(run), sort_keys=True, default=str)


def _side(runs: list[Run], notes: list[str]) -> Side:
    """Return runs of one configuration as a side; of runs with the same seed, the newest is kept."""
    folder = runs[0].path.parent.name
    if group := runs[0].group:
        kind = "folds" if group["kind"] == "folds" else "seeds"
        by_index = {run.group["index"]: run for run in sorted(runs, key=lambda run: run.path.name)}
        kept = [by_index[index] for index in sorted(by_index)]
        count = group["count"]
        if len(kept) < count:
            if kind == "folds":
                raise UsageError(f"{folder}/{group['name']} has {len(kept)} of {count} folds: repeat it to the end")
            if len(kept) > 1:  # Else the user has named one of them.
                notes.append(f"{folder}/{group['name']} has {len(kept)} of {count} runs")
        return Side(f"{folder}/{group['name']}", kind if len(kept) > 1 else "run", kept)
    by_seed = {str(run.seed): run for run in sorted(runs, key=lambda run: run.path.name)}
    kept = [by_seed[seed] for seed in sorted(by_seed)]
    if len(kept) < len(runs):
        notes.append(f"{folder}: {len(runs) - len(kept)} runs repeat the seed of another one and are left out")
    label = folder if len(kept) > 1 else f"{folder}/{kept[0].path.name}"
    return Side(label, "seeds" if len(kept) > 1 else "run", kept)


def _check_outputs(sides: Sequence[Side], split: str) -> None:
    """Refuse single runs without outputs, and runs with other samples."""
    every = [run for side in sides for run in side.runs]
    if all(side.kind == "run" for side in sides):
        for run in every:
            if isinstance(run.outputs, str):
                raise UsageError(run.outputs)
    by_fold: dict[Any, Run] = {}
    for side in sides:
        for place, run in enumerate(side.runs):
            if isinstance(run.outputs, str):
                continue
            first = by_fold.setdefault(place if side.kind == "folds" else 0, run)
            assert not isinstance(first.outputs, str)
            for name in _PER_SAMPLE:
                one, other = first.outputs.get(name), run.outputs.get(name)
                if one is not None and other is not None and not np.array_equal(one, other):
                    raise UsageError(
                        f"{first.path} and {run.path} have different {split} samples, so they cannot be compared: use "
                        "the same data and data.split_seed"
                    )
    counts = {len(side.runs) for side in sides if side.kind == "folds"}
    if len(counts) > 1:
        raise UsageError(f"the sides have different numbers of folds: {', '.join(map(str, sorted(counts)))}")


def _common_metrics(sides: Sequence[Side], split: str) -> list[str]:
    every = [run for side in sides for run in side.runs]
    for run in every:
        if not run.metrics:
            verb = "test" if split == "test" else "validate"
            raise UsageError(
                f"{run.path} has no {split} metrics: firstlight {verb} --run {run.path} writes its outputs"
            )
    common = [name for name in every[0].metrics if all(name in run.metrics for run in every)]
    common = [name for name in common if all(math.isfinite(run.metrics[name]) for run in every)]
    if not common:
        other = next(run for run in every if not run.metrics.keys() & every[0].metrics.keys())
        raise UsageError(
            f"no metric is common to all runs: {every[0].path} has {', '.join(every[0].metrics)}, {other.path} has "
            f"{', '.join(other.metrics)}"
        )
    return common


def _difference(first: Side, other: Side, metric: str, level: float) -> Difference:
    a, b = first.values(metric), other.values(metric)
    if first.kind == "folds":
        return compare.difference_of_folds(a, b, level)
    if a.ndim != b.ndim:
        a, b = (each if each.ndim == 1 else each.mean(1) for each in (a, b))
    if len(a) == len(b) == 1:
        if a.ndim == 1:
            return Difference(float(b[0] - a[0]), math.nan, math.nan)
        return compare.difference_of_samples(a[0], b[0], level)
    return compare.difference_of_groups(a, b, _is_paired(first, other), level)


def _is_paired(first: Side, other: Side) -> bool:
    """Return whether both sides have runs with the same seeds, in the same order."""
    return len(first.runs) > 1 and [run.seed for run in first.runs] == [run.seed for run in other.runs]


def _notes(first: Side, other: Side, metric: str, letter: str) -> list[str]:
    counts = len(first.runs), len(other.runs)
    if first.kind == "folds":
        return ["folds: intervals have the correction of Nadeau and Bengio, because training sets overlap"]
    if counts == (1, 1):
        if not all(metric in side.runs[0].samples for side in (first, other)):
            return [f"one run each, and {metric} is not a mean over samples: use firstlight repeat --seeds 6 for both"]
        return ["one run each: this compares two checkpoints; another seed can change it (firstlight repeat --seeds 6)"]
    found = []
    if 1 in counts:
        found.append("a side has one run: its seeds are taken to vary as those of the other side")
    if any(side.values(metric).ndim == 1 for side in (first, other)):
        found.append(f"intervals of {metric} count seeds only: the runs keep no values of samples for it")
    if _is_paired(first, other):
        each = [side.values(metric) for side in (first, other)]
        means = [values if values.ndim == 1 else values.mean(1) for values in each]
        p = compare.sign_flip(means[1] - means[0])
        never = "; with fewer than 6 seeds it never reaches 0.05" if counts[0] < 6 else ""
        found.append(f"{letter} - A is paired by seed; the sign-flip test of {counts[0]} pairs has p = {p:.2g}{never}")
    return found


def _options(run: Run) -> dict[str, Any]:
    """Return the options of a configuration by path, without those that only name the run."""
    found: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, each in value.items():
                add(f"{path}.{name}" if path else str(name), each)
        else:
            found[path.replace(".init_args", "").replace(".class_path", "")] = value

    add("", {name: value for name, value in run.config.items() if name not in _BOOKKEEPING})
    return found


def _differing_options(sides: Sequence[Side]) -> dict[str, list[str]]:
    """Return the options that differ between the first runs of sides, as text; `-` if a side has no such option."""
    every = [_options(side.runs[0]) for side in sides]
    names = dict.fromkeys(name for options in every for name in options)
    differing = {}
    for name in names:
        texts = [_text(options[name]) if name in options else "-" for options in every]
        if len(set(texts)) > 1:
            differing[name] = texts
    if all(len(side.runs) == 1 for side in sides):
        seeds = [_text(side.runs[0].seed) for side in sides]
        if len(set(seeds)) > 1:
            differing["seed_everything"] = seeds
    return differing


def _text(value: Any) -> str:
    """Return a value of a configuration as short text; of a class path the name."""
    if isinstance(value, str) and value.replace(".", "").replace("_", "").isalnum() and value.count(".") > 1:
        return value.rpartition(".")[2]
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def _within(metric: str, found: Interval) -> Interval:
    """Return an interval within the range of its metric."""
    low = max(found.low, 0.0) if metric in _SHARES else found.low
    high = min(found.high, 1.0) if metric in _SHARES else found.high
    return Interval(found.value, low, high)
