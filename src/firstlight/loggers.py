"""Where the numbers of a run go: TensorBoard, `metrics.csv`, which is only ever appended to, or memory."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from firstlight.errors import UsageError, did_you_mean

__all__ = ["History", "MetricsCSV", "TensorBoard", "all_loggers", "as_list"]


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, right in the folder, that writes every five seconds.

    Lightning 2.6.6 waits for the disk at each logging, and writes an empty `hparams.yaml` beside the events.

    Args:
        folder: Where the events go.
        from_step: Step that a run goes on from: what earlier events hold from there on is done again, and not shown.
    """

    def __init__(self, folder: Path, from_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, flush_secs=5, purge_step=from_step)

    def save(self) -> None:
        """Leave writing to TensorBoard's own thread, which `finalize` waits for."""


class MetricsCSV(Logger):
    """Append one line `step,name,value` for each logged number.

    Lightning 2.6.6's `CSVLogger` deletes the file of an earlier logger in the same folder, so that a resumed run loses
    its history, and rewrites all of it whenever a new name comes up. This class can go when it does neither.

    Args:
        path: The file; it is made with its folder when the first number comes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: TextIO | None = None

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
        """Append a line for each of `metrics`."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_bytes() if self.path.exists() else b""
            self._file = self.path.open("a", newline="", encoding="utf-8")
            if not before:
                csv.writer(self._file).writerow(["step", "name", "value"])
            elif not before.endswith(b"\n"):
                self._file.write("\r\n")  # A killed run left half a line.
        csv.writer(self._file).writerows([step, name, value] for name, value in metrics.items())

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `config.yaml` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Hand what was appended to the operating system."""
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; another number opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
