"""A group: repetitions of one run with other seeds, or the folds of a cross-validation.

Each repetition is an ordinary run directory. Its `group.json` holds the name of the group, its kind, and the index and
the number of the repetitions.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from firstlight.errors import UsageError, aligned
from firstlight.insight.intervals import mean_interval
from firstlight.run import directory
from firstlight.run.resume import config_diff

Kind = Literal["seeds", "folds"]

_MAX_TEST_METRICS = 3


@dataclass(frozen=True)
class Repetitions:
    """What a command repeats.

    Args:
        kind: `"seeds"` or `"folds"`.
        count: Number of repetitions, at least 2.
        seed: Seed of the first repetition; each of the others has the next one.
    """

    kind: Kind
    count: int
    seed: int

    def options(self, index: int) -> list[str]:
        """Return the options of a repetition.

        >>> Repetitions("folds", 5, seed=7).options(2)
        ['--seed_everything=9', '--data.folds=5', '--data.fold=2']
        """
        folds = [f"--data.folds={self.count}", f"--data.fold={index}"] if self.kind == "folds" else []
        return [f"--seed_everything={self.seed + index}", *folds]

    def label(self, index: int) -> str:
        """Return the name of a repetition in messages.

        >>> Repetitions("seeds", 5, seed=7).label(2)
        'seed 9'
        """
        return f"seed {self.seed + index}" if self.kind == "seeds" else f"fold {index}"


def find_group(experiment: Path, repetitions: Repetitions, config: Mapping[str, Any]) -> tuple[str, dict[int, Path]]:
    """Return the name and the runs of the newest group of an experiment that a command continues; `""` without one.

    The runs are by index. Of several runs of a repetition, it is the one that is finished, or else the newest one that
    can be resumed.

    Args:
        experiment: Folder of the experiment.
        repetitions: What the command repeats.
        config: Configuration of the command.

    Raises:
        UsageError: When there are groups, but all of them have other options.
    """
    groups: dict[str, dict[int, Path]] = {}
    for run in directory.started_runs(experiment):
        group = directory.read_group(run)
        if not group or group["kind"] != repetitions.kind:
            continue
        runs = groups.setdefault(group["name"], {})
        kept = runs.get(group["index"])
        if not (kept and (is_finished(kept) or not _can_resume(run))):
            runs[group["index"]] = run
    other = ""
    for name, runs in sorted(groups.items(), reverse=True):
        different = _difference(runs, repetitions, config)
        if not different:
            return name, {index: run for index, run in runs.items() if is_finished(run) or _can_resume(run)}
        other = other or different
    if other:
        raise UsageError(
            f"no group of {repetitions.kind} in {experiment} has the options of this command: {other}; leave --resume "
            "out to start another group"
        )
    return "", {}


def is_finished(run: Path) -> bool:
    """Return whether a run has been trained and tested."""
    return directory.is_finished(run) and bool(directory.read_results(run)["metrics"])


def _can_resume(run: Path) -> bool:
    return (run / "checkpoints" / "last.ckpt").is_file()


def _difference(runs: Mapping[int, Path], repetitions: Repetitions, config: Mapping[str, Any]) -> str:
    """Return how the runs of a group differ from what a command repeats, or `""`."""
    if len(runs) and max(runs) >= repetitions.count:
        return f"the newest has {max(runs) + 1} of them, and not {repetitions.count}"
    for index, run in runs.items():
        saved = directory.load_config(run)
        now = {**config, "seed_everything": repetitions.seed + index, "runs": saved.get("runs")}
        if repetitions.kind == "folds":
            options = {**config["data"]["init_args"], "folds": repetitions.count, "fold": index}
            now["data"] = {**config["data"], "init_args": options}
        for path, (before, value) in config_diff(saved, now).items():
            return f"{path} of {run} is {before}, and not {value}"
    return ""


def statistics(repetitions: Repetitions, runs: Collection[Path]) -> dict[str, dict[str, Any]]:
    """Return by metric its `mean`, its standard deviation `std`, and the 95 % `interval` of the mean, as two numbers.

    The test metrics of folds have no interval: None. All folds share the test samples, and each two folds most training
    samples, so the differences between folds do not tell how far the mean is from that of other samples.

    Args:
        repetitions: What was repeated.
        runs: The finished runs, at least 2.
    """
    found: dict[str, dict[str, Any]] = {}
    splits = [_metrics(run) for run in runs]
    overlap = 1 / (repetitions.count - 1) if repetitions.kind == "folds" else 0.0
    for place, is_test in enumerate((False, True)):
        for name in splits[0][place]:
            values = [split[place].get(name, nan) for split in splits]
            has_interval = not (is_test and repetitions.kind == "folds") and all(map(isfinite, values))
            found[name] = {
                "mean": fmean(values),
                "std": stdev(values) if all(map(isfinite, values)) else nan,
                "interval": mean_interval(values, overlap) if has_interval else None,
            }
    return found


def table(repetitions: Repetitions, runs: Mapping[int, Path], monitor: str) -> list[str]:
    """Return a line for each finished run, with `monitor` and the first test metrics."""
    found = {index: _metrics(run) for index, run in sorted(runs.items())}
    tests = [*next(iter(found.values()))[1]][:_MAX_TEST_METRICS]
    rows = [["", monitor, *tests, "run"]]
    for index, (best, test) in found.items():
        values = [best.get(monitor, nan), *(test.get(name, nan) for name in tests)]
        rows.append([repetitions.label(index), *(f"{value:.6g}" for value in values), str(runs[index])])
    return aligned(rows)


def means(repetitions: Repetitions, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each metric of `statistics`, and what the intervals are.

    >>> found = {"val/loss": {"mean": 0.5, "std": 0.01, "interval": (0.4, 0.6)}}
    >>> for line in means(Repetitions("seeds", 3, 0), found):
    ...     print(line)
              mean  std   95 % interval
    val/loss  0.5   0.01  0.4 to 0.6
    interval  of the mean, Student's t; the split stays the same, so its chance is not in it
    """
    rows = [["", "mean", "std", "95 % interval"]]
    for name, each in found.items():
        ends = each["interval"]
        shown = f"{ends[0]:.6g} to {ends[1]:.6g}" if ends else "-"
        rows.append([name, f"{each['mean']:.6g}", f"{each['std']:.3g}", shown])
    kinds = {
        "seeds": "Student's t; the split stays the same, so its chance is not in it",
        "folds": "Nadeau and Bengio's; none for test metrics, because all folds share the test samples",
    }
    return [*aligned(rows), f"interval  of the mean, {kinds[repetitions.kind]}"]


def _metrics(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the validation metrics of the best checkpoint of a run, and its test metrics."""
    results = directory.read_results(run)
    best = {name: value for name, value in results["best"].items() if name not in ("epoch", "step")}
    return best, results["metrics"]
