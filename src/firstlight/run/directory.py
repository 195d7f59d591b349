"""The run directory: make it, find it, find its checkpoints.

A run lives in `ROOT/EXPERIMENT/TIME/`; `ROOT/EXPERIMENT/latest` is a text file that holds the newest run's name.
"""

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from filelock import FileLock, Timeout

from firstlight.errors import UsageError, did_you_mean

__all__ = [
    "checkpoint",
    "create",
    "discard",
    "find",
    "last_step",
    "lock",
    "make_unique",
    "read_config",
    "unfinished",
    "write_config",
    "write_predictions",
    "write_results",
]


def create(root: Path, experiment: str) -> Path:
    """Make a new run directory and point `latest` at it.

    Args:
        root: The folder of all experiments; made when it is missing.
        experiment: Name of the experiment, one folder below `root`.

    Returns:
        `root/experiment/TIME`, which did not exist before.

    Raises:
        UsageError: When it cannot be made or written.
    """
    if experiment in ("", "..") or experiment != Path(experiment).name:
        raise UsageError(f"experiment {experiment!r} is no name of a folder")
    run = make_unique(root / experiment, timestamp())
    latest = root / experiment / "latest"
    try:
        _replace(latest, run.name + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {latest}: {error.strerror}") from error
    return run


def discard(run: Path) -> None:
    """Remove a run that was made but never started, and what was made for it alone; mend `latest`."""
    shutil.rmtree(run)
    left = _begun(run.parent)
    if left:
        _replace(run.parent / "latest", left[-1].name + "\n")
    else:
        (run.parent / "latest").unlink()
    for folder in (run.parent, run.parent.parent):
        if not any(folder.iterdir()):
            folder.rmdir()


def lock(run: Path) -> FileLock:
    """Keep other processes from training the same run, until the lock is released or this process ends.

    Raises:
        UsageError: When another process trains it.
    """
    held = FileLock(run / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"another process is training {run}") from error
    return held


def last_step(run: Path) -> int:
    """Return the number of optimiser steps that `metrics.csv` knows of, 0 where there is none."""
    path = run / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        # A killed run may leave half a line.
        return max((int(row["step"]) + 1 for row in csv.DictReader(file) if row["value"]), default=0)


def make_unique(parent: Path, name: str) -> Path:
    """Make the folder `parent/name`, or `name-1`, `name-2`, ... when others were made in the same instant.

    Raises:
        UsageError: When the folder cannot be made.
    """
    number = 0
    while True:
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            # A parent that is a link to nowhere exists as well.
            if not folder.exists():
                raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
            number += 1
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error


def timestamp() -> str:
    """Return the local time as a name that sorts: `2026-01-31_09-30-05`."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def find(run: Path) -> Path:
    """Return the directory of a run that exists.

    Args:
        run: A run directory, or a path that ends in `latest`.

    Raises:
        UsageError: When it is not there; close names beside it are offered.
    """
    found = run.parent / run.read_text().strip() if run.name == "latest" and run.is_file() else run
    if (found / "config.yaml").is_file():
        return found
    if found.is_dir():
        latest = f"; its newest is {found / 'latest'}" if (found / "latest").is_file() else ""
        raise UsageError(f"{found} is no run: it has no config.yaml{latest}")
    if found.is_file() or found.name == "config.yaml":
        raise UsageError(f"{found} is a file: give the folder of the run, {found.parent}")
    near = found.parent
    while not near.is_dir():
        near = near.parent
    missing = near / found.relative_to(near).parts[0]
    known = [child.name for child in near.iterdir() if not child.name.startswith(".")]
    raise UsageError(f"there is no run {run}: {missing} does not exist{did_you_mean(missing.name, known)}")


def unfinished(experiment: Path) -> Path | None:
    """Return the newest run of an experiment that has begun, if it has a last checkpoint to go on from."""
    begun = _begun(experiment)
    return begun[-1] if begun and (begun[-1] / "checkpoints" / "last.ckpt").is_file() else None


def _begun(experiment: Path) -> list[Path]:
    """Return the runs of an experiment that have begun, in their order: `TIME`, `TIME-1`, ... `TIME-10`."""
    begun = [path.parent for path in experiment.glob("*/config.yaml")]
    return sorted(begun, key=lambda run: (run.name[:19], len(run.name), run.name))


def checkpoint(run: Path, name: str) -> Path:
    """Return the path of a checkpoint of a run.

    Args:
        run: The run directory.
        name: `"best"` or `"last"`.

    Raises:
        UsageError: When the run has not written it.
    """
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        written = ", ".join(sorted(file.name for file in path.parent.glob("*.ckpt"))) or "none"
        raise UsageError(f"{run} has no {name} checkpoint; its checkpoints: {written}")
    return path


def write_config(run: Path, text: str) -> None:
    """Write `config.yaml` of a run."""
    _keep_and_write(run / "config.yaml", text)


def read_config(run: Path) -> str:
    """Return `config.yaml` of a run."""
    return (run / "config.yaml").read_text(encoding="utf-8")


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` with `results` and the versions of what made them."""
    packages = ("firstlight", "torch", "lightning", "torchmetrics", "scikit-learn")
    versions = {"python": python_version(), **{package: version(package) for package in packages}}
    _keep_and_write(folder / "results.json", json.dumps({**results, "versions": versions}, indent=2) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """Return what `results.json` holds."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results


def write_predictions(
    folder: Path, columns: Mapping[str, Sequence[Any]], rows: Sequence[int], class_names: Sequence[str]
) -> Path:
    """Write `predictions.csv`, a line a sample with its index, prediction, probabilities and target; return its path.

    Args:
        folder: Where to write.
        columns: By name, a value a sample; a list of values becomes a column each, named by the classes where
            there are as many.
        rows: Index of each sample in the data, from 0.
        class_names: Stand for class indices; empty where there are none.
    """

    def named(value: Any) -> Any:
        return class_names[value] if class_names and isinstance(value, int) else value

    header, series = ["index"], [rows]
    for name, values in columns.items():
        if values and isinstance(values[0], list):
            per_class = name == "probabilities" or len(values[0]) == len(class_names)
            header += [f"{name}/{named(i) if per_class else i}" for i in range(len(values[0]))]
            series += zip(*values, strict=True)
        else:
            header.append(name)
            series.append([named(value) for value in values])
    path = folder / "predictions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *zip(*series, strict=True)])
    return path


def _keep_and_write(path: Path, text: str) -> None:
    """Write a file; where a run that goes on has another one, that is kept under the time of the change."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        kept = path.with_name(f"{path.stem}-until-{timestamp()}{path.suffix}")
        while kept.exists():
            kept = kept.with_stem(kept.stem + "+")
        path.rename(kept)
    _replace(path, text)


def _replace(path: Path, text: str) -> None:
    """Write beside the path and move into place, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
