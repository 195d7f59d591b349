"""`firstlight check`: what is wrong with a fit, its plan, its data and its time, before it starts."""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from firstlight.callbacks import GradientNorm, Insight, LearningRate
from firstlight.callbacks.facts.data import data_findings
from firstlight.data import DataModule
from firstlight.data.quality.finding import Finding, Severity
from firstlight.errors import UsageError, is_users, printing
from firstlight.loggers import all_loggers
from firstlight.optim import skip_nvml_check
from firstlight.preflight import data_summary, draw, layers, rules
from firstlight.preflight.dry_run import Check, DryRun, Facts
from firstlight.preflight.judge import in_order
from firstlight.preflight.measure import Skipped
from firstlight.preflight.probe import probe_splits

CHECKS = (
    *("options", "output", "data", "quality", "start", "monitors", "batches", "scale", "loss", "gradients", "mixing"),
    *("overfit", "inputs", "modes", "steps"),
)
"""All checks, in their order. After a fault in one of the first five, later ones may not be tried."""

State = Literal["ok", "warn", "FAIL", "skipped"]
_STATES: Mapping[Severity, State] = {"fault": "FAIL", "warning": "warn", "info": "ok"}


@dataclass(frozen=True)
class Result:
    """The result of one check: figures, a finding, or why the check was skipped."""

    check: str
    state: State
    text: str
    finding: Finding | None = None

    def __str__(self) -> str:
        """Return a line of the table.

        >>> print(Result("mixing", "ok", "8 samples"))
        mixing     ok       8 samples
        """
        return f"{self.check:<10} {self.state:<8} {self.text}"


@dataclass(frozen=True)
class Report:
    """All that `firstlight check` has found.

    Args:
        results: Of all checks that were tried; a check may have several.
        task: The module of the fit.
        datamodule: Its data.
        facts: What the dry run has learnt; empty if it was not tried.
    """

    results: Sequence[Result]
    task: LightningModule
    datamodule: LightningDataModule
    facts: Facts = field(default_factory=Facts)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, by severity; a cause comes before its symptoms."""
        return in_order([each.finding for each in self.results if each.finding is not None])

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return list(dict.fromkeys(each.check for each in self.results if each.state == "FAIL"))

    @property
    def untried(self) -> int:
        """How many checks were not tried."""
        return len(set(CHECKS) - {each.check for each in self.results})

    def lines(self, verbose: bool = False) -> list[str]:
        """Return what follows the findings: what is right, then the plan; `verbose` adds tables."""
        states = {each.check: each.state for each in reversed(self.results)}
        good = [name for name, state in states.items() if state == "ok"]
        skipped = [f"skipped  {each.check}: {each.text}" for each in self.results if each.state == "skipped"]
        right = [f"ok       {', '.join(reversed(good))}", *skipped]
        table = ["", *map(str, self.results)] if verbose else []
        return [*right, "", *_plan(self), *table, *(_details(self) if verbose else [])]

    def plot(self, path: Path) -> None:
        """Write a PNG with the schedule and a grid of training images."""
        images = data_summary.images(self.datamodule) if isinstance(self.datamodule, DataModule) else []
        draw.as_png(path, self.facts.rates, self.facts.total_steps, images)


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


def duration(seconds: float) -> str:
    """Return a time that a person can read.

    >>> duration(0.4), duration(75), duration(5400)
    ('0.4 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left} min" if hours else f"{minutes} min" + (f" {rest} s" if rest else "")


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


def check(fit: Fit, folder: Path, loop: Callable[[Trainer], AbstractContextManager[Any]]) -> Report:
    """Return what is right and wrong with a fit that would write into a folder.

    No run directory is created, and task, data and random states stay as they are. The dry run uses a copy of the task
    and one process, whatever the number of processes of the fit.

    Args:
        fit: The experiment.
        folder: Its run directory, or the folder of its runs.
        loop: Context of a trainer's fit, for the speed that the real one has.
    """

    def trainer_options() -> str:
        rules.refuse_options(fit.options)
        return "the trainer options are usable"

    def output() -> str:
        rules.refuse_unreadable_checkpoints(fit.task, fit.datamodule, fit.options, fit.disable)
        needed, free = rules.refuse_no_room(fit.task, fit.disable, folder)
        return f"{folder}: checkpoints need about {readable(needed)}, {readable(free)} free"

    def data() -> str:
        datamodule = fit.datamodule
        if not isinstance(datamodule, DataModule):
            raise Skipped(f"{type(datamodule).__name__} is not a firstlight DataModule: only its batches are tried")
        probe_splits(fit.task, datamodule)
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in datamodule.indices.items())
        return f"{sizes} samples" + (f"; {datamodule.split_note}" if datamodule.split_note else "")

    results = [*_results("options", trainer_options), *_results("output", output), *_results("data", data)]
    if any(each.state == "FAIL" and each.check != "output" for each in results):
        return Report(results, fit.task, fit.datamodule)
    if isinstance(fit.datamodule, DataModule):
        of_data = _results(
            "quality", lambda: data_findings(fit.datamodule, fit.task) or "nothing in the data looks wrong"
        )
        # A run trains on such data, too: only people can decide whether it is right.
        results += [each if each.finding is None else replace(each, state="warn") for each in of_data]
    of_dry_run: list[Result] = []
    dry_run = DryRun(fit.callbacks(folder), lambda name, call: of_dry_run.extend(_results(name, call)))

    def start() -> str:
        with warnings.catch_warnings(), isolate_rng():
            warnings.simplefilter("ignore")  # The run itself shows them.
            _run(dry_run, fit, loop)
        return "task, optimiser, schedule, data and callbacks fit together"

    return Report([*results, *_results("start", start), *of_dry_run], fit.task, fit.datamodule, dry_run.facts)


def _results(name: str, call: Check) -> list[Result]:
    try:
        found = call()
    except Skipped as reason:
        return [Result(name, "skipped", str(reason))]
    except UsageError as error:
        return [Result(name, "FAIL", str(error), Finding(name, "fault", str(error), {}, ""))]
    if isinstance(found, str):
        return [Result(name, "ok", found)]
    return [Result(name, _STATES[each.severity], told(each), each) for each in found]


def told(finding: Finding) -> str:
    """Return text and advice of a finding; an error of a rule has all in its text."""
    return str(finding) if finding.advice else finding.text


def _plan(report: Report) -> list[str]:
    """Return lines with data, model, plan, time and schedule; what is unknown is left out."""
    facts, lines = report.facts, []
    if isinstance(report.datamodule, DataModule) and report.datamodule.indices:
        lines.append(f"data     {data_summary.summary(report.datamodule)}")
    if not facts.train_batches:
        return lines
    parameters = list(report.task.parameters())
    size = sum(each.numel() for each in parameters)
    trainable = sum(each.numel() for each in parameters if each.requires_grad)
    frozen = f", {size - trainable:,} of them frozen" if trainable < size else ""
    weights = sum(each.nbytes for each in parameters)
    slopes = sum(each.nbytes for each in parameters if each.requires_grad)
    parts = {"weights": weights, "gradients": slopes}
    parts |= {"optimiser": facts.optimizer_bytes, "activations": facts.activations}
    memory = ", ".join(f"{readable(value)} {name}" for name, value in parts.items() if value)
    of_batch = f" with {facts.batch_size:,} samples a batch" if facts.batch_size else ""
    lines.append(f"model    {size:,} parameters{frozen}; memory{of_batch}: {memory}")
    if largest := max(facts.layers, key=lambda each: each.parameters, default=None):
        share = f"{100 * largest.parameters / (size or 1):.0f} % of the parameters"
        lines.append(f"         {len(facts.layers)} layers, the largest is {largest.name} with {share}")
    if facts.loss is not None:
        chance = f"; {facts.neutral:.4g} for {facts.neutral_meaning}" if facts.neutral is not None else ""
        lines.append(f"loss     {facts.loss:.4g} before the first step{chance}")
    is_known = math.isfinite(facts.total_steps)
    steps = f"{facts.total_steps:,.0f} optimiser steps" if is_known else "steps without a known end"
    warmup = f", {facts.warmup:,} of them warm-up" if facts.warmup else ""
    an_epoch = f"{facts.train_batches:,} training and {facts.val_batches:,} validation batches an epoch"
    lines.append(f"plan     {steps}{warmup}; {an_epoch}")
    if facts.step_seconds is not None:
        each = f"{duration_of_step(facts.step_seconds)} a batch, {duration(facts.validation_seconds)} a validation"
        total = f"about {duration(facts.seconds)}, if nothing stops it earlier; " if facts.seconds is not None else ""
        lines.append(f"time     {total}{each} on {facts.device}")
    if facts.rates:
        lines += ["rate", *draw.as_text(facts.rates, int(facts.total_steps))]
    return lines


def duration_of_step(seconds: float) -> str:
    """Return the time of one batch.

    >>> duration_of_step(0.00042)
    '0.42 ms'
    """
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else duration(seconds)


def _details(report: Report) -> list[str]:
    """Return the layers, the classes and a few samples."""
    lines = ["", *layers.table(report.facts.layers)] if report.facts.layers else []
    if isinstance(report.datamodule, DataModule) and report.datamodule.indices:
        for more in (data_summary.class_shares(report.datamodule), data_summary.examples(report.datamodule)):
            lines += ["", *more] if more else []
    return lines


def _run(dry_run: DryRun, fit: Fit, loop: Callable[[Trainer], AbstractContextManager[Any]]) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    planned = fit.trainer(callbacks=[], **quiet)
    rules.refuse_sizes(fit.datamodule, planned)
    dry_run.processes = planned.num_devices * planned.num_nodes
    one_process = {"devices": 1, "num_nodes": 1, "strategy": "auto", "fast_dev_run": False}
    with tempfile.TemporaryDirectory() as folder:
        # What takes time at logged steps and validations is there, and nothing of the user's.
        recording = [each for each in dry_run.callbacks if type(each) in (GradientNorm, LearningRate, Insight)]
        quiet["logger"] = all_loggers(Path(folder), False if fit.options["logger"] is False else None)
        changes = {"num_sanity_val_steps": 2, "default_root_dir": folder, "callbacks": [dry_run, *recording]}
        trainer = fit.trainer(**one_process, **quiet, **changes)
        skip_nvml_check()
        try:
            with loop(trainer), printing("quiet"):  # The run itself tells what it sees.
                # The command line, to which the optimiser's constructor refers, holds the data.
                trainer.fit(deepcopy(fit.task, {id(fit.datamodule): fit.datamodule}), datamodule=fit.datamodule)
        except MisconfigurationException as error:
            if is_users(error):
                raise
            raise UsageError(f"trainer: {error}") from error
        rules.refuse_no_batches(trainer)
