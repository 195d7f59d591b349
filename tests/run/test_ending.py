"""A run says what ended it and what keeps its schedule from its end, and `test` scores the weights of its end."""

import pytest
import torch
import yaml

from tests.helpers import CONFIG, called, logged, newest, results

LIGHTNING = "lightning.pytorch.callbacks."
SMALL = ["--config", CONFIG, "--model.network.hidden=[8]", "--trainer.log_every_n_steps=1", "--report=false"]


def with_callback(tmp_path, name, **options):
    """Return the option that adds one of Lightning's callbacks to a run."""
    file = tmp_path / "callback.yaml"
    file.write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": LIGHTNING + name, "init_args": options}]}})
    )
    return ["--config", str(file)]


def weights(run, name):
    checkpoint = torch.load(run / "checkpoints" / name, weights_only=True)
    return {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("network.")}, checkpoint


def test_a_run_tests_the_average_of_stochastic_weight_averaging(tmp_path):
    averaging = with_callback(tmp_path, "StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=1)
    printed = called("run", *SMALL, *averaging, "--trainer.max_epochs=3", cwd=tmp_path).stdout
    assert "; StochasticWeightAveraging replaces the schedule in the epochs that it averages" in printed
    assert "(final checkpoint: a callback changed the weights at the end)" in printed
    run = newest(tmp_path)
    average = next(
        state["average_model_state"]
        for key, state in weights(run, "last.ckpt")[1]["callbacks"].items()
        if key.startswith("StochasticWeightAveraging")
    )
    final, _ = weights(run, "final.ckpt")
    for name, weight in final.items():
        assert torch.equal(weight, average[name])
    assert results(run)["checkpoint"] == "checkpoints/final.ckpt"
    called("test", "--run", str(run), cwd=tmp_path)
    (evaluation,) = (run / "evaluations").iterdir()
    assert results(evaluation)["metrics"] == pytest.approx(results(run)["metrics"], rel=1e-6)
    assert results(evaluation)["checkpoint"].endswith("final.ckpt")


@pytest.mark.parametrize("start", [1, 3])
def test_a_run_that_stops_before_its_average_is_set_says_that_no_checkpoint_holds_it(start, tmp_path):
    averaging = with_callback(tmp_path, "StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=start)
    stop = ["--trainer.max_epochs=5", "--early_stopping.stopping_threshold=100", "--trainer.min_epochs=2"]
    printed = called("run", *SMALL, *averaging, *stop, cwd=tmp_path).stdout
    assert (
        "average  none: the run ended after epoch 2, and StochasticWeightAveraging sets its average after epoch 5; all "
        "checkpoints hold weights that are not averaged\n"
    ) in printed
    assert "(best checkpoint)" in printed
    assert not (newest(tmp_path) / "checkpoints" / "final.ckpt").exists()


def test_a_run_tests_the_moving_average_that_it_validated(tmp_path):
    averaging = with_callback(tmp_path, "EMAWeightAveraging", decay=0.99)
    called("run", *SMALL, *averaging, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    assert not (run / "checkpoints" / "final.ckpt").exists()
    called("test", "--run", str(run), cwd=tmp_path)
    called("validate", "--run", str(run), cwd=tmp_path)
    tested, validated = sorted((run / "evaluations").iterdir())
    assert results(tested)["metrics"] == pytest.approx(results(run)["metrics"], rel=1e-6)
    assert results(validated)["metrics"]["val/loss"] == pytest.approx(results(run)["best"]["val/loss"], rel=1e-6)


def test_a_run_without_such_a_callback_has_no_final_checkpoint(tmp_path):
    called("fit", *SMALL, "--trainer.max_epochs=1", cwd=tmp_path)
    assert sorted(file.name for file in (newest(tmp_path) / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_that_max_time_ended_says_so_and_never_names_the_patience(tmp_path):
    time = ["--trainer.max_epochs=5000", "--trainer.max_time=00:00:00:02", "--disable=early_stopping"]
    printed = called("fit", *SMALL, *time, cwd=tmp_path).stdout
    assert "200,000 optimiser steps, 10,000 of them warm-up; trainer.max_time may end the run before" in printed
    assert "stopped by trainer.max_time, " in printed
    again = called("fit", "--run", str(newest(tmp_path)), cwd=tmp_path).stdout
    assert "nothing to do: stopped by trainer.max_time after" in again
    assert "increase --trainer.max_time" in again
    assert "patience" not in printed + again


def test_a_finished_run_names_the_limit_that_it_reached(tmp_path):
    called("fit", *SMALL, "--trainer.max_steps=10", cwd=tmp_path)
    again = called("fit", "--run", str(newest(tmp_path)), cwd=tmp_path).stdout
    assert "nothing to do: all 10 steps are done; increase --trainer.max_steps to continue" in again


def test_the_patience_is_named_only_when_it_stopped_the_run(tmp_path):
    patience = ["--early_stopping.patience=1", "--early_stopping.min_delta=100", "--trainer.max_epochs=9"]
    printed = called("fit", *SMALL, *patience, cwd=tmp_path).stdout
    assert "stopped early, 80 of 360 steps" in printed
    again = called("fit", "--run", str(newest(tmp_path)), cwd=tmp_path).stdout
    assert "increase --early_stopping.patience" in again
    threshold = ["--early_stopping.stopping_threshold=100", "--trainer.max_epochs=9"]
    printed = called("fit", *SMALL, *threshold, cwd=tmp_path).stdout
    assert "stopped early by stopping_threshold, 40 of 360 steps" in printed


def test_a_resumed_run_keeps_the_rate_that_the_finder_found(tmp_path):
    finder = with_callback(tmp_path, "LearningRateFinder", num_training_steps=30, min_lr=1e-4, max_lr=0.1)
    called("fit", *SMALL, *finder, "--trainer.max_epochs=1", "--model.schedule=Constant", cwd=tmp_path)
    run = newest(tmp_path)
    (peak,) = {rate for _, rate in logged(run, "lr")}
    assert peak != 0.003
    called("fit", "--run", str(run), "--trainer.max_epochs=2", cwd=tmp_path)
    assert logged(run, "lr") == [(step, peak) for step in range(80)]


def test_a_batch_size_that_changes_after_the_plan_is_refused(tmp_path):
    refused = called("fit", *SMALL, *with_callback(tmp_path, "BatchSizeFinder"), cwd=tmp_path, code=2).stderr
    assert "then give --data.batch_size" in refused


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.overfit_batches=3", "--trainer.max_epochs=2"], 6),
        (["--trainer.min_epochs=3", "--trainer.max_epochs=1", "--trainer.limit_train_batches=5"], 5),
        (
            [
                "--trainer.reload_dataloaders_every_n_epochs=1",
                "--trainer.max_epochs=2",
                "--trainer.limit_train_batches=5",
            ],
            10,
        ),
    ],
)
def test_options_that_change_the_number_of_steps_are_planned(options, steps, tmp_path):
    printed = called("fit", *SMALL, *options, cwd=tmp_path).stdout
    assert f" {steps} optimiser steps" in printed
    assert f", {steps} steps" in printed
