import shutil

import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.checkpoints.io import read
from firstlight.cli.parser import CLI
from tests.helpers import CONFIG, called, newest, results

CALLBACKS = "--trainer.callbacks"
OPTIONS = ["--report=false", "--config", CONFIG, "--trainer.max_epochs=3", "--model.network.hidden=[16]"]


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("refit")
    return cwd, called("run", *OPTIONS, "--refit=true", cwd=cwd)


def trained_on_both(folder, **limits):
    """Return the weights after plain Lightning has trained on the training and validation samples together."""
    experiment = CLI("fit", OPTIONS).experiment
    experiment.datamodule.joins_validation = True
    trainer = Trainer(
        **limits, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(experiment.task, datamodule=experiment.datamodule)
    return experiment.task.state_dict()


def assert_same(weights, run):
    for name, weight in read(run / "checkpoints" / "refit.ckpt")["state_dict"].items():
        assert weights[name].equal(weight), name


def test_refit_of_a_whole_run_takes_as_many_epochs_at_the_same_learning_rates(refitted, tmp_path):
    cwd, done = refitted
    run = newest(cwd)
    assert results(run)["best"]["epoch"] == 3
    assert "refit  1,527 training and validation samples, 144 steps: the epochs and learning rates" in done.stdout
    assert results(run)["refit"] == {"samples": 1527, "steps": 144, "follows_fit": True}
    assert_same(trained_on_both(tmp_path, max_epochs=3), run)


def test_refit_of_a_run_that_was_best_before_its_end_stops_there_at_the_same_learning_rates(tmp_path, capsys):
    experiment = CLI("fit", OPTIONS).experiment
    (tmp_path / "checkpoints").mkdir()
    done = experiment.refit(tmp_path, steps=40, stopped_early=False)
    assert done == {"samples": 1527, "steps": 48, "follows_fit": True}
    assert "epoch  1/1, step 48," in capsys.readouterr().err
    (optimizer,) = read(tmp_path / "checkpoints" / "refit.ckpt")["optimizer_states"]
    schedule = experiment.task.optimization.schedule
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.003 * schedule(48, 144))


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches:UserWarning")
@pytest.mark.parametrize(
    ("options", "best", "steps"),
    [
        (["--trainer.accumulate_grad_batches=5"], 24, 30),  # 40 batches are 8 steps, and 48 are 10.
        (["--trainer.limit_train_batches=7"], 21, 21),
        (["--trainer.overfit_batches=7"], 14, 14),
        ([f"{CALLBACKS}+=GradientAccumulationScheduler", f"{CALLBACKS}.scheduling={{0: 30, 1: 25}}"], 4, 4),
        (["--trainer.max_steps=100", "--trainer.max_epochs=-1"], 100, 100),
    ],
)
def test_refit_counts_the_steps_that_an_epoch_has(options, best, steps, tmp_path):
    experiment = CLI("fit", [*OPTIONS, *options]).experiment
    (tmp_path / "checkpoints").mkdir()
    assert experiment.refit(tmp_path, steps=best, stopped_early=False)["steps"] == steps
    assert read(tmp_path / "checkpoints" / "refit.ckpt")["global_step"] == steps


def test_refit_of_a_run_that_stopped_early_takes_the_steps_of_the_best_checkpoint(tmp_path):
    options = ["--model.optimizer.lr=0", "--early_stopping.patience=1"]  # The loss is never below the first one.
    done = called("run", *OPTIONS, "--refit=true", *options, cwd=tmp_path)
    assert "40 steps: as many as the best checkpoint, with a schedule of its own" in done.stdout
    assert results(newest(tmp_path))["refit"] == {"samples": 1527, "steps": 40, "follows_fit": False}


def test_test_and_predict_take_the_refit_checkpoint_and_validate_the_best_one(refitted, tmp_path):
    cwd, done = refitted
    run = str(newest(cwd))
    metrics = results(newest(cwd))["metrics"]
    assert f"test/accuracy {metrics['test/accuracy']:.6g}" in called("test", "--run", run, cwd=cwd).stdout
    assert "(refit checkpoint)" in done.stdout
    assert "refit.ckpt" in called("predict", "--run", run, cwd=cwd).stdout
    assert "best.ckpt" in called("validate", "--run", run, cwd=cwd).stdout
    copied = shutil.copy(newest(cwd) / "checkpoints" / "refit.ckpt", tmp_path / "copied.ckpt")
    for ckpt, name in (("refit", "refit.ckpt"), (copied, "copied.ckpt")):
        error = called("validate", "--run", run, f"--ckpt={ckpt}", cwd=cwd, code=2).stderr
        told = f"firstlight: {name} was trained on the validation samples, so it cannot be validated: use best\n"
        assert error == told


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
    assert "refit  1,527 training and validation samples, 48 steps" in again
    assert results(run)["checkpoint"] == "checkpoints/refit.ckpt"


def test_refit_of_a_run_that_was_tested_removes_what_the_best_checkpoint_reached(tmp_path):
    called("run", *OPTIONS, "--trainer.max_epochs=1", cwd=tmp_path)
    run = newest(tmp_path)
    called("fit", "--run", str(run), "--refit=true", cwd=tmp_path)
    found = results(run)
    assert found["checkpoint"] == "checkpoints/refit.ckpt" and found["metrics"] == {}
    assert not {"per_class", "outputs"} & found.keys() and not (run / "outputs" / "test.npz").exists()
    again = called("run", "--run", str(run), "--refit=true", cwd=tmp_path).stdout
    assert "refit  " not in again and "(refit checkpoint)" in again
    assert results(run)["metrics"]["test/loss"] > 0 and (run / "outputs" / "test.npz").is_file()


PLATEAU = """
import torch
from lightning.pytorch import LightningModule

class Plateau(LightningModule):
    monitor = "val/loss"
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
    def training_step(self, batch, index):
        return self.loss(batch)
    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch))
    def test_step(self, batch, index):
        self.log("test/loss", self.loss(batch))
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
"""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            [
                "--trainer.callbacks=lightning.pytorch.callbacks.StochasticWeightAveraging",
                "--trainer.callbacks.swa_lrs=0.01", "--trainer.callbacks.swa_epoch_start=1",
            ],
            "StochasticWeightAveraging averages the last epochs, and a refit plans steps: use EMAWeightAveraging",
        ),
        (["--model=plateau.Plateau", "--mode=min"], "ReduceLROnPlateau conditioned on metric val/loss which is not"),
    ],
)  # fmt: skip
def test_a_refit_that_would_train_otherwise_than_the_run_is_skipped_and_the_run_is_tested(options, reason, tmp_path):
    (tmp_path / "plateau.py").write_text(PLATEAU)
    base = OPTIONS if "plateau" not in options[0] else ["--data=firstlight.data.Digits", "--trainer.max_epochs=2"]
    done = called("run", *base, *options, "--experiment=digits_mlp", "--refit=true", cwd=tmp_path)
    assert "refit  skipped: " in done.stdout and reason in done.stdout
    found = results(newest(tmp_path))
    assert found["metrics"]["test/loss"] > 0
    assert "refit" not in found["checkpoint"]
    assert not (newest(tmp_path) / "checkpoints" / "refit.ckpt").exists()
