"""Where the numbers of a run go: TensorBoard, `metrics.csv`, which is only ever appended to, or memory."""

import csv
import logging
import os
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Number
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from firstlight.errors import UsageError, did_you_mean

__all__ = ["History", "MetricsCSV", "TensorBoard", "all_loggers", "as_list"]


_log = logging.getLogger(__name__)


class _GivesUp:
    """A logger that stops writing, and says so once, when its disk is full or fails: training goes on."""

    _gave_up = False

    @contextmanager
    def _writing(self, path: str | Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__  # Lightning hides it in a ValueError.
            if not isinstance(cause, OSError):
                raise
            if not self._gave_up:
                _log.warning(f"{path}: {cause.strerror}; nothing more is logged there, training goes on")
            self._gave_up = True


class TensorBoard(_GivesUp, TensorBoardLogger):
    """Lightning's TensorBoard logger, right in the folder, that writes every five seconds.

    Lightning 2.6.6 waits for the disk at each logging, writes an empty `hparams.yaml` beside the events, and ends the
    training when the disk is full or fails; here that is said once, and nothing more is written. It also makes an event
    of each number, which takes more than thrice as long for four of them as one event for all.

    Args:
        folder: Where the events go.
        from_step: Step that a run goes on from: what earlier events hold from there on is done again, and not shown.
    """

    def __init__(self, folder: Path, from_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, flush_secs=5, purge_step=from_step)
        _leave_faults_to_callers()
        self._kept: list[tuple[str, float]] = []
        self._step: int | None = None

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; on other processes than the first, and on a disk that failed, one of nothing."""
        with self._writing(str(self.save_dir)):
            if not self._gave_up:
                return super().experiment
        return DummyLogger().experiment

    @rank_zero_only
    def keep(self, numbers: Mapping[str, float], step: int | None) -> None:
        """Keep `numbers` for the event of what is logged next at this step; another step, or the end, has its own."""
        if step != self._step:
            self.save()
        self._step = step
        self._kept += numbers.items()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand `metrics`, and what was kept, to TensorBoard's own thread."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Number | Tensor)}
        self.keep(numbers, step)
        self.save()
        others = {name: value for name, value in metrics.items() if name not in numbers}
        if others and not self._gave_up:
            with self._writing(str(self.save_dir)):
                super().log_metrics(others, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hand `params` to TensorBoard's own thread."""
        if not self._gave_up:
            with self._writing(str(self.save_dir)):
                super().log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        """Hand what was kept to TensorBoard's own thread, which writes within five seconds."""
        numbers, self._kept = self._kept, []
        if not numbers or self._gave_up:
            return
        with self._writing(str(self.save_dir)):
            writer = self.experiment
            if not self._gave_up:
                # The writer has imported it by now; other commands need not.
                from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

                values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers]
                writer._get_file_writer().add_summary(Summary(value=values), self._step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until all is written."""
        self.save()
        with self._writing(str(self.save_dir)):
            super().finalize(status)


class MetricsCSV(_GivesUp, Logger):
    """Append one line `step,name,value` for each logged number.

    Lightning 2.6.6's `CSVLogger` deletes the file of an earlier logger in the same folder, so that a resumed run loses
    its history, and rewrites all of it whenever a new name comes up. This class can go when it does neither.

    When the disk is full or fails, that is said once, and nothing more is written; of a line only a part of which is
    there, nothing is kept, since the number at its end may have lost digits.

    Args:
        path: The file; it is made with its folder when the first number comes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: TextIO | None = None
        self._epoch: tuple[int | None, float | None] = None, None

    @property
    def name(self) -> str:
        """Nothing: the file lies where its path says."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: the file lies where its path says."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line for each of `metrics`, but for the `epoch` that this step has already."""
        with self._writing(self.path):
            if self._gave_up:
                return
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", newline="", encoding="utf-8")
                if not _drop_half_a_line(self.path):
                    csv.writer(self._file).writerow(["step", "name", "value"])
            there, self._epoch = self._epoch, (step, metrics.get("epoch"))
            rows = [(step, *each) for each in metrics.items() if each != ("epoch", there[1]) or step != there[0]]
            csv.writer(self._file).writerows(rows)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `config.yaml` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Hand what was appended to the operating system."""
        if self._file is not None and not self._gave_up:
            with self._writing(self.path):
                self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; another number opens it again."""
        if self._file is None:
            return
        self.save()
        with suppress(OSError):  # It closes, and cannot write what `save` could not either.
            self._file.close()
        self._file, self._epoch = None, (None, None)
        if self._gave_up:
            with suppress(OSError):
                _drop_half_a_line(self.path)


class History(Logger):
    """Keep every logged number in memory, for a notebook that draws it; nothing is written.

    >>> history = History()
    >>> history.log_metrics({"val/loss": 0.5}, step=9)
    >>> history.log_metrics({"val/loss": 0.25}, step=19)
    >>> history["val/loss"]
    ([9, 19], [0.5, 0.25])
    """

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[str, tuple[list[int], list[float]]] = {}

    @property
    def name(self) -> str:
        """Nothing: there is no file."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: there is no file."""
        return ""

    def __getitem__(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which `name` was logged, and its values.

        Raises:
            UsageError: When nothing was logged under that name.
        """
        if name not in self._logged:
            known = ", ".join(self._logged) or "nothing"
            raise UsageError(f"no {name} was logged, but {known}" + did_you_mean(name, self._logged))
        return self._logged[name]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep each of `metrics`."""
        for name, value in metrics.items():
            steps, values = self._logged.setdefault(name, ([], []))
            steps.append(step or 0)
            values.append(float(value))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep nothing: whoever made the parts has them."""


def _drop_half_a_line(path: Path) -> int:
    """Drop what follows the last whole line of a file; return the bytes that are left."""
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return whole


def _leave_faults_to_callers() -> None:
    """Keep TensorBoard's thread from printing a traceback of the `OSError` that it hands to whoever logs next."""
    before = threading.excepthook
    if before.__module__ == __name__:
        return

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = quiet


def all_loggers(folder: Path, given: Any, from_step: int | None = None) -> list[Logger]:
    """Return the loggers of a run: TensorBoard and `metrics.csv` in its folder, and those that `Trainer` was given.

    `from_step` is the step that a run goes on from.

    `False` leaves only `metrics.csv`, from which reports are made.
    """
    if given is False:
        return [MetricsCSV(folder / "metrics.csv")]
    own = [logger for logger in as_list(given) if logger is not True]
    return [TensorBoard(folder, from_step), MetricsCSV(folder / "metrics.csv"), *own]


def as_list(value: Any) -> list[Any]:
    """Return what `Trainer` takes as nothing, as one thing or as a list, always as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]
