"""Evaluate a checkpoint: choose it, then validate, test or predict with it in one process."""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from firstlight.callbacks import Progress
from firstlight.callbacks.graceful_shutdown import interruptible
from firstlight.checkpoints.io import has_seen_validation, raise_fault
from firstlight.data import DataModule
from firstlight.errors import UsageError, did_you_mean, emit, is_users, say
from firstlight.metrics import SplitMetrics
from firstlight.metrics.classes import per_class
from firstlight.preflight.rules import refuse_no_step
from firstlight.run import console, directory
from firstlight.run.experiment import Experiment
from firstlight.run.output_recorder import AsYielded, OutOfTimeError, OutputRecorder, keeps_order
from firstlight.run.outputs import write_outputs
from firstlight.run.resume import config_diff
from firstlight.tasks.checks import describe

_FIT_ONLY = (BatchSizeFinder, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging)
"""Callbacks that an evaluation leaves out: after a fit, WeightAveraging would load the weights before the average."""

_MAX_SECONDS = 2.0  # Of the pass over the validation split after a run.
_CHANGES_OUTPUTS = ("model", "data", "trainer.limit_", "trainer.precision", "trainer.overfit", "trainer.fast_dev_run")
"""Options whose change changes the outputs."""


def choose_checkpoint(verb: str, run: Path | None, ckpt: str | None, default: str = "best") -> Path:
    """Return the checkpoint to evaluate; `ckpt` is one of `directory.CHECKPOINTS` or a path.

    `None` takes the first that exists: `refit` (not for validate), `final`, then `default`.
    """
    if ckpt is None and run is None:
        raise UsageError(f"{verb} needs a checkpoint: give --run DIR or --ckpt PATH; random weights are not evaluated")
    likely = ("final",) if verb == "validate" else ("refit", "final")
    written = [name for name in likely if run and (run / "checkpoints" / f"{name}.ckpt").is_file()]
    name = ckpt or next(iter(written), default)
    if name in directory.CHECKPOINTS:
        if run is None:
            raise UsageError(f"--ckpt {name} is a checkpoint of a run: add --run DIR")
        path = directory.checkpoint(run, name)
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no checkpoint {name}" + did_you_mean(name, directory.CHECKPOINTS))
    if verb == "validate" and has_seen_validation(path):
        raise UsageError(f"{path.name} was trained on the validation samples, so it cannot be validated: use best")
    return path


def evaluate(experiment: Experiment, verb: Literal["validate", "test", "predict"], ckpt: str | None) -> None:
    """Evaluate a checkpoint, print the result, and write it to a new folder in `evaluations/`."""
    default = "last" if experiment.monitored is None else "best"
    path = choose_checkpoint(verb, experiment.run_dir, ckpt, default)
    refuse_no_step(experiment.task, experiment.datamodule, verb)
    emit("start", verb=verb, checkpoint=str(path))
    recorder = OutputRecorder(experiment.task, experiment.datamodule)
    outputs = _outputs(experiment, verb, path) if verb == "predict" else _evaluated(experiment, verb, path, recorder)
    results = {"checkpoint": str(path), "seconds": round(time.monotonic() - experiment.started, 1)}
    # What was computed is printed first: the disk may be full.
    if verb == "predict":
        columns = joined_columns(experiment.task, outputs)
        rows: Sequence[int] = range(len(next(iter(columns.values()))))
        class_names: list[str] = []
        files: list[str] = []
        if isinstance(experiment.datamodule, DataModule):
            rows = experiment.datamodule.rows("test")[: len(rows)].tolist()
            class_names = experiment.datamodule.class_names
            files = experiment.datamodule.names("test")[: len(rows)]
        say(f"predict  {len(rows):,} samples ({path})", always=True)
    else:
        results["metrics"] = metrics = _metrics(outputs)
        say(f"{verb:<8} {_listed(metrics, recorder)} ({path})", always=True)
        emit("metrics", verb=verb, metrics=metrics)
        results |= _per_class(experiment, verb)
    parent = (experiment.run_dir or experiment.experiment_dir) / "evaluations"
    wrote = folder = directory.make_unique(parent, f"{verb}-{directory.timestamp()}")
    try:
        if verb == "predict":
            wrote = directory.write_predictions(folder, columns, rows, class_names, files)
        else:
            own = experiment.run_dir if _is_of_run(experiment, verb, path, default) else None
            split = "test" if verb == "test" else "val"
            _predict(experiment, split, path, recorder)
            results |= _write_outputs(experiment, recorder, split, own or folder)
        directory.write_results(folder, results)
    except UsageError:
        with suppress(OSError):
            folder.rmdir()  # It stays if it holds predictions.
        raise
    say(f"wrote    {wrote}", always=True)
    emit("end", verb=verb, wrote=str(wrote), **results)


def test_trained(experiment: Experiment) -> dict[str, Any]:
    """Test the best or final checkpoint of the run that was just trained, and print the result.

    Returns:
        The `metrics`, and the precision and recall `per_class` if targets are classes.
    """
    assert experiment.run_dir is not None
    if torch.distributed.is_initialized():
        # The other processes have ended, and the metrics would wait for them.
        torch.distributed.destroy_process_group()
    path = choose_checkpoint("test", experiment.run_dir, None)
    recorder = OutputRecorder(experiment.task, experiment.datamodule)
    metrics = _metrics(_evaluated(experiment, "test", path, recorder))
    which = {
        "best": "best checkpoint",
        "final": "final checkpoint: a callback changed the weights at the end",
        "refit": "refit checkpoint",
    }
    say(f"test   {_listed(metrics, recorder)} ({which[path.stem]})", always=True)
    emit("metrics", verb="test", metrics=metrics)
    results = {"metrics": metrics, **_per_class(experiment, "test")}
    _predict(experiment, "test", path, recorder)
    stored = _write_outputs(experiment, recorder, "test", experiment.run_dir)["outputs"]
    return {**results, "outputs": {**stored, **_validate_outputs(experiment)}}


def _validate_outputs(experiment: Experiment) -> dict[str, Any]:
    """Write the outputs of the validation split, if that takes at most two seconds."""
    recorder = OutputRecorder(experiment.task, experiment.datamodule, _MAX_SECONDS)
    assert experiment.run_dir is not None
    try:
        if not recorder.reason:
            path = choose_checkpoint("validate", experiment.run_dir, None)
            if recorder.watches:
                _outputs(experiment, "validate", path, recorder)
            else:
                _predict(experiment, "val", path, recorder, is_extra=True)
    except UsageError as error:  # For example, a checkpoint that was trained on these samples.
        recorder.stop(str(error), is_expected=True)
    except OutOfTimeError:
        recorder.stop(f"one pass takes more than {_MAX_SECONDS:g} s", is_expected=True)
    return {**_write_outputs(experiment, recorder, "val", experiment.run_dir)["outputs"]}


def _evaluated(experiment: Experiment, verb: str, path: Path, recorder: OutputRecorder) -> list[Any]:
    """Return what Lightning's `validate` or `test` returns. A recorder that predicts later gets time for it."""
    begin = time.monotonic()
    outputs = _outputs(experiment, verb, path, recorder if recorder.watches else None)
    if not outputs:
        option = "limit_test_batches" if verb == "test" else "limit_val_batches"
        recorder.stop(f"there is no batch ({option} is 0, or there are no samples)", is_expected=True)
    recorder.seconds = _MAX_SECONDS + 2 * (time.monotonic() - begin)
    return outputs


def _listed(metrics: Mapping[str, float], recorder: OutputRecorder) -> str:
    """Return the metrics of an evaluation in one line, or why there are none."""
    none = f"none: {recorder.reason}" if recorder.reason.startswith("there is no batch") else "no metric was logged"
    return console.listed(metrics) or none


def _predict(experiment: Experiment, split: str, path: Path, recorder: OutputRecorder, is_extra: bool = False) -> None:
    """Record the predictions of a split in a pass of their own, unless the recorder has watched the evaluation."""
    if recorder.watches or recorder.reason:
        return
    data = experiment.datamodule

    def predict_dataloader() -> Any:
        loaders = getattr(data, f"{split}_dataloader")()
        recorder.check_order(loaders)
        return [] if recorder.reason else AsYielded(loaders)

    before = vars(data).get("predict_dataloader")
    vars(data)["predict_dataloader"] = predict_dataloader
    limit = experiment.options[f"limit_{split}_batches"]
    try:
        _outputs(experiment, "predict", path, recorder, limit_predict_batches=limit)
    except OutOfTimeError:
        recorder.stop(f"one pass takes more than {recorder.seconds:.3g} s", is_expected=is_extra)
    except Exception as error:  # The evaluation is done, and its metrics are right.
        recorder.stop(f"predicting with {type(experiment.task).__name__} fails ({error!r:.100})", is_expected=is_extra)
    finally:
        vars(data).pop("predict_dataloader")
        if before is not None:
            vars(data)["predict_dataloader"] = before


def _is_of_run(experiment: Experiment, verb: str, path: Path, default: str) -> bool:
    """Return whether an evaluation is that of a run: its checkpoint, all its data, and its model."""
    run, data = experiment.run_dir, experiment.datamodule
    if run is None:
        return False
    try:
        if path != choose_checkpoint(verb, run, None, default):
            return False
    except UsageError:  # It has no such checkpoint, for example no best one before the first validation.
        return False
    if isinstance(data, DataModule) and not len(data.indices.get("train", ())):
        return False  # It is other data.
    diff = config_diff(directory.load_config(run), yaml.safe_load(experiment.config))
    return not any(name.startswith(_CHANGES_OUTPUTS) for name in diff)


def _write_outputs(experiment: Experiment, recorder: OutputRecorder, split: Any, folder: Path) -> dict[str, Any]:
    """Write what was recorded, and return the entry of `results.json`: by split, the file, or why there is none."""
    arrays = recorder.arrays(experiment.task, split)
    reason, is_expected = recorder.reason, recorder.is_expected
    if not reason:
        try:
            path = write_outputs(folder, split, arrays)
            return {"outputs": {split: path.relative_to(folder).as_posix()}}
        except UsageError as error:  # The disk may be full; the metrics are still written.
            reason, is_expected = str(error), False
    if not is_expected:
        say(f"outputs of the {split} samples are left out: {reason}")
    return {"outputs": {split: f"left out: {reason}"}}


def _per_class(experiment: Experiment, verb: str) -> dict[str, Any]:
    """Return what `results.json` holds of each class, `{}` without classes; print the rare and badly found ones."""
    task, data = experiment.task, experiment.datamodule
    split = getattr(task, "val_metrics" if verb == "validate" else "test_metrics", None)
    if not isinstance(split, SplitMetrics) or split.class_counts is None:
        return {}
    every = per_class(split.class_counts)
    names = data.class_names if isinstance(data, DataModule) else []
    if len(names) != len(every):
        names = [str(index) for index in range(len(every))]
    found = dict(zip(names, every, strict=True))
    for line in console.classes(found):
        say(line)
    return {"per_class": found}


def _metrics(outputs: list[dict[str, float]]) -> dict[str, float]:
    """Return the metrics of all data loaders; with several, Lightning puts the index into each name."""
    return {name: value for each in outputs for name, value in each.items()}


def joined_columns(module: LightningModule, outputs: list[Any]) -> dict[str, list[Any]]:
    """Return the predictions of all batches by column; tensors without a name are the column `prediction`.

    Raises:
        UsageError: When `predict_step` returns something else than tensors `(B, ...)` or a dict of them, or tensors
            whose shapes differ between batches in more than `B`.
    """
    batches = [{"prediction": each} if isinstance(each, Tensor) else each for each in outputs]
    names = list(batches[0]) if batches and isinstance(batches[0], Mapping) else []
    for batch in batches:
        is_named = isinstance(batch, Mapping) and list(batch) == names
        if not names or not is_named or not all(isinstance(each, Tensor) and each.ndim for each in batch.values()):
            raise UsageError(
                f"{type(module).__name__}.predict_step returns {describe(batch)}: predict writes tensors whose first "
                "axis is the batch, one or a dict of them with the same names in each batch"
            )
        if len({len(each) for each in batch.values()}) > 1:
            raise UsageError(
                f"{type(module).__name__}.predict_step returns {describe(batch)}: all tensors must have the same "
                "number of samples"
            )
    if not batches:
        raise UsageError("the data to predict has no batch")
    for name in names:
        if len({batch[name].shape[1:] for batch in batches}) > 1:
            raise UsageError(
                f"{type(module).__name__}.predict_step returns {name} of several shapes: pad it to one length"
            )
    return {name: torch.cat([batch[name] for batch in batches]).tolist() for name in names}


def _outputs(
    experiment: Experiment, verb: str, path: Path, recorder: OutputRecorder | None = None, **changes: Any
) -> list[Any]:
    """Return what Lightning's `validate`, `test` or `predict` returns for a checkpoint.

    With a time limit, the pass is only for the recorder: callbacks of the user are left out. `changes` replace options
    of the trainer.
    """
    is_silent = recorder is not None and recorder.seconds is not None
    own = [] if is_silent else [each for each in experiment.own_callbacks if not isinstance(each, _FIT_ONLY)]
    is_shown = "progress" not in experiment.disable and not is_silent
    progress = [Progress(**experiment.groups["progress"])] if is_shown else []
    trainer = experiment.trainer(
        # One process counts no sample twice.
        devices=1,
        num_nodes=1,
        strategy="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in [*own, *progress]),
        callbacks=[*own, *progress, *([] if recorder is None else [recorder])],
        **changes,
    )
    reset_seed()  # A module that draws numbers draws the same ones in `run` and `test`.
    if verb == "predict":
        let_loaders_predict(experiment.datamodule)
    quiet = {"return_predictions": recorder is None} if verb == "predict" else {"verbose": False}
    again = f"; run again with: firstlight {verb} --run {experiment.run_dir}" if experiment.run_dir else ""
    try:
        with interruptible(trainer, lambda: f"interrupted{again}"), warnings.catch_warnings():
            # The callbacks of the fit are left out on purpose.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            outputs: list[Any] = getattr(trainer, verb)(
                experiment.task, datamodule=experiment.datamodule, ckpt_path=str(path), weights_only=True, **quiet
            )
    except MisconfigurationException as error:
        if is_users(error):
            raise
        raise UsageError(f"{verb}: {error}") from error
    except Exception as error:
        raise_fault(error, path)
    return outputs


def let_loaders_predict(datamodule: LightningDataModule) -> None:
    """Let Lightning 2.6.6 predict from loaders that got their batch size by position, as `DataLoader(samples, 8)`.

    It builds each loader again from the arguments that it recorded, and passes the batch size twice. Without that
    record it reads the arguments from the loader. Remove this when Lightning passes them once.
    """
    own = datamodule.predict_dataloader

    def predict_dataloader() -> Any:
        found = own()
        for loader in tree_leaves(found):
            if type(loader) is DataLoader:
                vars(loader).pop("__pl_saved_args", None)
            is_read_in_order = isinstance(datamodule, DataModule) or not isinstance(loader, DataLoader)
            if not (is_read_in_order or isinstance(loader.dataset, IterableDataset) or keeps_order(loader)):
                say("predict  index counts the samples as the data loader yields them, not as the data set holds them")
        return found

    datamodule.predict_dataloader = predict_dataloader  # type: ignore[method-assign]
