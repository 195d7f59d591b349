"""Metrics of torchmetrics that a user adds to those of a task."""

import csv
import math
import re

import pytest
import torch
from sklearn import metrics as reference
from torch import nn
from torchmetrics import classification, regression

from firstlight.__main__ import main
from firstlight.errors import UsageError
from firstlight.tasks import BinaryClassification, Classification, MultilabelClassification, Regression
from tests.helpers import CONFIG, DDP, Ranks, called, logged, newest, results
from tests.tasks.helpers import loader, parts, predicted, trainer

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(150, 4, generator=GENERATOR)
CLASSES = torch.randint(0, 3, (150,), generator=GENERATOR)
LABELS = (torch.randn(150, 3, generator=GENERATOR) > 0.5).float()
NUMBERS = 100 + torch.randn(150, 2, generator=GENERATOR, dtype=torch.float64)


def network(width, *end):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), *end)


def classes(loss, **metrics):
    return Classification(**parts(network(3), loss, classes=3, metrics=metrics))


def kappa(classes=3):
    return classification.MulticlassCohenKappa(classes)


def binary(loss, *end):
    metrics = {"kappa": classification.BinaryCohenKappa(), "ap": classification.BinaryAveragePrecision()}
    return BinaryClassification(**parts(network(1, *end), loss, metrics=metrics))


def multilabel():
    added = {"ranking": classification.MultilabelRankingLoss(3)}
    return MultilabelClassification(**parts(network(3), nn.BCEWithLogitsLoss(), labels=3, metrics=added))


def numbers(width):
    added = {"explained": regression.ExplainedVariance(), "mape": regression.MeanAbsolutePercentageError()}
    return Regression(**parts(network(width), nn.MSELoss(), outputs=width, metrics=added))


def of_kappa(found):
    return {"kappa": reference.cohen_kappa_score(found["target"], found["prediction"])}


def of_binary(found):
    return {**of_kappa(found), "ap": reference.average_precision_score(found["target"], found["probabilities"][:, 1])}


def of_numbers(found):
    pair = found["target"], found["prediction"]
    return {
        "explained": reference.explained_variance_score(*pair),
        "mape": reference.mean_absolute_percentage_error(*pair),
    }


CASES = {
    "logits": (lambda: classes(nn.CrossEntropyLoss(), kappa=kappa()), CLASSES, of_kappa),
    "scores": (lambda: classes(nn.MultiMarginLoss(), kappa=kappa()), CLASSES, of_kappa),
    "binary logits": (lambda: binary(nn.BCEWithLogitsLoss()), LABELS[:, :1], of_binary),
    "binary probabilities": (lambda: binary(nn.BCELoss(), nn.Sigmoid()), LABELS[:, :1], of_binary),
    "labels": (
        multilabel,
        LABELS,
        lambda found: {"ranking": reference.label_ranking_loss(found["target"], found["probabilities"])},
    ),
    "a number": (lambda: numbers(1), NUMBERS[:, :1], of_numbers),
    "numbers": (lambda: numbers(2), NUMBERS, of_numbers),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 7, 150])
def test_added_metrics_equal_scikit_learn_on_the_predictions_for_every_batch_size(case, size, tmp_path):
    make, targets, expected = CASES[case]
    task = make()
    if isinstance(task, Regression):
        task.target_mean += 100
    batches = loader(INPUTS, targets, size)
    (found,) = trainer(tmp_path).validate(task, batches, verbose=False)
    for name, value in expected(predicted(task, batches, tmp_path)).items():
        assert found[f"val/{name}"] == pytest.approx(value, rel=1e-6), name
    assert not task.train_metrics.names.count("kappa")


def test_added_metrics_leave_out_the_targets_that_the_loss_ignores(tmp_path):
    task = classes(nn.CrossEntropyLoss(ignore_index=1), kappa=kappa())
    batches = loader(INPUTS, CLASSES, 7)
    (found,) = trainer(tmp_path).validate(task, batches, verbose=False)
    rows = predicted(task, batches, tmp_path)
    scored = CLASSES != 1
    expected = reference.cohen_kappa_score(CLASSES[scored], rows["prediction"][scored])
    assert found["val/kappa"] == pytest.approx(expected, rel=1e-6)


def test_added_metric_without_a_target_that_counts_is_nan_with_the_reason():
    task = classes(nn.CrossEntropyLoss(), kappa=kappa())
    task.val_metrics.update(torch.zeros(()), 0, (torch.zeros(2, 3), torch.tensor([-100, -100])))
    assert math.isnan(task.val_metrics.compute()["val/kappa"])
    assert task.val_metrics.missing_reasons["val/kappa"] == "no target counts"


def test_checkpoint_of_a_program_asks_for_the_added_metrics():
    added = classes(nn.CrossEntropyLoss(), kappa=kappa())
    assert added.hparams["metrics"] == "<object of builtins.dict>"  # Loading refuses it.
    assert "metrics" not in classes(nn.CrossEntropyLoss()).hparams


@pytest.mark.parametrize(("metric", "mode"), [(kappa(), "max"), (classification.MulticlassCalibrationError(3), "min")])
def test_direction_of_an_added_metric_is_what_it_says(metric, mode):
    options = {"classes": 3, "metrics": {"mine": metric}, "monitor": "val/mine"}
    assert Classification(**parts(network(3), nn.CrossEntropyLoss(), **options)).mode == mode


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accuracy", r"metrics\.accuracy, but it logs val/accuracy already"),
        ("loss", r"metrics\.loss, but it logs val/loss already"),
        ("a.b", "letters, digits"),
        ("compute", "letters, digits"),
        ("prefix", "letters, digits"),
    ],
)
def test_names_that_are_taken_or_cannot_be_logged_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        Classification(**parts(network(3), nn.CrossEntropyLoss(), classes=3, metrics={name: kappa()}))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (classification.MulticlassConfusionMatrix(3), r"returns a tensor of shape \(3, 3\).*must return one number"),
        (classification.MulticlassROC(3), "returns tuple.*must return one number"),
        (classification.BinaryAUROC(), r"BinaryAUROC cannot compare predictions \(150, 3\) float64 with targets"),
        (kappa(4), r"predictions \(150, 3\) float64"),
    ],
)
def test_added_metrics_that_do_not_fit_are_refused_in_one_line(metric, message, tmp_path):
    task = classes(nn.CrossEntropyLoss(), mine=metric)
    with pytest.raises(UsageError, match=message) as caught:
        trainer(tmp_path).validate(task, loader(INPUTS, CLASSES), verbose=False)
    assert "\n" not in str(caught.value)


KAPPA = """
model:
  metrics:
    kappa: {class_path: torchmetrics.classification.MulticlassCohenKappa, init_args: {num_classes: 10}}
  monitor: val/kappa
"""
STOP = """
import os, signal
from lightning.pytorch import Callback


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 50 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_metrics_of_two_processes_stopped_within_an_epoch_are_those_of_the_predictions(tmp_path):
    (tmp_path / "mine.py").write_text(STOP)
    (tmp_path / "kappa.yaml").write_text(KAPPA)
    options = ["--config", CONFIG, "--config", "kappa.yaml", "--trainer.max_epochs=3", "--last.min_seconds=0"]
    fit = ["fit", *options, "--config", DDP]
    Ranks(main, [*fit, "--experiment=whole"], cwd=tmp_path, ranks=2).succeed()
    stop = ["--experiment=stopped", "--trainer.callbacks+=mine.Stop"]
    assert Ranks(main, [*fit, *stop], cwd=tmp_path, ranks=2).wait() == [143, 143]
    whole, stopped = newest(tmp_path, "whole"), newest(tmp_path, "stopped")
    Ranks(main, ["fit", "--run", str(stopped), "--trainer.callbacks=null"], cwd=tmp_path, ranks=2).succeed()
    names = {"loss", "accuracy", "balanced_accuracy", "f1", "auroc", "log_loss", "kappa"}
    best = results(whole)["best"]
    assert best.keys() == {"epoch", "step", *(f"val/{name}" for name in names)}
    for name in names:
        of_whole = logged(whole, f"val/{name}")
        assert len(of_whole) == 3
        assert logged(stopped, f"val/{name}") == of_whole
    assert best["val/kappa"] == max(value for _, value in logged(whole, "val/kappa"))

    checkpoint = str(whole / "checkpoints" / "best.ckpt")
    called("test", *options, "--ckpt", checkpoint, "--experiment=evaluated", cwd=tmp_path)
    called("predict", *options, "--ckpt", checkpoint, "--experiment=evaluated", cwd=tmp_path)
    ((found,), (rows,)) = (
        sorted(tmp_path.glob(f"runs/evaluated/evaluations/{each}"))
        for each in ("test-*/results.json", "predict-*/predictions.csv")
    )
    with rows.open() as file:
        table = list(csv.DictReader(file))
    truth, guess = ([row[name] for row in table] for name in ("target", "prediction"))
    probabilities = [[float(row[f"probabilities/{index}"]) for index in range(10)] for row in table]
    measured = results(found.parent)
    assert measured["metrics"] == {
        "test/loss": pytest.approx(measured["metrics"]["test/loss"]),
        "test/accuracy": pytest.approx(reference.accuracy_score(truth, guess), rel=1e-6),
        "test/balanced_accuracy": pytest.approx(reference.balanced_accuracy_score(truth, guess)),
        "test/f1": pytest.approx(reference.f1_score(truth, guess, average="macro")),
        "test/auroc": pytest.approx(reference.roc_auc_score(truth, probabilities, multi_class="ovr")),
        "test/log_loss": pytest.approx(reference.log_loss(truth, probabilities)),
        "test/kappa": pytest.approx(reference.cohen_kappa_score(truth, guess)),
    }
    assert sum(each["samples"] for each in measured["per_class"].values()) == 270


def test_metric_that_a_checkpoint_may_not_name_is_refused_before_the_run(tmp_path):
    options = ["--config", CONFIG, "--model.metrics.mean", "torchmetrics.text.CharErrorRate"]
    refused = Ranks(main, ["fit", *options], cwd=tmp_path)
    assert refused.wait() == [2]
    assert "metrics.mean=torchmetrics.text.cer.CharErrorRate, which a checkpoint may not name" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["class_path", "torchmetrics.classification.MulticlassConfusionMatrix", "init_args.num_classes", "10"],
            r"MulticlassConfusionMatrix returns a tensor of shape \(10, 10\)",
        ),
        (["class_path", "torchmetrics.classification.MulticlassKappa"], "did you mean MulticlassCohenKappa"),
        (["class_path", "X", "init_args.a", "["], "is not valid YAML"),
        (["class_path"], "has no value"),
    ],
)
def test_metrics_on_the_command_line_that_do_not_fit_are_refused_before_the_run(options, message, tmp_path):
    prefixed = [f"--model.metrics.mine.{each}" if not index % 2 else each for index, each in enumerate(options)]
    refused = Ranks(main, ["fit", "--config", CONFIG, *prefixed], cwd=tmp_path)
    assert refused.wait() == [2]
    assert re.search(message, refused.stderr)
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
