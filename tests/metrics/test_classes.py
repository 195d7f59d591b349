import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, precision_recall_fscore_support, roc_auc_score

from firstlight.metrics import BalancedAccuracy, LogLoss, MacroF1, MulticlassAUROC, SplitMetrics
from firstlight.metrics.classes import per_class

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(200, 5, generator=GENERATOR).mul(3).round()  # Some probabilities are equal.
LABELS = torch.multinomial(torch.tensor([0.7, 0.2, 0.05, 0.03, 0.02]), 200, replacement=True, generator=GENERATOR)
IGNORED = LABELS.where(torch.arange(200) % 5 > 0, -100)


def metrics(ignored=-100):
    return {
        "balanced_accuracy": BalancedAccuracy(5, ignored),
        "f1": MacroF1(5, ignored),
        "auroc": MulticlassAUROC(5, ignored),
        "log_loss": LogLoss(ignored),
    }


def computed(logits, labels, size=200, ignored=-100):
    split = SplitMetrics("test", metrics(ignored))
    for part in torch.arange(len(labels)).split(size):
        split.update(torch.zeros(()), len(part), (logits[part], labels[part]))
    return {
        name.partition("/")[2]: value.item() for name, value in split.compute().items() if "loss" != name[5:]
    }, split


@pytest.mark.parametrize("labels", [LABELS, IGNORED])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_metrics_equal_scikit_learn_for_every_batch_size(labels, size, monkeypatch):
    monkeypatch.setattr("firstlight.metrics.split_metrics._MAX_ELEMENTS", 100)
    scored = labels >= 0
    truth, predicted = labels[scored], LOGITS[scored].argmax(1)
    probabilities = LOGITS[scored].double().softmax(1)
    found, split = computed(LOGITS, labels, size)
    assert found == {
        "balanced_accuracy": pytest.approx(balanced_accuracy_score(truth, predicted), rel=1e-12),
        "f1": pytest.approx(f1_score(truth, predicted, average="macro"), rel=1e-12),
        "auroc": pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"), rel=1e-12),
        "log_loss": pytest.approx(log_loss(truth, probabilities), rel=1e-12),
    }
    precision, recall, _, samples = precision_recall_fscore_support(truth, predicted, zero_division=np.nan)
    for index, each in enumerate(per_class(split.class_counts)):
        values = (each["samples"], each["precision"], each["recall"])
        assert values == pytest.approx((samples[index], precision[index], recall[index]))


def test_classes_that_are_never_true_count_as_in_scikit_learn():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 3, 1, 3]), 5) * 2.0
    found, split = computed(logits, labels)
    assert found["balanced_accuracy"] == pytest.approx(0.5)
    assert found["f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert math.isnan(found["auroc"])
    assert split.missing_reasons == {"test/auroc": "no sample has class 2"}
    assert per_class(split.class_counts)[2:4] == [
        {"samples": 0, "precision": None, "recall": None},
        {"samples": 0, "precision": 0.0, "recall": None},
    ]


def test_metrics_without_a_target_that_counts_are_nan_with_the_reason():
    found, split = computed(LOGITS[:3], torch.tensor([-100] * 3))
    assert all(math.isnan(value) for value in found.values())
    assert split.missing_reasons == {f"test/{name}": "no target counts" for name in metrics()}


def test_log_loss_of_an_impossible_class_is_that_of_scikit_learn():
    logits = torch.tensor([[0.0, 1e4], [0.0, 1.0]])
    metric = LogLoss()
    metric.update(logits, torch.tensor([0, 1]))
    assert metric.compute().item() == pytest.approx(log_loss([0, 1], logits.double().softmax(1)))
