"""The verbs of the command line: `run`, `fit`, `check`, `validate`, `test` and `predict`."""

from firstlight.cli.parser import CLI
from firstlight.errors import UsageError
from firstlight.preflight.report import check as check_experiment

__all__ = ["check", "fit", "predict", "run", "test", "validate"]


def run(args: list[str]) -> None:
    """Fit, then test the best checkpoint."""
    experiment = CLI("run", args).training()
    if "best" in experiment.disable or experiment.options["fast_dev_run"]:
        raise UsageError("run tests the best checkpoint, and none would be kept: use fit, or keep it")
    results = experiment.fit() or experiment.untested()
    if results is not None:
        try:
            results["metrics"] = experiment.test_best()
        finally:
            experiment.write_results(results)


def fit(args: list[str]) -> None:
    """Train, or go on with a run."""
    experiment = CLI("fit", args).training()
    results = experiment.fit()
    if results is not None:
        experiment.write_results(results)


def check(args: list[str]) -> None:
    """Print what is right and what is wrong with a fit, and train nothing."""
    findings = check_experiment(CLI("check", args).training())
    for finding in findings:
        print(finding)
    if failed := [finding.check for finding in findings if finding.state == "FAIL"]:
        raise UsageError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def validate(args: list[str]) -> None:
    """Score a checkpoint on the validation split."""
    CLI("validate", args).evaluate("validate")


def test(args: list[str]) -> None:
    """Score a checkpoint on the test split."""
    CLI("test", args).evaluate("test")


def predict(args: list[str]) -> None:
    """Write a checkpoint's predictions for the test split."""
    CLI("predict", args).evaluate("predict")
