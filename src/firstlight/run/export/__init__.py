"""Write a checkpoint for other programs, with its preparation of inputs: ONNX, pt2 or safetensors, and a model card."""

import json
import math
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from firstlight.checkpoints.io import has_seen_validation, read_checkpoint_metrics
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError, emit, say
from firstlight.run import directory
from firstlight.run.evaluate import choose_checkpoint
from firstlight.run.experiment import Experiment
from firstlight.run.export.card import model_card
from firstlight.run.export.formats import FORMATS, Format
from firstlight.run.predictor import restore
from firstlight.tasks import Task

TOLERANCE = 1e-4
"""Largest difference to the original that is written, as a share of the largest output."""


class Exported(nn.Module):
    """Map raw numbers to named predictions: a data module's preparation, then a task's network.

    Args:
        datamodule: After a checkpoint was loaded.
        task: The same.
    """

    def __init__(self, datamodule: DataModule, task: Task) -> None:
        super().__init__()
        self.preparation = datamodule.preparation()
        self.task = task

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs of `Task.export_step` for raw numbers `(B, ...)`."""
        return self.task.export_step(self.preparation(inputs))


def export(experiment: Experiment, to: str, ckpt: str | None) -> None:
    """Write a checkpoint in a format to a new folder in `exports/`, if it predicts the test split as the original does.

    Raises:
        UsageError: If the model cannot be exported, or a package is missing.
        TrainingError: If predictions differ by more than `TOLERANCE`. Then no file stays.
    """
    task, datamodule = experiment.task, experiment.datamodule
    for part, kind in ((task, Task), (datamodule, DataModule)):
        if not isinstance(part, kind):
            raise UsageError(f"{type(part).__name__} cannot be exported: it must be a firstlight {kind.__name__}")
    assert isinstance(task, Task) and isinstance(datamodule, DataModule)
    form = FORMATS[to]
    form.check_installed()
    path = choose_checkpoint("export", experiment.run_dir, ckpt, "best" if experiment.monitored else "last")
    emit("start", verb="export", checkpoint=str(path))
    restore(task, datamodule, path)
    model = Exported(datamodule, task).eval()
    sample = datamodule.raw_numbers("test", np.arange(2) % len(datamodule.dataset("test")))
    with torch.no_grad():
        names = [*model(sample)]
    description = _describe(experiment, datamodule, sample, names)
    parent = (experiment.run_dir or experiment.experiment_dir) / "exports"
    folder = directory.make_unique(parent, f"{to}-{directory.timestamp()}")
    try:
        file = folder / f"model.{form.suffix}"
        with directory.atomic(file, "wb") as stream:
            form.write(model, sample, description, stream)
        differences = _differences(model, datamodule, form, file)
        name = max(differences, key=lambda each: (math.isnan(differences[each]), differences[each]))
        largest = differences[name]
        if not largest <= TOLERANCE:
            raise TrainingError(
                f"the {to} file differs from the checkpoint in {name} by {largest:.2g}, a share of its largest value "
                f"or of its integers, on the test split; at most {TOLERANCE:g} is right: nothing was written"
            )
        directory.write_text(folder / "model.json", json.dumps(description, indent=2) + "\n")
        facts = _facts(experiment, datamodule, path, largest)
        directory.write_text(folder / "model_card.md", model_card(description, form, facts))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            parent.rmdir()
        raise
    count = len(datamodule.dataset("test"))
    say(f"export   largest difference {largest:.2g} on {count:,} test samples ({path})")
    say(f"wrote    {file}", always=True)
    emit("end", verb="export", wrote=str(file), checkpoint=str(path), largest_difference=largest)


def _describe(experiment: Experiment, datamodule: DataModule, sample: Tensor, outputs: list[str]) -> dict[str, Any]:
    """Return what a program must know to use the file: plain values."""
    shape = ["batch", "length"] if is_dynamic(sample) else ["batch", *sample.shape[1:]]
    return {
        "task": type(experiment.task).__name__,
        "network": type(experiment.task.network).__name__,
        "inputs": {
            "shape": shape,
            "dtype": str(sample.dtype).removeprefix("torch."),
            "meaning": _meaning(sample),
            "columns": datamodule.columns_described(),
        },
        "outputs": outputs,
        "class_names": datamodule.class_names,
        "targets": datamodule.fitted["columns"][len(datamodule.columns_described()) :],
        "versions": {name: directory.version_of(name) for name in ("firstlight", "torch")},
    }


def is_dynamic(inputs: Tensor) -> bool:
    """Return whether samples may have any length: they are tokens."""
    return inputs.dtype == torch.int64


def _meaning(inputs: Tensor) -> str:
    if is_dynamic(inputs):
        return "tokens: a byte of the text plus 1, 0 is padding at the end"
    if inputs.dtype == torch.uint8:
        return "pixels from 0 to 255, (channels, height, width)"
    return "numbers in the units of the training data, NaN is missing"


def _differences(model: Exported, datamodule: DataModule, form: Format, file: Path) -> dict[str, float]:
    """Return by output how much the file differs from the original on the test split.

    For numbers, it is the largest difference as a share of the largest number of a batch; for integers, the share of
    those that differ, because rounding decides between equal classes. Outputs of other names or shapes differ by
    infinity.
    """
    loaded = form.load(file, model)
    dataset = datamodule.dataset("test")
    largest: dict[str, float] = {}
    different: Counter[str] = Counter()
    integers: Counter[str] = Counter()
    size = datamodule.batch_size
    for positions in np.split(np.arange(len(dataset)), range(size, len(dataset), size)):
        prepared, _ = datamodule.on_after_batch_transfer(dataset.__getitems__(positions.tolist()), 0)
        raw = datamodule.raw_numbers("test", positions)
        found: dict[str, Any] = {name: np.asarray(each) for name, each in loaded(raw).items()}
        compared = [(prepared, found)]
        if is_dynamic(raw) and prepared.shape[1] < raw.shape[1]:
            # A batch has less padding than the raw samples, so its outputs may be shorter.
            one_length = {name: _first_tokens(each, prepared.shape[1], raw.shape[1]) for name, each in found.items()}
            compared = [(raw, found), (prepared, one_length)]
        for inputs, others in compared:
            with torch.inference_mode():
                expected = {name: each.numpy() for name, each in model.task.export_step(inputs).items()}
            for name in expected.keys() ^ others.keys():
                largest[name] = math.inf
            for name in expected.keys() & others.keys():
                wanted, other = expected[name], others[name]
                largest.setdefault(name, 0.0)
                if wanted.shape != other.shape:
                    largest[name] = math.inf
                elif wanted.dtype.kind in "biu":
                    different[name] += int((wanted != other).sum())
                    integers[name] += wanted.size
                elif wanted.size:
                    wanted = wanted.astype(np.float64)
                    difference = np.abs(other - wanted).max() / (np.abs(wanted).max() or 1)
                    largest[name] = float(np.maximum(largest[name], difference))  # NaN stays.
    return largest | {name: different[name] / count for name, count in integers.items() if count}


def _first_tokens(values: NDArray[Any], length: int, whole: int) -> NDArray[Any]:
    """Return the values of the first tokens if there is one for each, `(B, whole, ...)`; others as they are."""
    return values[:, :length] if values.ndim > 1 and values.shape[1] == whole else values


def _facts(experiment: Experiment, datamodule: DataModule, checkpoint: Path, largest: float) -> dict[str, Any]:
    """Return what the model card tells beside the description."""
    results: dict[str, Any] = {}
    if experiment.run_dir is not None:
        with suppress(UsageError):  # A run that was only fitted, or is not finished, has none.
            results = directory.read_results(experiment.run_dir)
    has_seen = has_seen_validation(checkpoint)
    validated = checkpoint.with_name("best.ckpt") if has_seen else checkpoint
    tested = (experiment.run_dir or Path()) / str(results.get("checkpoint"))
    return {
        "name": experiment.experiment_dir.name,
        "data": type(datamodule).__name__,
        "splits": {str(split): len(rows) for split, rows in datamodule.indices.items() if len(rows)},
        "validation": read_checkpoint_metrics(validated) if validated.is_file() else {},
        "refit_steps": read_checkpoint_metrics(checkpoint)["step"] if has_seen else None,
        "test": results.get("metrics", {}) if tested.resolve() == checkpoint.resolve() else {},
        "findings": results.get("findings", []),
        "config": yaml.safe_load(experiment.config),
        "largest": largest,
    }
