"""When the numbers of a run are logged, and where: TensorBoard, `metrics.csv` or memory."""

import csv
import errno
import logging
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Number
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from firstlight.errors import UsageError, did_you_mean

_log = logging.getLogger(__name__)


def is_logged_step(step: int, every: int) -> bool:
    """Return whether the optimiser step with this index, from 0, is logged; `every=0` logs none.

    >>> [step for step in range(10) if is_logged_step(step, 5)]
    [4, 9]
    """
    return every > 0 and (step + 1) % every == 0


def current_step(trainer: Trainer) -> int:
    """Return the index at which Lightning 2.6.6 logs `train/*` of this batch.

    It is the index of the optimiser step. With manual optimisation it is the index of the batch, in which optimisers
    may make any number of steps; `trainer.global_step` counts all of these.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_done(trainer: Trainer) -> int:
    """Return the number of optimiser steps done, or of batches with manual optimisation."""
    module = trainer.lightning_module  # None before a fit
    if module is None or module.automatic_optimization:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


def split_of(name: str) -> str:
    """Return the split that a metric belongs to by its name: `"train"`, `"val"`, or `""`.

    >>> [split_of(name) for name in ("val/loss", "validation_acc", "train_loss", "value_loss", "trainable")]
    ['val', 'val', 'train', '', '']
    """
    found = re.match(r"(train|val)(?:ing|id|idation)?(?![a-z])", name)
    return found[1] if found else ""


def should_log(trainer: Trainer) -> bool:
    """Return whether the current optimiser step is logged."""
    return is_logged_step(current_step(trainer), trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set outside


class LogCadence:
    """Decides at which optimiser steps a callback logs: the first one at or after each logged index of `train/*`.

    With manual optimisation, an optimiser may step in some batches only, or several times in one batch.

    Attributes:
        seen: Index of the last step of each optimiser, by the optimiser's index.
    """

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def is_due(self, trainer: Trainer, optimizer: int = 0) -> bool:
        """Return whether to log at this step of an optimiser; call it once for each of its steps."""
        step, every = current_step(trainer), trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside
        if not every:
            return False
        seen = self.seen.get(optimizer, -1)
        self.seen[optimizer] = step
        return (step + 1) // every > (seen + 1) // every  # type: ignore[no-any-return]


class LogsSteps(Callback):
    """A callback that asks `cadence` at each optimiser step whether to log, also after a resume."""

    def __init__(self) -> None:
        self.cadence = LogCadence()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        self.cadence.seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the last step of each optimiser."""
        return {"seen": dict(self.cadence.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.cadence.seen = dict(state_dict["seen"])


def log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log `values` at the current step. A logger that can buffer them writes all values of a step at once.

    A value whose name the module logs, too, is left out: a name has one value at a step.
    """
    step, own = current_step(trainer), logged_names(trainer.fit_loop.epoch_loop._results, everything=True)
    values = {name: value for name, value in values.items() if name not in own}
    for logger in trainer.loggers:
        getattr(logger, "buffer_metrics", logger.log_metrics)(dict(values), step=step)


def logged_names(results: Any, everything: bool = False) -> set[str]:
    """Return the names that Lightning 2.6.6 gives to logged values in `callback_metrics`.

    Args:
        results: The result collection of a loop.
        everything: Whether values count that were logged before the last reset, which is at the end of a validation or
            epoch.
    """
    forks = (False, True) if results.training else (False,)
    values = [each for each in results.values() if everything or not each.has_reset]
    values = [each for each in values if results.training or each.meta.on_epoch]
    return {name for each in values for on_step in forks for name in results._forked_name(each, on_step)}


class _SurvivesDiskErrors:
    """A logger that warns once and stops writing when its disk is full or fails, so that training continues."""

    _failed = False

    @contextmanager
    def guard(self, path: str | Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__  # Lightning wraps it in a ValueError.
            if not isinstance(cause, OSError):
                raise
            if not self._failed:
                _log.warning(f"{path}: {cause.strerror}; logging there stops, training continues")
            self._failed = True


class TensorBoard(_SurvivesDiskErrors, TensorBoardLogger):
    """Lightning's TensorBoard logger, directly in `folder`, with one event a step, written every five seconds.

    Lightning 2.6.6 waits for the disk at each logging, writes an empty `hparams.yaml`, and stops the training when the
    disk is full. It writes one event for each number, which takes more than three times as long for four numbers.

    Besides what is logged, it writes:

    - at each validation, `Epoch/val/*` and the newest `Epoch/train/*` of that epoch, whose step is the number of the
      epoch, from 1: TensorBoard's x-axis is the step, and cannot be another curve. The capital puts them first.
    - the layout of the page Custom Scalars: train against validation in one chart, learning rate and gradient norms.

    Args:
        folder: Folder of the event files.
        from_step: First index of a resumed run. TensorBoard hides events of the interrupted run at this index or later.
    """

    def __init__(self, folder: Path, from_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, flush_secs=5, purge_step=from_step)
        self._buffer: list[tuple[str, float]] = []
        self._step: int | None = None
        self._newest: dict[str, float] = {}  # `train/*` of this epoch.
        self._charted: set[str] = set()

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer, or one that does nothing: on other ranks than 0, and after a disk error."""
        with self.guard(str(self.save_dir)):
            if not self._failed:
                writer = super().experiment
                if events := vars(writer).get("file_writer"):
                    _hide_traceback(events)
                return writer
        return DummyLogger().experiment

    @rank_zero_only
    def buffer_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Keep `metrics` until something is logged at this step, then write one event with all of them.

        A call with another step, `save` and `finalize` write what is buffered.
        """
        if step != self._step:
            self.save()
        self._step = step
        self._buffer += metrics.items()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass `metrics`, and those buffered for this step, to TensorBoard's writer thread."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Number | Tensor)}
        self.buffer_metrics(numbers, step)
        self.save()
        self._write_curves(numbers)
        others = {name: value for name, value in metrics.items() if name not in numbers}
        if others and not self._failed:
            with self.guard(str(self.save_dir)):
                super().log_metrics(others, step)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: Mapping[str, float] | None = None, step: int | None = None
    ) -> None:
        """Log `metrics`, and write them with `params` for the page HParams; without metrics, do nothing.

        Lightning 2.6.6 also writes a list of all columns. TensorBoard would show the list of one run for all of them;
        without any, it shows the columns of all runs, those that differ first. It takes each curve in the folder of the
        hyper-parameters for a metric, so they have a folder of their own, `hparams`.
        """
        if metrics:
            self.log_metrics(metrics, step)
        if metrics and not self._failed:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            _, start, end = hparams(self._sanitize_params(dict(params)), {})  # type: ignore[no-untyped-call]
            with self.guard(str(self.save_dir)), SummaryWriter(Path(self.log_dir) / "hparams") as writer:
                for summary in (_scalars(metrics.items()), start, end):
                    writer._get_file_writer().add_summary(summary, step)

    @rank_zero_only
    def save(self) -> None:
        """Pass the buffered metrics to TensorBoard's writer thread, which writes within five seconds."""
        numbers, self._buffer = self._buffer, []
        if numbers:
            self._write([_scalars(numbers)], self._step)

    def _write(self, summaries: Iterable[Any], step: int | None) -> None:
        """Pass summaries to TensorBoard's writer thread."""
        if self._failed:
            return
        with self.guard(str(self.save_dir)):
            writer = self.experiment
            if not self._failed:
                events = writer._get_file_writer()  # Opens another file after `finalize`.
                _hide_traceback(events)
                for summary in summaries:
                    events.add_summary(summary, step)

    def _write_curves(self, numbers: Mapping[str, float]) -> None:
        """Write the curves by epoch at a validation, and the layout of the charts if there are new metrics."""
        if not self._charted >= numbers.keys():
            self._charted |= numbers.keys()
            if charts := chart_layout(self._charted):
                from torch.utils.tensorboard.summary import custom_scalars

                self._write([custom_scalars(charts)], None)  # type: ignore[no-untyped-call]
        self._newest |= {name: value for name, value in numbers.items() if split_of(name) == "train"}
        validated = {name: value for name, value in numbers.items() if split_of(name) == "val"}
        if validated and "epoch" in numbers:
            curves = [(f"Epoch/{name}", value) for name, value in (self._newest | validated).items()]
            self._newest = {}
            self._write([_scalars(curves)], int(numbers["epoch"]) + 1)

    def finalize(self, status: str) -> None:
        """Write everything and close the file."""
        self.save()
        with self.guard(str(self.save_dir)):
            super().finalize(status)


class _NumbersOnly(Logger):
    """A logger without name, version and hyper-parameters, which `config.yaml` or the caller has."""

    name = version = ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class MetricsCSV(_SurvivesDiskErrors, _NumbersOnly):
    """Append one line `step,name,value` for each logged number.

    Lightning 2.6.6's `CSVLogger` deletes the file of an earlier logger in the same folder, so that a resumed run loses
    its history. It also rewrites the whole file for each new name. This class can go when it does neither.

    An incomplete last line is removed, because the number at its end may have lost digits.

    Args:
        path: The file. The first logged number creates it and its folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: TextIO | None = None
        self._epoch: tuple[int | None, float | None] = None, None

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line for each of `metrics`; an `epoch` that this step already has is not repeated."""
        with self.guard(self.path):
            if self._failed:
                return
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_fifo():  # To open it would wait for a reader.
                    raise OSError(errno.EINVAL, "it is a pipe")
                self._file = self.path.open("a", newline="", encoding="utf-8")
                if not _drop_incomplete_line(self.path):
                    csv.writer(self._file).writerow(["step", "name", "value"])
            previous, self._epoch = self._epoch, (step, metrics.get("epoch"))
            rows = [(step, *each) for each in metrics.items() if each != ("epoch", previous[1]) or step != previous[0]]
            csv.writer(self._file).writerows(rows)

    @rank_zero_only
    def save(self) -> None:
        """Pass the appended lines to the operating system."""
        if self._file is not None and not self._failed:
            with self.guard(self.path):
                self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; the next logged number opens it again."""
        if self._file is None:
            return
        self.save()
        with suppress(OSError):  # `close` fails where `save` failed, and closes the file nevertheless.
            self._file.close()
        self._file, self._epoch = None, (None, None)
        if self._failed:
            with suppress(OSError):
                _drop_incomplete_line(self.path)


class History(_NumbersOnly):
    """Keep every logged number in memory, for example to draw it in a notebook; no file is written.

    >>> history = History()
    >>> history.log_metrics({"val/loss": 0.5}, step=9)
    >>> history.log_metrics({"val/loss": 0.25}, step=19)
    >>> history["val/loss"]
    ([9, 19], [0.5, 0.25])

    Attributes:
        logged: Steps and values of each name. A run that is resumed with the same logger repeats steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, tuple[list[int], list[float]]] = {}

    def __getitem__(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which `name` was logged, and its values.

        Raises:
            UsageError: When nothing was logged under that name.
        """
        if name not in self.logged:
            available = ", ".join(self.logged) or "nothing"
            raise UsageError(f"{name} was not logged; available: {available}" + did_you_mean(name, self.logged))
        return self.logged[name]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep each of `metrics`."""
        for name, value in metrics.items():
            steps, values = self.logged.setdefault(name, ([], []))
            steps.append(step or 0)
            values.append(float(value))


def all_loggers(folder: Path, requested: Any, from_step: int | None = None) -> list[Logger]:
    """Return the loggers of a run: TensorBoard and `metrics.csv` in its folder, then the requested ones.

    Args:
        folder: The run directory.
        requested: The trainer's `logger`. `False` leaves only `metrics.csv`, from which reports are made.
        from_step: First step of a resumed run.
    """
    if requested is False:
        return [MetricsCSV(folder / "metrics.csv")]
    others = [logger for logger in as_list(requested) if logger is not True]
    return [TensorBoard(folder, from_step), MetricsCSV(folder / "metrics.csv"), *others]


def as_list(value: Any) -> list[Any]:
    """Return an option of `Trainer` that takes `None`, one object or a list, always as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def chart_layout(names: Iterable[str]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Return categories of charts for `SummaryWriter.add_custom_scalars`: title of a chart to its kind and its curves.

    Each metric has a chart with its `train/NAME` and `val/NAME`, or `train_NAME` and `val_NAME`; the loss comes first.

    >>> chart_layout(["train/loss", "lr", "val/loss"])["train and validation"]
    {'loss': ('Multiline', ['^train/loss$', '^val/loss$'])}
    """
    found = {match[2]: match[1] for name in sorted(names) if (match := re.fullmatch(r"(?:train|val)([/_])(.+)", name))}
    metrics = sorted(found, key=lambda name: (name != "loss", name))
    if not metrics:
        return {}
    pairs = {name: [f"{split}{found[name]}{re.escape(name)}$" for split in ("train", "val")] for name in metrics}
    return {
        "train and validation": {name: ("Multiline", [f"^{each}" for each in pair]) for name, pair in pairs.items()},
        "optimisation": {
            "learning rate": ("Multiline", [r"^lr(/\d+)?$"]),
            "gradient norm": ("Multiline", ["^grad_norm/"]),
        },
        "by epoch": {name: ("Multiline", [f"^Epoch/{each}" for each in pair]) for name, pair in pairs.items()},
    }


def log_findings(logger: Logger, findings: Sequence[Mapping[str, Any]], step: int = 0) -> None:
    """Write findings as text to a TensorBoard logger; other loggers take none.

    Args:
        logger: Any logger.
        findings: Plain findings, as `results.json` holds them.
        step: Optimiser step at which they are shown.
    """
    if findings and isinstance(logger, TensorBoardLogger):
        lines = []
        for each in findings:
            where = "" if each.get("epoch") is None else f", epoch {each['epoch'] + 1}"
            lines.append(f"**{each['severity']}** {each['name']}{where}: {each['text']}. *{each['advice']}*")
        logger.experiment.add_text("findings", "\n\n".join(lines), step)


def _scalars(numbers: Iterable[tuple[str, float]]) -> Any:
    """Return one summary of all numbers."""
    # Imported here because commands that log nothing do not need it.
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers])


def _drop_incomplete_line(path: Path) -> int:
    """Remove what follows the last complete line of a file; return the number of bytes that remain."""
    complete = path.read_bytes().rfind(b"\n") + 1
    if complete < path.stat().st_size:
        os.truncate(path, complete)
    return complete


def _hide_traceback(events: Any) -> None:
    """Print no traceback if the disk fails: tensorboard 2.21 raises the error in its thread and at the next log."""
    events.event_writer._async_writer._worker._invoke_excepthook = lambda thread: None
