import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score
from torch import nn

from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.preflight.probe import probe
from firstlight.tasks import BinaryClassification, MultilabelClassification
from tests.tasks.helpers import loader, parts, predicted, trainer

INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
LABELS = (INPUTS[:, :3] + NOISE > 0.3).float()


def binary(**changes):
    torch.manual_seed(0)
    return BinaryClassification(**{**parts(MLP(4, [6], 1), nn.BCEWithLogitsLoss()), **changes})


def multilabel(**changes):
    torch.manual_seed(0)
    return MultilabelClassification(**{**parts(MLP(4, [6], 3), nn.BCEWithLogitsLoss(), labels=3), **changes})


CASES = {"binary": (binary, LABELS[:, :1]), "multilabel": (multilabel, LABELS)}
every_case = pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)


@every_case
def test_metrics_equal_scikit_learn(make, targets, tmp_path):
    task, batches = make(), loader(INPUTS, targets, batch_size=7)
    (found,) = trainer(tmp_path).test(task, batches, verbose=False)
    with torch.no_grad():
        logits = task.eval()(INPUTS)
    labels = range(targets.shape[1])
    decided = (logits > 0).float()
    expected = {
        "test/loss": nn.functional.binary_cross_entropy_with_logits(logits, targets).item(),
        "test/accuracy": accuracy_score(targets.flatten(), decided.flatten()),
        "test/f1": sum(f1_score(targets[:, i], decided[:, i]) for i in labels) / len(labels),
        "test/auroc": sum(roc_auc_score(targets[:, i], logits[:, i]) for i in labels) / len(labels),
    }
    if make is binary:
        expected["test/balanced_accuracy"] = balanced_accuracy_score(targets, decided)
        expected["test/log_loss"] = expected["test/loss"]
    assert found == pytest.approx(expected, rel=1e-5)


@every_case
def test_prediction_is_the_more_probable_class(make, targets, tmp_path):
    task = make()
    found = predicted(task, loader(INPUTS, targets, batch_size=7), tmp_path)
    with torch.no_grad():
        logits = task.eval()(INPUTS)
    probabilities = torch.sigmoid(logits.double())
    if make is binary:
        assert found["prediction"].shape == found["target"].shape == (50,)
        torch.testing.assert_close(found["probabilities"].sum(dim=1), torch.ones(50).double())
        probabilities = torch.cat([1 - probabilities, probabilities], dim=1)
        assert torch.equal(found["prediction"], found["probabilities"].argmax(dim=1))
    torch.testing.assert_close(found["probabilities"], probabilities)
    assert torch.equal(found["prediction"].view(-1), (logits > 0).long().view(-1))
    assert torch.equal(found["target"].view(-1), targets.long().view(-1))


class Given(nn.Module):
    """Returns its inputs as logits, in any precision."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return inputs * self.weight


@pytest.mark.parametrize("make", [binary, multilabel])
def test_large_logits_are_ranked_by_their_value(make, tmp_path):
    logits = torch.tensor([40, 38, 45, 60, 41, 39, 70, -3, 55, 42.0])[:, None]
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 0.0])[:, None]
    if make is multilabel:
        logits, labels = torch.cat([logits, -logits, logits]), torch.cat([labels, 1 - labels, labels])
        logits, labels = logits.view(3, 10).T, labels.view(3, 10).T
    task = make(network=Given())
    (found,) = trainer(tmp_path).test(task, loader(logits, labels, batch_size=4), verbose=False)
    assert found["test/auroc"] == pytest.approx(0.8, abs=1e-12)
    scores = predicted(task, loader(logits, labels), tmp_path)["score"].view(logits.shape)
    assert roc_auc_score(labels, scores) == pytest.approx(0.8)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (0.0, 1e-6), (60.0, 1.0), (-60.0, 1.0), (0.0, 1e3)])
@pytest.mark.parametrize("make", [binary, multilabel])
def test_metrics_equal_scikit_learn_on_the_predictions_for_every_precision(make, offset, scale, precision, tmp_path):
    targets = CASES["binary" if make is binary else "multilabel"][1]
    logits = offset + scale * (INPUTS[:, : targets.shape[1]] + 0.1)
    run, task = trainer(tmp_path, precision=precision), make(network=Given())
    (found,) = run.test(task, loader(logits, targets, batch_size=7), verbose=False)
    columns = run.predict(task, loader(logits, targets, batch_size=7))
    written = {name: torch.cat([batch[name] for batch in columns]) for name in columns[0]}
    labels, decided, scores = (written[name].view(targets.shape) for name in ("target", "prediction", "score"))
    every = range(targets.shape[1])
    expected = {
        "test/loss": pytest.approx(nn.BCEWithLogitsLoss()(scores, labels.double()).item(), rel=1e-5),
        "test/accuracy": pytest.approx(accuracy_score(labels.flatten(), decided.flatten()), rel=1e-6),
        "test/f1": pytest.approx(sum(f1_score(labels[:, i], decided[:, i]) for i in every) / len(every), rel=1e-6),
        "test/auroc": pytest.approx(sum(roc_auc_score(labels[:, i], scores[:, i]) for i in every) / len(every)),
    }
    if make is binary:
        expected["test/balanced_accuracy"] = pytest.approx(balanced_accuracy_score(labels, decided))
        expected["test/log_loss"] = pytest.approx(log_loss(labels, written["probabilities"]))
    assert found == expected


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_logits_are_never_mistaken_for_probabilities(scale, tmp_path):
    """Logits in [0, 1] look like probabilities; as logits, all of them predict class 1."""
    task = binary(network=nn.Linear(4, 1))
    nn.init.zeros_(task.network.weight)
    nn.init.constant_(task.network.bias, 0.4 * scale)
    (found,) = trainer(tmp_path).test(task, loader(INPUTS, LABELS[:, :1]), verbose=False)
    assert found["test/accuracy"] == pytest.approx(LABELS[:, 0].mean().item())


@every_case
def test_targets_of_another_shape_are_refused_at_every_step(make, targets, tmp_path):
    for wrong in (targets[:, 0], targets.repeat(1, 2), targets.unsqueeze(2)):
        with pytest.raises(UsageError, match="exactly the outputs' shape"):
            trainer(tmp_path).validate(make(), loader(INPUTS, wrong), verbose=False)
    with pytest.raises(UsageError, match=r"int64 for outputs"):
        trainer(tmp_path).validate(make(), loader(INPUTS, targets.long()), verbose=False)


@every_case
def test_probe_refuses_wrong_targets(make, targets):
    task = make()
    for wrong in (targets[:, 0], targets.repeat(1, 2), targets.long(), targets.double()):
        with pytest.raises(UsageError, match=r"was given targets \("):
            probe(task, (INPUTS[:3], wrong[:3]), wrong)
    for value in (2.0, 0.5, -1.0):
        wrong = targets.clone()
        wrong[[3, 7], 0] = value
        with pytest.raises(UsageError, match=f"0 or 1, but 2 of {targets.numel()} are not: the first is {value}"):
            probe(task, (INPUTS[:3], wrong[:3]), wrong)


@every_case
def test_probe_refuses_a_network_without_a_logit_per_label(make, targets):
    with pytest.raises(UsageError, match=r"MLP returns 5 outputs per sample: set out_features=[13]$"):
        probe(make(network=MLP(4, [], 5)), (INPUTS[:3], targets[:3]), targets)


def test_fewer_than_two_labels_are_refused():
    with pytest.raises(UsageError, match=r"labels=1.*BinaryClassification"):
        multilabel(labels=1)
