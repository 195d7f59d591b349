"""The verbs of the command line: `run`, `fit`, `check`, `validate`, `test`, `predict` and `export`."""

import logging
from typing import Any

from firstlight.checkpoints.io import read_checkpoint_metrics
from firstlight.cli.parser import CLI
from firstlight.compat import without_side_effects
from firstlight.errors import UsageError
from firstlight.preflight.report import CHECKS
from firstlight.preflight.rules import refuse_no_step
from firstlight.run import directory
from firstlight.run.evaluate import evaluate, test_trained
from firstlight.run.experiment import is_first_process
from firstlight.run.export import export as export_checkpoint
from firstlight.run.export.formats import FORMATS


@without_side_effects()
def run(args: list[str]) -> None:
    """Fit, then test the best checkpoint."""
    cli = CLI("run", args)
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
        if results["metrics"] and not _lacks_refit(cli):
            return
    if results is not None:
        try:
            _refit(cli, args, results)
            results |= test_trained(experiment)
        finally:
            experiment.write_results(results)


@without_side_effects()
def fit(args: list[str]) -> None:
    """Train, or resume a run."""
    cli = CLI("fit", args)
    experiment = cli.training()
    results = experiment.fit()
    if results is None and _lacks_refit(cli):
        assert experiment.run_dir is not None
        results = directory.read_results(experiment.run_dir)
    if results is not None:
        try:
            _refit(cli, args, results)
        finally:
            experiment.write_results(results)


def _lacks_refit(cli: CLI) -> bool:
    """Return whether `--refit` is given, but was interrupted or not given when the run was trained."""
    run = cli.experiment.run_dir
    return cli.config.refit and is_first_process() and not (run and (run / "checkpoints" / "refit.ckpt").is_file())


def _refit(cli: CLI, args: list[str], results: dict[str, Any]) -> None:
    """With `--refit`, train on all but the test samples, for the steps after which the best checkpoint was written."""
    if not cli.config.refit:
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
        again.refit(cli.experiment.run_dir, int(read_checkpoint_metrics(best)["step"]))
        results["checkpoint"] = "checkpoints/refit.ckpt"
    except UsageError as error:
        print(f"refit  skipped: {error}")


@without_side_effects()
def check(args: list[str]) -> None:
    """Print what is right and wrong with a fit, without training."""
    results = CLI("check", args).training().check()
    for result in results:
        print(result)
    tried = {result.check for result in results}
    if failed := [result.check for result in results if result.state == "FAIL"]:
        untried = len(CHECKS) - len(tried)
        more = f"; {untried} more check{'s' * (untried > 1)} not tried" if untried else ""
        raise UsageError(f"{len(failed)} of {len(tried)} checks failed: {', '.join(failed)}{more}")


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
