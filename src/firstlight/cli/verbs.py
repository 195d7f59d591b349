"""The verbs of the command line: `run`, `repeat`, `fit`, `check`, `lr`, `validate`, `test`, `predict` and `export`."""

import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from firstlight.checkpoints.io import read_checkpoint_metrics
from firstlight.cli.parser import CLI
from firstlight.cli.side_effects import isolated, without_side_effects
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError, check_range, emit, printable, say
from firstlight.preflight.draw import refuse_plot
from firstlight.preflight.report import CHECKS, told
from firstlight.preflight.rules import refuse_no_step
from firstlight.run import directory, group
from firstlight.run.evaluate import evaluate, test_trained
from firstlight.run.experiment import Experiment, is_first_process
from firstlight.run.export import export as export_checkpoint
from firstlight.run.export.formats import FORMATS
from firstlight.run.outputs import outputs_path


@without_side_effects()
def run(args: list[str]) -> None:
    """Fit, then test the best checkpoint."""
    _run(CLI("run", args), args)


def _run(cli: CLI, args: list[str]) -> None:
    experiment = cli.training()
    if experiment.monitored is None:
        module = type(experiment.task).__name__
        raise UsageError(
            f"run tests the best checkpoint, but {module} declares no monitor: give --monitor NAME and --mode, or use "
            "fit"
        )
    refuse_no_step(experiment.task, experiment.datamodule, "run")
    if "best" in experiment.disable or experiment.options["fast_dev_run"]:
        raise UsageError("run tests the best checkpoint, but none will be written: use fit, or enable best")
    results = experiment.fit()
    if results is None and experiment.run_dir and is_first_process():
        # The run was trained before. It is tested now, unless it was tested then.
        results = directory.read_results(experiment.run_dir)
        if results["metrics"] and not _lacks_refit(cli, results):
            _tell_end(experiment, results)
            return
    if results is not None:
        try:
            _refit(cli, args, results)
            results |= test_trained(experiment)
        finally:
            experiment.write_results(results, cli.config.report)
        _tell_end(experiment, results)


def sweep(args: list[str]) -> None:
    """Search for good settings."""
    from firstlight.cli.sweep import sweep as search

    search(args)


def repeat(args: list[str]) -> None:
    """Run with several seeds, or on several folds, one after the other; print the mean of each metric."""
    with isolated():
        cli = CLI("repeat", args)
        repetitions = _repetitions(cli)
        monitor = cli.experiment.monitored.monitor if cli.experiment.monitored else ""
        allow_inexact = cli.config.allow_inexact
        name, runs = "", dict[int, Path]()
        if cli.config.resume:
            name, runs = group.find_group(cli.experiment_dir, repetitions, yaml.safe_load(cli.experiment.config))
        del cli
    failed = []
    for index in range(repetitions.count):
        place = {"kind": repetitions.kind, "index": index, "count": repetitions.count}
        title = f"{repetitions.label(index)}, {index + 1} of {repetitions.count}"
        if index in runs:
            directory.write_group(runs[index], {"name": name, **place})  # The count may have grown.
            if group.is_finished(runs[index]):
                say(f"repeat {title}: finished in {runs[index]}")
                continue
        say(f"repeat {title}")
        with isolated():
            options = [*args, *repetitions.options(index)]
            if index in runs:
                options = ["--run", str(runs[index]), *(["--allow_inexact"] if allow_inexact else [])]
            try:
                cli = CLI("repeat", options)
                cli.experiment.group = {"name": name, **place} if name else place
                _run(cli, options)
            except TrainingError as error:
                failed.append(repetitions.label(index))
                sys.stderr.write(f"firstlight: {printable(str(error))}\n")
                emit("error", kind="training", message=str(error), exit_code=1)
            except (KeyboardInterrupt, SystemExit):
                say("repeat interrupted; continue with the same command and --resume", always=True)
                raise
            run = cli.experiment.run_dir
            del cli
        if run is not None and (made := directory.read_group(run)):
            name, runs[index] = made["name"], run
            directory.refuse_mixed_data(runs.values())
    finished = {index: run for index, run in runs.items() if group.is_finished(run)}
    if finished:
        _tell_group(name, repetitions, finished, monitor)
    if failed:
        raise TrainingError(f"{len(failed)} of {repetitions.count} repetitions failed: {', '.join(failed)}")


def _tell_group(name: str, repetitions: group.Repetitions, runs: dict[int, Path], monitor: str) -> None:
    """Print the finished runs of a group, and the mean of each metric."""
    lines = [
        f"group  {name}: {len(runs)} of {repetitions.count} {repetitions.kind}",
        *group.table(repetitions, runs, monitor),
    ]
    found = group.statistics(repetitions, runs.values()) if len(runs) > 1 else {}
    for line in [*lines, *(group.means(repetitions, found) if found else [])]:
        say(line, always=True)
    emit("group", name=name, kind=repetitions.kind, runs=[str(run) for run in runs.values()], metrics=found)


def _repetitions(cli: CLI) -> group.Repetitions:
    """Return what `repeat` repeats, or refuse what it cannot repeat."""
    seeds, folds, experiment = cli.config.seeds, cli.config.folds, cli.training()
    if (seeds is None) == (folds is None):
        raise UsageError("repeat needs --seeds N or --folds N, one of them")
    check_range("repeat", "[2, inf)", **({"seeds": seeds} if folds is None else {"folds": folds}))
    if cli.run_dir is not None:
        raise UsageError(f"repeat starts new runs: in place of --run, give --config {cli.run_dir / 'config.yaml'}")
    if folds and not isinstance(experiment.datamodule, DataModule):
        name = type(experiment.datamodule).__name__
        raise UsageError(f"--folds needs a firstlight.data module, and {name} is not one: use --seeds")
    if (processes := experiment.trainer(logger=False).world_size) > 1:
        raise UsageError(f"repeat trains in one process, but the trainer has {processes}: add --trainer.devices=1")
    return group.Repetitions("seeds" if folds is None else "folds", seeds or folds, cli.seed)


@without_side_effects()
def fit(args: list[str]) -> None:
    """Train, or resume a run."""
    cli = CLI("fit", args)
    experiment = cli.training()
    results = experiment.fit()
    if results is None and is_first_process():
        assert experiment.run_dir is not None
        results = directory.read_results(experiment.run_dir)
        if not _lacks_refit(cli, results):
            _tell_end(experiment, results)
            return
    if results is not None:
        try:
            _refit(cli, args, results)
        finally:
            experiment.write_results(results)
        _tell_end(experiment, results)


def _tell_end(experiment: Experiment, results: dict[str, Any]) -> None:
    """With `--json`, print that a run has ended, and its results."""
    emit("end", verb=experiment.verb, run=str(experiment.run_dir), **results)


def _lacks_refit(cli: CLI, results: dict[str, Any]) -> bool:
    """Return whether `--refit` is given, and the results of the run are not those of a refit."""
    run = cli.experiment.run_dir
    is_done = "refit" in results and run is not None and (run / "checkpoints" / "refit.ckpt").is_file()
    return cli.config.refit and not is_done


def _refit(cli: CLI, args: list[str], results: dict[str, Any]) -> None:
    """With `--refit`, train on all but the test samples, for the steps after which the best checkpoint was written."""
    if not _lacks_refit(cli, results):
        return
    assert cli.experiment.run_dir is not None
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # The data module has said it all.
    try:
        again = CLI(cli.verb, args).experiment
    finally:
        logging.disable(level)
    try:
        best = directory.checkpoint(cli.experiment.run_dir, "best")  # A run that never validated has none.
        steps = int(read_checkpoint_metrics(best)["step"])
        results["refit"] = again.refit(cli.experiment.run_dir, steps, cli.experiment.stopped_early)
        results |= {"checkpoint": "checkpoints/refit.ckpt", "metrics": {}}
        for of_best in ("per_class", "outputs"):  # An earlier test was one of another checkpoint.
            results.pop(of_best, None)
        outputs_path(cli.experiment.run_dir, "test").unlink(missing_ok=True)
    except UsageError as error:
        say(f"refit  skipped: {error}", always=True)


@without_side_effects()
def check(args: list[str]) -> None:
    """Print what is wrong with a fit, its plan and its time, without training."""
    cli = CLI("check", args)
    plot = None if cli.config.plot is None else Path(cli.config.plot).expanduser()
    if plot is not None:
        refuse_plot(plot)
    experiment = cli.training()
    emit("start", verb="check")
    found = experiment.check()
    for finding in found.findings:
        say(f"{finding.severity:<8} {finding.name}: {told(finding)}", always=finding.severity != "info")
        emit("finding", **finding.plain())
    for result in found.results:
        emit("check", name=result.check, state=result.state.lower(), text=result.text)
    for line in found.lines(cli.config.verbose):
        say(line)
    if plot is not None:
        found.plot(plot)
        say(f"plot     {plot}")
    if found.failed:
        tried = len(CHECKS) - found.untried
        more = f"; {found.untried} more check{'s' * (found.untried > 1)} not tried" if found.untried else ""
        raise UsageError(f"{len(found.failed)} of {tried} checks failed: {', '.join(found.failed)}{more}")
    emit("end", verb="check", seconds=found.facts.seconds)


def lr(args: list[str]) -> None:
    """Suggest a learning rate."""
    from firstlight.cli.rate import suggest_rate

    suggest_rate(args)


@without_side_effects()
def validate(args: list[str]) -> None:
    """Evaluate a checkpoint on the validation split."""
    cli = CLI("validate", args)
    evaluate(cli.experiment, "validate", cli.config.ckpt)


@without_side_effects()
def test(args: list[str]) -> None:
    """Evaluate a checkpoint on the test split."""
    cli = CLI("test", args)
    evaluate(cli.experiment, "test", cli.config.ckpt)


@without_side_effects()
def predict(args: list[str]) -> None:
    """Write the predictions of a checkpoint for the test split."""
    cli = CLI("predict", args)
    evaluate(cli.experiment, "predict", cli.config.ckpt)


@without_side_effects()
def export(args: list[str]) -> None:
    """Write a checkpoint for other programs."""
    cli = CLI("export", args)
    if cli.config.to is None:
        raise UsageError(f"export needs a format: --to {', --to '.join(FORMATS)}")
    export_checkpoint(cli.experiment, cli.config.to, cli.config.ckpt)
