"""The run directory: create it, find it, read and write its files.

A run is in `ROOT/EXPERIMENT/TIME/`. `ROOT/EXPERIMENT/latest` is a text file with the name of the newest run.
"""

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from firstlight.errors import UsageError, did_you_mean

CHECKPOINTS = ("best", "last", "final", "refit")
"""Names of the checkpoints of a run."""

PER_COMMAND = {
    "run": None,
    "ckpt": None,
    "resume": False,
    "allow_inexact": False,
    "trust": None,
    "to": None,
    "seeds": None,
    "folds": None,
    "quiet": False,
    "json": False,
    "verbose": False,
    "plot": None,
    "space": None,
    "tries": None,
    "trials": None,
    "jobs": None,
    "storage": None,
    "apply": False,
    "output": None,
}
"""Options of one command with their defaults; `config.yaml` of a run does not keep what was given."""

_MOST_CHARACTERS, _MOST_VALUES = 1_000_000, 100_000


def create(root: Path, experiment: str) -> Path:
    """Create a new run directory `root/experiment/TIME`, write its name to `latest`, and return it.

    Raises:
        UsageError: When `experiment` is not a folder name, or the directory cannot be created or written.
    """
    if experiment in ("", "..") or experiment != Path(experiment).name:
        raise UsageError(f"experiment {experiment!r} is not a folder name")
    run = make_unique(root / experiment, timestamp())
    try:
        write_text(root / experiment / "latest", run.name + "\n")
    except UsageError:
        discard(run)
        raise
    return run


def discard(run: Path) -> None:
    """Remove a run that never started, and folders that become empty; let `latest` name the newest started run."""
    with suppress(OSError, UsageError):  # A disk that fails must not hide why the run is discarded.
        shutil.rmtree(run)
        started = started_runs(run.parent)
        if started:
            write_text(run.parent / "latest", started[-1].name + "\n")
        else:
            (run.parent / "latest").unlink(missing_ok=True)
        for folder in (run.parent, run.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()


def lock(run: Path) -> AbstractContextManager[object]:
    """Lock a run, so that no other process trains it until the returned context or this process ends.

    Raises:
        UsageError: When another process is training the run, or its `.lock` cannot be written.
    """
    try:
        return FileLock(run / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"another process is training {run}: wait for it, or start a new run") from error
    except (OSError, NotImplementedError) as error:  # A file system may have no locks.
        raise UsageError(f"cannot lock {run / '.lock'}: {_reason(error)}") from error


def logged_steps(run: Path) -> int:
    """Return the number of optimiser steps up to the last line of `metrics.csv`; 0 without that file."""
    path = run / "metrics.csv"
    if not path.is_file():
        return 0
    # The last line of a killed run may be incomplete, and a damaged file must not prevent a resume.
    with suppress(OSError, csv.Error), path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        steps = [row.get("step") or "" for row in rows if row.get("value")]
        return max((int(step) + 1 for step in steps if re.fullmatch(r"[0-9]{1,18}", step)), default=0)
    return 0


def make_unique(parent: Path, name: str) -> Path:
    """Create the folder `parent/name`, or `name-1`, `name-2`, ... if it exists, and return it.

    Raises:
        UsageError: When the folder cannot be created.
    """
    number = 0
    while True:
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            # A parent that is a broken link raises FileExistsError too.
            if not (isinstance(error, FileExistsError) and folder.exists()):
                raise UsageError(f"cannot create the folder {folder}: {error.strerror}") from error
            number += 1


def timestamp() -> str:
    """Return the local time as a name that sorts: `2026-01-31_09-30-05`."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def find(run: Path) -> Path:
    """Return the directory of an existing run for its path, or for a path that ends in `latest`.

    Raises:
        UsageError: When there is no such run, with a close name if there is one.
    """
    found = run.parent / _latest(run) if run.name == "latest" and run.is_file() else run
    if (found / "config.yaml").is_file():
        return found
    if found.is_dir():
        latest = f"; its newest run is {found / 'latest'}" if (found / "latest").is_file() else ""
        raise UsageError(f"{found} is not a run, because it has no config.yaml{latest}")
    if found.exists() or found.name == "config.yaml":
        raise UsageError(f"{found} is a file: give the folder of the run, {found.parent}")
    near = found.parent
    while not near.is_dir():
        near = near.parent
    missing = near / found.relative_to(near).parts[0]
    if os.path.lexists(missing):  # For example a broken link.
        raise UsageError(f"there is no run {run}: {missing} is not a folder")
    known = [child.name for child in near.iterdir() if not child.name.startswith(".")]
    raise UsageError(f"there is no run {run}: {missing} does not exist{did_you_mean(missing.name, known)}")


def _latest(path: Path) -> str:
    """Return the name of the run that a file `latest` holds."""
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}; give the folder of the run") from error
    if name in ("", "..") or name != Path(name).name or not name.isprintable() or len(name) > 200:
        raise UsageError(f"{path} does not hold the name of a run; give the folder of the run")
    return name


def find_resumable(experiment: Path) -> Path | None:
    """Return the newest started run of an experiment, if it has a last checkpoint."""
    runs = started_runs(experiment)
    return runs[-1] if runs and (runs[-1] / "checkpoints" / "last.ckpt").is_file() else None


def started_runs(experiment: Path) -> list[Path]:
    """Return the runs of an experiment that have started training, oldest first: `TIME`, `TIME-1`, ... `TIME-10`."""
    runs = [path.parent for path in experiment.glob("*/config.yaml")]
    return sorted(runs, key=lambda run: (run.name[:19], len(run.name), run.name))


def checkpoint(run: Path, name: str) -> Path:
    """Return the path of the checkpoint `name` of a run, one of `CHECKPOINTS`.

    Raises:
        UsageError: When the run has no such checkpoint.
    """
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        written = ", ".join(sorted(file.name for file in path.parent.glob("*.ckpt") if file.is_file())) or "none"
        raise UsageError(f"{run} has no {name} checkpoint; its checkpoints: {written}")
    return path


def write_config(run: Path, text: str) -> None:
    """Write `config.yaml` of a run; a different earlier file is kept under another name."""
    _write_and_keep(run / "config.yaml", text)


def read_config(run: Path) -> str:
    """Return `config.yaml` of a run, or raise a `UsageError` if it cannot be read."""
    path = run / "config.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}") from error


def load_config(run: Path) -> dict[str, Any]:
    """Return the options in `config.yaml` of a run, or raise a `UsageError` if it is damaged."""
    path = run / "config.yaml"
    refuse_huge_yaml(path)
    try:
        config = yaml.safe_load(read_config(run))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a YAML file: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no configuration")
    return config


def refuse_huge_yaml(path: Path) -> None:
    """Refuse a configuration file that would take forever to parse: too long, too deep, or with aliases that expand.

    Other faults of the file are left to the parser.
    """
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        """Return how many values a node has after its aliases are expanded; infinite for a node within itself."""
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")
            inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, inner)))
        return sizes[id(node)]

    try:
        with path.expanduser().open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)  # It may be a device without an end.
        if len(text) > _MOST_CHARACTERS:
            raise UsageError(f"{path} has more than {_MOST_CHARACTERS:,} characters: it is not a configuration")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and size(node) > _MOST_VALUES:
            raise UsageError(f"{path} holds YAML aliases that expand to more than {_MOST_VALUES:,} values")
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a YAML file: {error}") from error
    except (OSError, ValueError, yaml.YAMLError):
        return


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if it is imported from its source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results`, group and package versions to `results.json`.

    A different earlier file gets another name, unless it is that of a run that failed or was stopped.
    """
    packages = ("firstlight", "torch", "lightning", "torchmetrics", "scikit-learn")
    versions = {"python": python_version(), **{package: version_of(package) for package in packages}}
    group = read_group(folder)
    every = {**results, **({"group": group} if group else {}), "versions": versions}
    path, text = folder / "results.json", json.dumps(every, indent=2) + "\n"
    is_unfinished = False
    with suppress(UsageError):  # A damaged file is kept.
        is_unfinished = path.is_file() and not is_finished(folder)
    if is_unfinished:
        write_text(path, text)
    else:
        _write_and_keep(path, text)


def read_results(folder: Path) -> dict[str, Any]:
    """Return the content of `results.json`, or raise a `UsageError` if it is damaged."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {_reason(error)}; remove it") from error
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise UsageError(f"{path} holds no results with metrics; remove it")
    return results


def refuse_mixed_data(runs: Iterable[Path]) -> None:
    """Refuse to put runs together that were trained on different data, where data modules of firstlight know it."""
    digests = {run: read_results(run).get("data_digest") for run in runs if is_finished(run)}
    known = [(run, digest) for run, digest in digests.items() if digest is not None]
    for run, digest in known[1:]:
        if digest != known[0][1]:
            raise UsageError(f"{run} was trained on other data than {known[0][0]}: start anew, or restore the data")


def is_finished(run: Path) -> bool:
    """Return whether a run has results, and neither failed nor was stopped."""
    return (run / "results.json").is_file() and "error" not in read_results(run)


def write_group(run: Path, group: Mapping[str, Any]) -> None:
    """Write the place of a run in its group of repetitions to `group.json`, and to `results.json` if there is one.

    A killed run has no `results.json`, so that file alone could not tell which repetition to resume.
    """
    if read_group(run) == group:
        return
    write_text(run / "group.json", json.dumps(group) + "\n")
    if (run / "results.json").is_file():
        results = {**read_results(run), "group": group}
        write_text(run / "results.json", json.dumps(results, indent=2) + "\n")


def read_group(run: Path) -> dict[str, Any] | None:
    """Return the place of a run in its group of repetitions: its `name`, `kind`, `index` and `count`; None without."""
    with suppress(OSError, ValueError, RecursionError):
        group = json.loads((run / "group.json").read_text(encoding="utf-8"))
        kinds = {"name": str, "kind": str, "index": int, "count": int}
        if isinstance(group, dict) and all(isinstance(group.get(key), kind) for key, kind in kinds.items()):
            return group
    return None


def write_predictions(
    folder: Path,
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    class_names: Sequence[str],
    files: Sequence[str] = (),
) -> Path:
    """Write `predictions.csv` with one line per sample, and return its path.

    Args:
        folder: The folder of the file.
        columns: One value per sample by name. A list of values becomes several columns, named by the classes if
            there is one value per class.
        rows: Index of each sample in the data, from 0.
        class_names: Names to write instead of class indices; empty if there are no classes.
        files: Path of the file of each sample; empty if samples have no files.
    """
    series: dict[str, Sequence[Any]] = {"index": rows}
    if files:
        # The name of a file may hold bytes that are not UTF-8.
        series["file"] = [file.encode(errors="surrogateescape").decode(errors="backslashreplace") for file in files]
    series |= named_columns(columns, class_names)
    path = folder / "predictions.csv"
    with atomic(path) as file:
        csv.writer(file).writerows([[*series], *zip(*series.values(), strict=True)])
    return path


def named_columns(columns: Mapping[str, Sequence[Any]], class_names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Return predictions with one value per sample in each column, and names in place of class indices.

    The arguments are those of `write_predictions`.
    """

    def named(value: Any) -> Any:
        return class_names[value] if class_names and isinstance(value, int) else value

    found: dict[str, Sequence[Any]] = {}
    for name, values in columns.items():
        if values and isinstance(values[0], list):
            per_class = name == "probabilities" or len(values[0]) == len(class_names)
            for index, each in enumerate(zip(*values, strict=True)):
                found[f"{name}/{named(index) if per_class else index}"] = each
        else:
            found[name] = [named(value) for value in values]
    return found


def _write_and_keep(path: Path, text: str) -> None:
    """Write a file. A different earlier one, of a resumed run, is kept as `NAME-until-TIME`."""
    with atomic(path) as file:
        file.write(text)
        file.flush()  # On a full disk it fails here, and the earlier file keeps its name.
        if path.is_file() and path.read_bytes() != text.encode():
            kept = path.with_name(f"{path.stem}-until-{timestamp()}{path.suffix}")
            while kept.exists():
                kept = kept.with_stem(kept.stem + "+")
            try:
                kept.hardlink_to(path)
            except OSError:  # A file system may have no links.
                path.rename(kept)


def write_text(path: Path, text: str) -> None:
    """Write a file, so that a reader never sees half of it; or raise a `UsageError` if the disk fails."""
    with atomic(path) as file:
        file.write(text)


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a temporary file and move it into place, so that a reader never sees half a file.

    Args:
        path: The file.
        mode: `"w"` for text, `"wb"` for bytes.

    Raises:
        UsageError: When the disk is full or fails. No temporary file stays.
    """
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with beside.open(mode, newline=None if "b" in mode else "", encoding=None if "b" in mode else "utf-8") as file:
            yield file
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"cannot write {path}: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    """Return in one line why a file cannot be read or written."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
