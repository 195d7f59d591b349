"""Metrics that are undefined for a split: NaN, told once, and nothing is chosen by them."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from firstlight.callbacks import BestCheckpoint, EarlyStopping
from firstlight.data import Tensors
from firstlight.errors import UsageError
from firstlight.losses import SupervisedContrastiveLoss
from firstlight.metrics import AUROC, R2, RecallAtK
from firstlight.networks import MLP
from firstlight.preflight.probe import probe_splits
from firstlight.tasks import BinaryClassification, Embedding, MultilabelClassification, Regression
from tests.helpers import called, newest, results
from tests.tasks.helpers import loader, parts, trainer

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(24, 1)
MIXED = torch.arange(24)[:, None] % 2 * 1.0


def regression(**changes):
    return Regression(**parts(MLP(4, [], 1), nn.MSELoss(), **changes))


def binary(**changes):
    return BinaryClassification(**parts(MLP(4, [], 1), nn.BCEWithLogitsLoss(), **changes))


def multilabel(**changes):
    return MultilabelClassification(**parts(MLP(4, [], 2), nn.BCEWithLogitsLoss(), labels=2, **changes))


def embedding(**changes):
    return Embedding(**parts(MLP(4, [], 2), SupervisedContrastiveLoss(), **changes))


CASES = {
    "r2 of a constant": (regression, "r2", 3 * ONES, "all targets are equal"),
    "r2 of one sample": (regression, "r2", ONES[:1], "it needs two samples"),
    "auroc of one class": (binary, "auroc", ONES, "all samples have the same class"),
    "auroc of a label": (multilabel, "auroc", torch.cat([MIXED, ONES], 1), "all samples have the same label 1"),
    "recall of one sample": (embedding, "recall_at_k", torch.zeros(1).long(), "it needs two samples"),
}
every_case = pytest.mark.parametrize(("make", "name", "targets", "reason"), CASES.values(), ids=CASES)


@every_case
def test_undefined_metric_is_nan_and_told_once(make, name, targets, reason, tmp_path, caplog):
    task, batches = make(), loader(INPUTS[: len(targets)], targets)
    for _ in range(2):
        (found,) = trainer(tmp_path).test(task, batches, verbose=False)
        assert math.isnan(found[f"test/{name}"])
        assert math.isnan(found["test/loss"]) == (make is embedding)  # One embedding has no pair.
    assert caplog.text.count(f"test/{name} is undefined (nan), because {reason}; nothing is chosen by it") == 1


def test_nothing_is_chosen_by_an_undefined_metric(tmp_path):
    task = binary(monitor="val/auroc")
    best = BestCheckpoint(task.monitor, task.mode, tmp_path)
    stopping = EarlyStopping(task.monitor, patience=1, mode=task.mode)
    run = trainer(tmp_path, max_epochs=4, callbacks=[best, stopping], enable_checkpointing=True)
    run.fit(task, loader(INPUTS, MIXED), loader(INPUTS, ONES))
    assert run.current_epoch == 4 and stopping.wait_count == 0
    assert not list(tmp_path.glob("**/best.ckpt")) and best.best_model_score is None


def test_sanity_check_tells_nothing(tmp_path, caplog):
    task, sorted_labels = binary(), loader(INPUTS, MIXED.sort(dim=0).values, batch_size=6)
    trainer(tmp_path, max_epochs=1).fit(task, loader(INPUTS, MIXED), sorted_labels)
    assert "undefined" not in caplog.text


def test_monitor_that_is_undefined_for_its_split_is_refused_before_the_run(caplog):
    split = ["train"] * 20 + ["val"] + ["test"] * 3
    data = Tensors(INPUTS, INPUTS[:, 0], split=split)
    with pytest.raises(UsageError, match="monitor=val/r2 is undefined for the 1 samples of the val split, because it"):
        probe_splits(regression(monitor="val/r2"), data)
    probe_splits(regression(), data)
    assert caplog.text.count("val/r2 is undefined (nan), because it needs two samples") == 1


class OneClass(LightningDataModule):
    """Its validation has one class, which only its loader shows."""

    def train_dataloader(self):
        return loader(INPUTS, MIXED)

    def val_dataloader(self):
        return loader(INPUTS, ONES)


def test_a_run_that_ends_with_an_undefined_monitor_names_this_cause(tmp_path):
    part = "--model.network.class_path=firstlight.networks.MLP"
    options = [
        "--model=BinaryClassification", part, "--model.network.in_features=4", "--model.network.hidden=[]",
        "--model.network.out_features=1", "--model.loss=torch.nn.BCEWithLogitsLoss", "--model.optimizer=SGD",
        "--model.optimizer.lr=0.01", "--model.schedule=Constant", "--model.monitor=val/auroc",
        f"--data={__name__}.OneClass", "--trainer.max_epochs=2", "--report=false", "--experiment=one",
    ]  # fmt: skip
    done = called("fit", *options, cwd=tmp_path, code=1)
    assert "val/auroc is nan after step 2 (epoch 1), because all samples have the same class: monitor" in done.stderr
    assert "learning_rate_too_high" not in done.stdout + done.stderr
    found = results(newest(tmp_path, "one"))
    assert not [each for each in found["findings"] if each["severity"] == "fault"]


@pytest.mark.parametrize("make", [partial(AUROC), partial(R2), partial(RecallAtK, 3)])
def test_whole_split_metric_does_not_depend_on_its_batches(make):
    predictions = torch.randn(24, 1).round(decimals=1)
    values = []
    for size in (1, 5, 24):
        metric = make()
        for part in torch.arange(24).split(size):
            targets = MIXED.int()[part]
            metric.update(predictions[part], targets[:, 0] if isinstance(metric, RecallAtK) else targets)
        values.append(metric.compute())
    assert values[0] == values[1] == values[2]
