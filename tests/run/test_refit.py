import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.checkpoints.io import read
from firstlight.cli.parser import CLI
from tests.helpers import CONFIG, called, newest, results

OPTIONS = ["--config", CONFIG, "--trainer.max_epochs=3", "--model.network.hidden=[16]"]


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("refit")
    return cwd, called("run", *OPTIONS, "--refit=true", cwd=cwd)


def test_refit_trains_on_training_and_validation_samples_for_the_steps_of_the_best_checkpoint(refitted, tmp_path):
    cwd, done = refitted
    run = newest(cwd)
    steps = results(run)["best"]["step"]
    assert f"refit  1,527 training and validation samples, {steps} steps\n" in done.stdout
    weights = read(run / "checkpoints" / "refit.ckpt")["state_dict"]

    experiment = CLI("fit", OPTIONS).experiment
    experiment.datamodule.joins_validation = True
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(experiment.task, datamodule=experiment.datamodule)
    for name, weight in experiment.task.state_dict().items():
        assert weights[name].equal(weight), name


def test_test_and_predict_take_the_refit_checkpoint_and_validate_the_best_one(refitted):
    cwd, done = refitted
    run = str(newest(cwd))
    metrics = results(newest(cwd))["metrics"]
    assert f"test/accuracy {metrics['test/accuracy']:.6g}" in called("test", "--run", run, cwd=cwd).stdout
    assert "(refit checkpoint)" in done.stdout
    assert "refit.ckpt" in called("predict", "--run", run, cwd=cwd).stdout
    assert "best.ckpt" in called("validate", "--run", run, cwd=cwd).stdout
    error = called("validate", "--run", run, "--ckpt=refit", cwd=cwd, code=2).stderr
    assert (
        error == "firstlight: refit.ckpt was trained on the validation samples, so it cannot be validated: use best\n"
    )


def test_a_run_that_trains_on_removes_the_refit_checkpoint(tmp_path):
    called("run", *OPTIONS, "--refit=true", cwd=tmp_path)
    run = newest(tmp_path)
    called("fit", "--run", str(run), "--trainer.max_epochs=4", "--refit=false", cwd=tmp_path)
    assert not (run / "checkpoints" / "refit.ckpt").exists()


def test_statistics_of_a_joined_split_are_those_of_the_fit_before():
    data = CLI("fit", [*OPTIONS, "--data=firstlight.data.Diabetes"]).experiment.datamodule
    data.joins_validation = True
    data.setup()
    assert len(data.dataset("train")) == len(data.indices["train"]) + len(data.indices["val"])
    raw = data.load().inputs[data.indices["train"]]
    torch.testing.assert_close(data.fitted["mean"].flatten(), torch.from_numpy(raw.mean(0)).double())


def test_refit_beside_a_time_is_refused(tmp_path):
    error = called("run", *OPTIONS, "--refit=true", "--time=10m", cwd=tmp_path, code=2).stderr
    assert error.startswith("firstlight: --refit trains once more after the time that --time gives")


def test_refit_without_a_best_checkpoint_is_refused(tmp_path):
    error = called("fit", *OPTIONS, "--refit=true", "--disable=best,early_stopping", cwd=tmp_path, code=2).stderr
    assert error.startswith("firstlight: --refit needs the steps of the best checkpoint: give --monitor NAME")


@pytest.mark.parametrize("verb", ["fit", "run"])
def test_refit_of_a_run_that_is_trained_already(verb, tmp_path):
    called(verb, *OPTIONS, "--trainer.max_epochs=1", cwd=tmp_path)
    run = newest(tmp_path)
    again = called(verb, "--run", str(run), "--refit=true", cwd=tmp_path).stdout
    assert "refit  1,527 training and validation samples, 40 steps" in again
    assert results(run)["checkpoint"] == "checkpoints/refit.ckpt"
