"""A run keeps its outputs for each sample, and they are those of its metrics and of `predict`."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from firstlight.errors import UsageError
from firstlight.insight.contributions import contributions
from firstlight.run import output_recorder
from firstlight.run.outputs import outputs_path, read_outputs, write_outputs
from tests.helpers import called, newest, results

SHORT = ("--trainer.max_epochs=1", "--disable=progress,early_stopping", "--report=false")


def trained(name, cwd, *options):
    called("run", "--config", f"firstlight:{name}", *SHORT, *options, cwd=cwd)
    return newest(cwd, name)


def predicted(run, cwd):
    called("predict", "--run", str(run), cwd=cwd)
    (path,) = run.glob("evaluations/predict-*/predictions.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def mean_loss(stored):
    return np.average(stored["loss"].astype(float), weights=stored["weight"])


@pytest.mark.parametrize("name", ["digits_mlp", "breast_cancer", "topics", "bicycles", "corpus_lm"])
def test_outputs_give_the_logged_loss_and_accuracy(name, tmp_path):
    run = trained(name, tmp_path)
    found = results(run)
    assert found["outputs"] == {"test": "outputs/test.npz", "val": "outputs/val.npz"}
    for split, metrics in (("test", found["metrics"]), ("val", found["best"])):
        stored = read_outputs(run, split)
        assert mean_loss(stored) == pytest.approx(metrics[f"{split}/loss"], rel=1e-6)
        if "predictions" in stored:
            right = stored["predictions"] == stored["targets"]
            assert right.mean() == pytest.approx(metrics[f"{split}/accuracy"], rel=1e-6)


def test_outputs_equal_the_predictions_in_the_same_rows(tmp_path):
    run = trained("wine", tmp_path)
    rows, stored = predicted(run, tmp_path), read_outputs(run, "test")
    assert stored["index"].tolist() == [int(row["index"]) for row in rows]
    expected = [[float(value) for name, value in row.items() if name.startswith("probabilities/")] for row in rows]
    assert stored["outputs"] == pytest.approx(np.array(expected), abs=1e-6)


def test_regression_outputs_are_exact_and_in_the_units_of_the_data(tmp_path):
    run = trained("diabetes", tmp_path)
    rows, stored = predicted(run, tmp_path), read_outputs(run, "test")
    for name, column in (("outputs", "prediction"), ("targets", "target")):
        assert stored[name].dtype == np.float64
        assert stored[name].tolist() == [float(row[column]) for row in rows]


def test_a_loss_with_class_weights_keeps_the_weight_of_each_sample(tmp_path):
    run = trained("wine", tmp_path, "--model.class_weights=balanced")
    stored = read_outputs(run, "test")
    assert len(set(stored["weight"].tolist())) == 3
    assert mean_loss(stored) == pytest.approx(results(run)["metrics"]["test/loss"], rel=1e-6)


def test_test_repeats_the_outputs_of_the_run_and_keeps_others_apart(tmp_path):
    run = trained("wine", tmp_path)
    path = outputs_path(run, "test")
    stored = path.read_bytes()
    path.unlink()
    called("test", "--run", str(run), cwd=tmp_path)
    assert path.read_bytes() == stored
    called("test", "--run", str(run), "--trainer.limit_test_batches=1", "--data.batch_size=8", cwd=tmp_path)
    called("test", "--run", str(run), "--ckpt=last", cwd=tmp_path)
    assert path.read_bytes() == stored
    others = [read_outputs(each.parent, "test") for each in run.glob("evaluations/*/outputs")]
    assert sorted(len(each["index"]) for each in others) == [8, 27]


def test_last_checkpoint_of_a_run_without_a_best_one_is_tested(tmp_path):
    called("fit", "--config", "firstlight:wine", *SHORT, "--trainer.max_steps=1", cwd=tmp_path)
    run = newest(tmp_path, "wine")
    assert not (run / "checkpoints" / "best.ckpt").exists()
    called("test", "--run", str(run), "--ckpt=last", cwd=tmp_path)
    (tested,) = run.glob("evaluations/*/outputs/test.npz")
    assert len(read_outputs(tested.parents[1], "test")["index"]) == 27


def test_a_run_that_trains_on_has_no_outputs_of_its_earlier_checkpoint(tmp_path):
    run = trained("wine", tmp_path)
    called("fit", "--run", str(run), "--trainer.max_epochs=2", cwd=tmp_path)
    assert not outputs_path(run, "test").exists()
    assert not outputs_path(run, "val").exists()


MODULE = """
import torch
from lightning.pytorch import LightningModule

class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
        self.calls = 0
    def forward(self, inputs):
        self.calls += not self.training
        return self.net(inputs.flatten(1)) + 1e-3 * torch.rand(1)
    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def training_step(self, batch, index):
        return self.loss(batch)
    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch))
    def test_step(self, batch, index):
        self.log("test/loss", self.loss(batch))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Predicts(Mine):
    def predict_step(self, batch, index):
        return {"prediction": self(batch[0]).argmax(1), "extra": torch.rand(1).expand(len(batch[0]))}

class Fails(Mine):
    def predict_step(self, batch, index):
        raise KeyError("rows")

class Ragged(Mine):
    def predict_step(self, batch, index):
        return torch.zeros(len(batch[0]), 3 + index)
"""


def of_module(name, cwd, *options):
    (cwd / "mine.py").write_text(MODULE)
    own = ("--model", f"mine.{name}", "--data", "firstlight.data.Digits", "--monitor=val/loss", "--mode=min")
    done = called("run", *own, *SHORT, *options, cwd=cwd)
    return newest(cwd, "unnamed"), done.stdout


def test_a_module_of_the_user_is_recorded_and_tested_as_without_it(tmp_path):
    plain, _ = of_module("Mine", tmp_path)
    run, _ = of_module("Predicts", tmp_path)
    assert results(run)["metrics"] == results(plain)["metrics"]
    stored = read_outputs(run, "test")
    assert stored["kind"] == "other"
    assert stored["targets"].shape == stored["predictions"].shape == (270,)


STEPS = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Changes(LightningModule):
    "Both steps count, and change their batch; the test changes its outputs."
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
        self.register_buffer("counted", torch.zeros(()), persistent=False)
        self.seen = 0
    def forward(self, inputs):
        return self.net(inputs)
    def training_step(self, batch, index):
        return (self(batch[0]) - 1).square().mean()
    def validation_step(self, batch, index):
        self.log("val/loss", self.training_step(batch, index))
    def test_step(self, batch, index):
        outputs = self(batch[0])
        self.seen += len(outputs)
        self.counted += len(outputs)
        outputs.zero_()
        batch[0].zero_()
    def on_test_epoch_end(self):
        self.log_dict({"test/seen": float(self.seen), "test/counted": self.counted})
    def predict_step(self, batch, index):
        outputs = self(batch[0])
        self.seen += len(outputs)
        self.counted += len(outputs)
        return {"prediction": outputs[:, 0], "target": batch[1]}
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class ByLength:
    "Batches of the longest samples first."
    def __iter__(self):
        return iter([list(range(start, start - 4, -1)) for start in (18, 14, 10, 6)] + [[2, 1, 0]])
    def __len__(self):
        return 5

class Data(LightningDataModule):
    def __init__(self, sorts: bool = False):
        super().__init__()
        self.sorts = sorts
        self.samples = TensorDataset(torch.arange(38.0).view(19, 2) / 38, torch.arange(19))
    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=4)
    def val_dataloader(self):
        return DataLoader([(inputs.clone(), target) for inputs, target in self.samples], batch_size=4, drop_last=True)
    def test_dataloader(self):
        if self.sorts:
            return DataLoader(self.samples, batch_sampler=ByLength())
        return DataLoader(self.samples, batch_size=4)
    predict_dataloader = test_dataloader
"""


def of_steps(cwd, *options, verb="run"):
    (cwd / "steps.py").write_text(STEPS)
    own = ("--model=steps.Changes", "--data=steps.Data", "--monitor=val/loss", "--mode=min")
    done = called(verb, *own, *SHORT, *options, cwd=cwd)
    return newest(cwd, "unnamed"), done.stdout


def test_predict_step_and_test_step_do_not_change_what_the_other_one_reads(tmp_path):
    run, printed = of_steps(tmp_path)
    assert results(run)["metrics"] == {"test/seen": 19, "test/counted": 19}
    assert "test/seen 19, test/counted 19" in printed
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    expected = torch.nn.functional.linear(torch.arange(38.0).view(19, 2) / 38, *weights.values())[:, 0]
    for split, size in (("test", 19), ("val", 16)):  # The loader of the validation drops its last batch.
        stored = read_outputs(run, split)
        assert stored["index"].tolist() == stored["targets"].tolist() == list(range(size))
        assert stored["outputs"] == pytest.approx(expected[:size].numpy(), rel=1e-5)
    outputs_path(run, "test").unlink()
    called("test", "--run", str(run), cwd=tmp_path)
    assert read_outputs(run, "test")["outputs"] == pytest.approx(expected.numpy(), rel=1e-5)


def test_samples_that_a_batch_sampler_sorts_get_no_index_of_the_data(tmp_path):
    run, _ = of_steps(tmp_path, "--data.sorts=true")
    assert "does not keep the order" in results(run)["outputs"]["test"]
    assert not outputs_path(run, "test").exists() and outputs_path(run, "val").exists()
    printed = called("predict", "--run", str(run), cwd=tmp_path).stdout
    line = "predict  index counts the samples as the data loader yields them, not as the data set holds them"
    assert line in printed.splitlines()
    called("predict", "--run", str(run), "--data.sorts=false", cwd=tmp_path)
    assert line not in called("predict", "--run", str(run), "--data.sorts=false", cwd=tmp_path).stdout


@pytest.mark.parametrize("verb, split", [("test", "test"), ("validate", "val")])
def test_an_evaluation_without_batches_says_that_there_is_none(verb, split, tmp_path):
    limit = f"--trainer.limit_{split}_batches=0"
    none = f"none: there is no batch (limit_{split}_batches is 0, or there are no samples)"
    called("fit", "--config", "firstlight:wine", *SHORT, cwd=tmp_path)
    run = newest(tmp_path, "wine")
    printed = called(verb, "--run", str(run), limit, cwd=tmp_path).stdout
    assert f"{verb:<8} {none} (" in printed
    (evaluated,) = run.glob("evaluations/*/results.json")
    assert results(evaluated.parent)["metrics"] == {} and not list(run.rglob("*.npz"))


def test_a_run_without_a_test_says_so_and_ends_well(tmp_path):
    run, printed = of_steps(tmp_path, "--trainer.limit_test_batches=0", "--report=true")
    assert "\ntest   none: there is no batch (limit_test_batches is 0, or there are no samples) (best" in printed
    assert results(run)["metrics"] == {} and "best" in results(run)
    called("run", "--config", "firstlight:wine", *SHORT, "--trainer.limit_test_batches=0", cwd=tmp_path)


def test_a_module_without_predict_step_is_left_out_without_a_line(tmp_path):
    run, printed = of_module("Mine", tmp_path)
    assert "outputs" not in printed
    assert results(run)["outputs"]["test"] == "left out: Mine has no predict_step"
    assert not (run / "outputs").exists()


def test_a_predict_step_that_fails_ends_no_run(tmp_path):
    run, printed = of_module("Fails", tmp_path)
    line = "outputs of the test samples are left out: predicting with Fails fails (KeyError('rows'))"
    assert line in printed.splitlines()
    assert "test/loss" in results(run)["metrics"]


def test_predictions_of_several_shapes_end_no_run_and_are_refused_by_predict(tmp_path):
    run, printed = of_module("Ragged", tmp_path, "--report=true")
    assert "outputs of the test samples are left out: what Ragged.predict_step returns cannot be joined (" in printed
    assert "Sizes of tensors" in results(run)["outputs"]["test"] and not (run / "outputs").exists()
    assert results(run)["metrics"]["test/loss"] > 0
    error = called("predict", "--run", str(run), cwd=tmp_path, code=2).stderr
    assert error == "firstlight: Ragged.predict_step returns prediction of several shapes: pad it to one length\n"


NO_TARGETS = """
from firstlight.tasks import Classification

class Bare(Classification):
    def predict_step(self, batch, index):
        return {"prediction": self(batch[0]).argmax(1)}

class Doubled(Bare):
    def compute_loss(self, outputs, targets):
        return super().compute_loss(outputs, targets)
    def predict_step(self, batch, index):
        return self(batch[0]).argmax(1).repeat(2)
"""


def test_a_classification_whose_predict_step_returns_no_targets_is_recorded(tmp_path):
    (tmp_path / "bare.py").write_text(NO_TARGETS)
    run = trained("wine", tmp_path, "--model=bare.Bare", "--report=true")
    stored = read_outputs(run, "test")
    assert stored["predictions"].shape == stored["index"].shape == (27,) and "targets" not in stored
    assert mean_loss(stored) == pytest.approx(results(run)["metrics"]["test/loss"], rel=1e-6)
    called("test", "--run", str(run), "--model=bare.Doubled", cwd=tmp_path)
    (tested,) = run.glob("evaluations/*/results.json")
    assert "54 rows for 27 samples" in results(tested.parent)["outputs"]["test"]


def test_outputs_that_are_too_large_or_slow_are_left_out_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(output_recorder, "MAX_BYTES", 100)
    monkeypatch.setattr("firstlight.run.evaluate._MAX_SECONDS", 0.0)
    run = trained("wine", tmp_path)
    assert results(run)["outputs"] == {
        "test": "left out: they take more than 0 MiB",
        "val": "left out: one pass takes more than 0 s",
    }


def test_a_damaged_or_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"firstlight validate --run \S+ writes it"):
        read_outputs(tmp_path, "val")
    path = write_outputs(tmp_path, "val", {"kind": np.array("numbers"), "index": np.arange(3), "loss": np.ones(3)})
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"", json.dumps({}).encode(), whole[:90] + b"\0" * 40 + whole[130:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"val\.npz"):
            read_outputs(tmp_path, "val")
    write_outputs(tmp_path, "val", {"kind": np.array("numbers"), "index": np.arange(3), "loss": np.ones(2)})
    with pytest.raises(UsageError, match="does not hold the outputs"):
        read_outputs(tmp_path, "val")


class SureLinear(torch.nn.Module):
    """A network whose logits are so large that their probabilities are equal, or so near 1 that float32 rounds them."""

    def __init__(self, ends_in_sigmoid: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.ends_in_sigmoid = ends_in_sigmoid

    def forward(self, inputs):
        logits = 40 * inputs + 0 * self.layer(inputs)
        return logits.sigmoid() if self.ends_in_sigmoid else logits


@pytest.mark.parametrize("loss", ["BCEWithLogitsLoss", "BCELoss"])
def test_a_sure_network_has_the_metrics_of_its_run_in_comparisons_and_reports(loss, tmp_path):
    values = np.random.default_rng(0).normal(size=200)
    labels = np.where(np.arange(200) % 10, values > 0, values < 0).astype(int)
    rows = "".join(f"{value},{label}\n" for value, label in zip(values, labels, strict=True))
    (tmp_path / "data.csv").write_text(f"x,y\n{rows}")
    called(
        "run", "--model=firstlight.tasks.BinaryClassification", "--model.network=tests.run.test_outputs.SureLinear",
        f"--model.network.ends_in_sigmoid={loss == 'BCELoss'}", f"--model.loss=torch.nn.{loss}",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1",
        "--model.schedule=firstlight.schedules.Constant", "--data=firstlight.data.Table",
        "--data.path=data.csv", "--data.target=y", "--data.kind=binary",
        "--experiment=sure", *SHORT, "--report=true", cwd=tmp_path,
    )  # fmt: skip
    run = newest(tmp_path, "sure")
    found, stored, rows = results(run)["metrics"], read_outputs(run, "test"), predicted(run, tmp_path)
    probabilities = np.array([[float(row["probabilities/0"]), float(row["probabilities/1"])] for row in rows])
    targets = stored["targets"]
    expected = log_loss(targets, probabilities / probabilities.sum(1, keepdims=True))
    assert expected > 1  # A sure prediction is wrong.
    parts = contributions(stored)
    assert parts["log_loss"].mean() == pytest.approx(found["test/log_loss"], rel=1e-9)
    assert found["test/log_loss"] == pytest.approx(expected)
    ranked = [float(row["probabilities/1" if loss == "BCELoss" else "score"]) for row in rows]
    area = roc_auc_score(targets, ranked)
    assert parts["auroc"].mean() == pytest.approx(found["test/auroc"], rel=1e-9)
    assert found["test/auroc"] == pytest.approx(area)
    assert f"Area under the curve on the test split: {area:.4f}." in (run / "report.html").read_text()
    logged = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    (accuracy,) = [float(value) for _, name, value in logged if name == "fixed/accuracy_eval"]
    assert accuracy == pytest.approx(0.9, abs=0.03)


def test_labels_of_a_sure_network_have_the_area_of_their_logits(tmp_path):
    run = trained("topics", tmp_path)
    stored = read_outputs(run, "test")
    sure = {**stored, "logits": stored["logits"] * 1000, "outputs": (stored["logits"] > 0).astype(np.float32)}
    area = roc_auc_score(stored["targets"], sure["logits"])
    assert contributions(sure)["auroc"].mean() == pytest.approx(area)
    assert contributions(stored)["auroc"].mean() == pytest.approx(results(run)["metrics"]["test/auroc"])
