"""Write the report of a run into its directory, from what the run has recorded."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.insight.record import SeriesReader
from firstlight.insight.report import Line, Run, markdown, page, worst
from firstlight.run import directory
from firstlight.run.outputs import outputs_path, read_outputs

Format = Literal["html", "md"]

_EXAMPLES = "outputs/examples.json"
"""Samples of the run that were predicted badly, which a later report shows without the data."""


def write(folder: Path, kind: Format = "html") -> Path:
    """Write `report.html`, or `report.md` with its charts in `report/`, and return its path.

    Raises:
        UsageError: When the run has no results, or the file cannot be written.
    """
    run, config = _read(folder), directory.read_config(folder)
    if kind == "html":
        directory.write_text(folder / "report.html", page(run, folder, config))
        return folder / "report.html"
    text, charts = markdown(run, folder, config)
    with suppress(FileExistsError):
        (folder / "report").mkdir()
    for name, chart in charts.items():
        directory.write_text(folder / "report" / name, chart)
    directory.write_text(folder / "report.md", text)
    return folder / "report.md"


def keep_examples(folder: Path, results: Mapping[str, Any], data: Any) -> None:
    """Store the samples that a run with these results predicted badly, as a report shows them."""
    if not isinstance(data, DataModule):
        return
    run = read_run(folder, results, data)
    if run.shown:
        samples = {str(position): sample for position, sample in run.shown.items()}
        examples = {"split": worst(run)[0], "samples": samples}
        directory.write_text(folder / _EXAMPLES, json.dumps(examples))


def read_run(folder: Path, results: Mapping[str, Any], data: DataModule) -> Run:
    """Return a run without its series, with the samples that it predicted badly."""
    outputs = _outputs(folder)
    run = Run({}, results, outputs, _class_names(results, outputs))
    split, positions = worst(run)
    if not len(positions):
        return run
    places = {row: place for place, row in enumerate(data.rows(split).tolist())}  # type: ignore[arg-type]
    rows = outputs[split]["index"][positions].tolist()  # Targets that do not count have no outputs.
    shown = data.show(split, [places[row] for row in rows])  # type: ignore[arg-type]
    return replace(run, shown=dict(zip(positions.tolist(), shown, strict=True)))


def _read(folder: Path) -> Run:
    if not (folder / "results.json").is_file():
        raise UsageError(f"{folder} has no results.json yet: a report needs a run that has ended")
    results, outputs = directory.read_results(folder), _outputs(folder)
    shown: dict[int, Mapping[str, Any]] = {}
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # A report without pictures is one.
        examples = json.loads((folder / _EXAMPLES).read_text(encoding="utf-8"))
        if examples["split"] == ("test" if "test" in outputs else "val"):
            shown = {int(position): dict(sample) for position, sample in examples["samples"].items()}
    return Run(_series(folder), results, outputs, _class_names(results, outputs), shown)


def _outputs(folder: Path) -> dict[str, Mapping[str, Any]]:
    return {split: read_outputs(folder, split) for split in ("val", "test") if outputs_path(folder, split).is_file()}


def _class_names(results: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the classes, or their indices."""
    kinds = [each["kind"] for each in outputs.values()]
    if names := [*results.get("per_class", {})]:
        return names
    if "binary" in kinds:
        return ["0", "1"]
    counts = [each["outputs"].shape[1] for each in outputs.values() if each["kind"] == "classes" and "outputs" in each]
    return [str(index) for index in range(max(counts, default=0))]


def _series(folder: Path) -> dict[str, Line]:
    """Return the completed steps, as `results.json` counts them, and the finite values of each logged number."""
    found = {}
    for name, series in SeriesReader(folder / "metrics.csv").read().items():
        is_finite = np.isfinite(series.values)
        if is_finite.any():
            found[name] = series.steps[is_finite] + 1, series.values[is_finite]
    return found
