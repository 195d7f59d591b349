"""`firstlight check`: a table of what is right and wrong with a fit, before it starts."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.preflight import rules
from firstlight.preflight.dry_run import DryRun, Skipped
from firstlight.preflight.probe import probe_splits

CHECKS = ("options", "output", "data", "quality", "start", "monitors", "batches", "gradients", "leak", "overfit")
"""All checks, in their order. After a fault in one of the first five, later ones may not be tried."""


@dataclass(frozen=True)
class Result:
    """The result of one check: figures, a warning, the fault, or why the check was skipped."""

    check: str
    state: Literal["ok", "warn", "FAIL", "skipped"]
    text: str

    def __str__(self) -> str:
        """Return a line of the table.

        >>> print(Result("leak", "ok", "8 samples"))
        leak       ok       8 samples
        """
        return f"{self.check:<10} {self.state:<8} {self.text}"


def readable(size: float) -> str:
    """Return a number of bytes in the largest fitting unit.

    >>> readable(740), readable(5_400), readable(51_699_924_992)
    ('740 bytes', '5.4 kB', '52 GB')
    """
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 999.5:
            size, unit = size / 1000, larger
    return f"{size:.{int(size < 9.95 and unit != 'bytes')}f} {unit}"


class Fit(Protocol):
    """What `check` needs of an experiment."""

    task: LightningModule
    datamodule: LightningDataModule
    options: Mapping[str, Any]
    disable: set[str]

    def callbacks(self, folder: Path) -> Sequence[Callback]:
        """Return the callbacks of a fit in a run directory."""

    def trainer(self, **changes: Any) -> Trainer:
        """Return a trainer; `changes` replace options."""


def check(fit: Fit, folder: Path) -> list[Result]:
    """Return the results of all checks of a fit that would write into a folder.

    Nothing is trained, and no run directory is created. The dry run uses a copy of the task and one process, whatever
    the number of processes of the fit.
    """

    def trainer_options() -> str:
        rules.refuse_options(fit.options)
        return "the trainer options are usable"

    def output() -> str:
        needed, free = rules.refuse_no_room(fit.task, fit.disable, folder)
        return f"{folder}: checkpoints need about {readable(needed)}, {readable(free)} free"

    def data() -> str:
        datamodule = fit.datamodule
        if not isinstance(datamodule, DataModule):
            raise Skipped(f"{type(datamodule).__name__} is not a firstlight DataModule: only its batches are tried")
        probe_splits(fit.task, datamodule)
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in datamodule.indices.items())
        return f"{sizes} samples" + (f"; {datamodule.split_note}" if datamodule.split_note else "")

    results = [_result("options", trainer_options), _result("output", output), _result("data", data)]
    if "FAIL" in (results[0].state, results[2].state):
        return results
    if isinstance(fit.datamodule, DataModule):
        found = [Result("quality", "warn", str(each)) for each in fit.datamodule.findings()]
        results += found or [Result("quality", "ok", "nothing in the data looks wrong")]
    dry_run: list[Result] = []

    def start() -> str:
        callback = DryRun(fit.callbacks(folder), lambda name, call: dry_run.append(_result(name, call)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The run itself shows them.
            _run(callback, fit)
        return "task, optimiser, schedule, data and callbacks fit together"

    return [*results, _result("start", start), *dry_run]


def _result(name: str, call: Callable[[], str]) -> Result:
    try:
        return Result(name, "ok", call())
    except Skipped as reason:
        return Result(name, "skipped", str(reason))
    except UsageError as error:
        return Result(name, "FAIL", str(error))


def _run(dry_run: DryRun, fit: Fit) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    planned = fit.trainer(callbacks=[], **quiet)
    rules.refuse_sizes(fit.datamodule, planned)
    dry_run.processes = planned.num_devices * planned.num_nodes
    one_process = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    # A minimum length would keep the trainer from stopping before the first step.
    no_minimum = {"min_epochs": None, "min_steps": None, "fast_dev_run": False}
    with tempfile.TemporaryDirectory() as folder:
        changes = {"num_sanity_val_steps": 2, "default_root_dir": folder, "callbacks": [dry_run]}
        trainer = fit.trainer(**one_process, **quiet, **no_minimum, **changes)
        try:
            trainer.fit(deepcopy(fit.task), datamodule=fit.datamodule)
        except MisconfigurationException as error:
            raise UsageError(f"trainer: {error}") from error
        rules.refuse_no_batches(trainer)
