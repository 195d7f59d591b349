"""Tell what is wrong with a fit before it starts."""

import tempfile
import warnings
from copy import deepcopy

from lightning.fabric.utilities.exceptions import MisconfigurationException

from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.preflight.dry_run import Finding, Skipped, TrialRun, attempted
from firstlight.preflight.rules import check_data, check_room, check_sizes, refuse_no_batches, refuse_options
from firstlight.run.experiment import Experiment

__all__ = ["check"]


def check(experiment: Experiment) -> list[Finding]:
    """Check what a fit needs, on a copy of the task; nothing is trained, and no run directory is made.

    That each process has samples is told from their number; everything else is tried in one process.
    """
    folder = experiment.run_dir or experiment.home

    def options() -> str:
        refuse_options(experiment.options)
        return "they train something"

    def output() -> str:
        needed, free = check_room(experiment.task, folder, experiment.disable)
        return f"{folder}: checkpoints need about {needed:,} bytes, {free:,} are free"

    def data() -> str:
        datamodule = experiment.datamodule
        if not isinstance(datamodule, DataModule):
            raise Skipped(f"{type(datamodule).__name__} is no DataModule of firstlight: only its batches are tried")
        check_data(experiment.task, datamodule)
        return ", ".join(f"{len(rows):,} {split}" for split, rows in datamodule.indices.items()) + " samples"

    findings = [attempted("options", options), attempted("output", output), attempted("data", data)]
    if "FAIL" in (findings[0].state, findings[2].state):
        return findings
    trial: list[Finding] = []

    def start() -> str:
        run = TrialRun(experiment.all_callbacks(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They are for the run itself to show.
            try:
                _try(experiment, run)
            finally:
                trial.extend(run.findings)
        return "model, optimiser, schedule, data and callbacks go together"

    return [*findings, attempted("start", start), *trial]


def _try(experiment: Experiment, run: TrialRun) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    check_sizes(experiment.datamodule, experiment.trainer(callbacks=[], **quiet))
    one = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    with tempfile.TemporaryDirectory() as folder:
        # Without a least length, it ends where it is told to.
        trainer = experiment.trainer(
            **one,
            **quiet,
            num_sanity_val_steps=2,
            min_epochs=None,
            min_steps=None,
            fast_dev_run=False,
            default_root_dir=folder,
            callbacks=[run],
        )
        try:
            trainer.fit(deepcopy(experiment.task), datamodule=experiment.datamodule)
        except MisconfigurationException as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
        refuse_no_batches(trainer)
