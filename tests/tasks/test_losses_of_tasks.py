"""Tasks read outputs as their loss does, or refuse the loss."""

import inspect
from functools import partial

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, mean_absolute_error, roc_auc_score
from torch import nn
from torch.nn.modules import loss as torch_losses

import firstlight.tasks
from firstlight.errors import UsageError
from firstlight.losses import ContrastiveLoss, SupervisedContrastiveLoss
from firstlight.preflight.probe import probe
from firstlight.tasks import BinaryClassification, Classification, LanguageModel, Regression
from tests.helpers import ROOT
from tests.tasks.helpers import loader, parts, predicted, trainer

INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
LABELS = (INPUTS[:, 0] > 0.8).long()
COUNTS = torch.poisson((1 + INPUTS[:, :1]).exp(), generator=torch.Generator().manual_seed(0))
ONE = (INPUTS[:, :1] > 0.8).float()
THREE = (INPUTS[:, :3] > 0.2).float()
OPTIONS = {"Classification": {"classes": 3}, "MultilabelClassification": {"labels": 3}}
OUTPUTS = {"Classification": 3, "MultilabelClassification": 3, "Embedding": 2, "LanguageModel": 28}
TARGETS = {
    "BinaryClassification": ONE, "Classification": LABELS, "Embedding": LABELS, "MultilabelClassification": THREE,
    "LanguageModel": torch.randint(0, 7, (60, 4)), "Regression": COUNTS,
}  # fmt: skip
ENDINGS = {
    nn.NLLLoss: partial(nn.LogSoftmax, -1), nn.BCELoss: nn.Sigmoid,
    "rates": nn.Softplus,
}  # fmt: skip
LOSSES = [
    kind
    for name, kind in inspect.getmembers(torch_losses, inspect.isclass)
    if name.endswith("Loss") and not name.startswith("_") and name not in ("LinearCrossEntropyLoss", "NLLLoss2d")
] + [nn.AdaptiveLogSoftmaxWithLoss, ContrastiveLoss, SupervisedContrastiveLoss]
TASKS = list(TARGETS)


def made(name, loss, *ending):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, OUTPUTS.get(name, 1)))
    if name == "LanguageModel":
        network.append(nn.Unflatten(1, (4, 7)))
    network.extend(ending)
    return getattr(firstlight.tasks, name)(**parts(network, loss, lr=0.1, **OPTIONS.get(name, {})))


def build(kind, name):
    if name == "LanguageModel" and kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        return kind(ignore_index=0)
    return kind(4, 3, [2]) if kind is nn.AdaptiveLogSoftmaxWithLoss else kind()


@pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", TASKS)
def test_each_loss_is_used_as_it_expects_or_refused_in_one_line(name, kind, tmp_path):
    task = getattr(firstlight.tasks, name)
    if kind not in task.losses:
        with pytest.raises(UsageError, match=rf"^{name} cannot take {kind.__name__}.*: use [\w.]+$"):
            made(name, build(kind, name))
        return
    ending = [ENDINGS[kind]()] if kind in ENDINGS else []
    task, targets = made(name, build(kind, name), *ending), TARGETS[name]
    probe(task, (INPUTS[:3], targets[:3]), targets)
    run = trainer(tmp_path, max_epochs=30)
    batches = loader(INPUTS, targets, batch_size=20)
    run.fit(task, batches, batches)
    (found,) = run.test(task, batches, verbose=False)
    columns = predicted(task, batches, tmp_path)
    if "accuracy" in task.test_metrics.names:
        right = accuracy_score(columns["target"].flatten(), columns["prediction"].flatten())
        assert found["test/accuracy"] == pytest.approx(right, rel=1e-6)
        assert right > 0.8
    if "probabilities" in columns and name == "Classification":
        assert torch.equal(columns["probabilities"].argmax(1), columns["prediction"])
    if name in ("Classification", "BinaryClassification"):
        right = balanced_accuracy_score(columns["target"], columns["prediction"])
        assert found["test/balanced_accuracy"] == pytest.approx(right)
        assert ("test/log_loss" in found) == ("probabilities" in columns)
        if "probabilities" in columns:
            labels = range(columns["probabilities"].shape[1])
            nats = log_loss(columns["target"], columns["probabilities"], labels=labels)
            assert found["test/log_loss"] == pytest.approx(nats, rel=1e-6)
    if name in ("BinaryClassification", "MultilabelClassification"):
        probabilities = columns["probabilities"][:, -1] if name.startswith("B") else columns["probabilities"]
        assert torch.equal((probabilities > 0.5).long(), columns["prediction"])
        assert found["test/auroc"] == pytest.approx(roc_auc_score(columns["target"], probabilities, average="macro"))
        # A probability is what the loss makes of the outputs: the mean loss follows from it.
        if kind is not nn.MultiLabelSoftMarginLoss:
            given = nn.functional.binary_cross_entropy(probabilities, columns["target"].double())
            assert found["test/loss"] == pytest.approx(given.item(), rel=1e-4)
    if name == "Regression":
        error = mean_absolute_error(columns["target"], columns["prediction"])
        assert found["test/mae"] == pytest.approx(error, rel=1e-6)
        assert error < 0.7 * mean_absolute_error(COUNTS[:, 0], COUNTS.mean().expand(60))


def test_no_second_sigmoid_follows_a_network_that_ends_in_one(tmp_path):
    task = made("BinaryClassification", nn.BCELoss(), nn.Sigmoid())
    (found,) = trainer(tmp_path).test(task, loader(INPUTS, ONE), verbose=False)
    right = ((task.network(INPUTS) > 0.5) == ONE.bool()).double().mean().item()
    assert found["test/accuracy"] == pytest.approx(right) != pytest.approx(ONE.mean().item())


def test_bce_of_probabilities_trains_in_mixed_precision(tmp_path):
    task, batches = made("BinaryClassification", nn.BCELoss(), nn.Sigmoid()), loader(INPUTS, ONE)
    run = trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    run.fit(task, batches, batches)
    assert run.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("log_input", [True, False])
def test_rates_are_learned_from_counts_and_predicted(log_input, tmp_path):
    ending = [] if log_input else [nn.Softplus()]
    task = made("Regression", nn.PoissonNLLLoss(log_input=log_input), *ending)
    batches = loader(INPUTS, COUNTS, batch_size=60)
    run = trainer(tmp_path, max_epochs=200)
    run.fit(task, batches, batches)
    rates = predicted(task, batches, tmp_path)["prediction"]
    outputs = task.network(INPUTS)[:, 0].double()
    torch.testing.assert_close(rates, outputs.exp() if log_input else outputs)
    expected = (rates - COUNTS[:, 0] * (rates + 1e-8).log()).mean().item()
    assert run.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=0.02)
    assert rates.mean().item() == pytest.approx(COUNTS.mean().item(), rel=0.1)


def test_counts_below_zero_are_refused():
    task = made("Regression", nn.PoissonNLLLoss())
    with pytest.raises(UsageError, match=r"PoissonNLLLoss expects counts, but a target is -1: use torch.nn.MSELoss"):
        probe(task, (INPUTS[:3], COUNTS[:3] - 1), COUNTS - 1)


WRONG_ENDINGS = [
    ("BinaryClassification", nn.BCEWithLogitsLoss(), [nn.Sigmoid()], "in a sigmoid: leave it out, or use"),
    ("BinaryClassification", nn.BCEWithLogitsLoss(), [nn.Sigmoid(), nn.Flatten()], "a sigmoid"),
    ("Classification", nn.CrossEntropyLoss(), [nn.Softmax(1)], "expects logits, .* in a softmax: leave it out$"),
    ("Classification", nn.NLLLoss(), [], "log-probabilities, .*LogSoftmax, or use torch.nn.CrossEntropyLoss"),
    ("Classification", nn.NLLLoss(), [nn.Softmax(1)], "expects log-probabilities"),
    ("LanguageModel", nn.CrossEntropyLoss(ignore_index=0), [nn.Softmax(-1)], "expects logits"),
    ("LanguageModel", nn.NLLLoss(ignore_index=0), [], "expects log-probabilities"),
    ("Regression", nn.MSELoss(), [nn.Sigmoid()], "expects standardised numbers.* ends in a sigmoid: leave it out$"),
    ("Regression", nn.HuberLoss(), [nn.ReLU()], "ends in a ReLU"),
    ("Regression", nn.PoissonNLLLoss(), [nn.Softplus()], "expects logarithms of rates.* or set log_input=False"),
    ("Regression", nn.PoissonNLLLoss(log_input=False), [], "expects rates, but .* set log_input=True"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "loss", "ending", "message"), WRONG_ENDINGS)
def test_a_network_that_ends_in_something_else_is_refused_by_the_probe(name, loss, ending, message):
    task, targets = made(name, loss, *ending), TARGETS[name]
    with pytest.raises(UsageError, match=message):
        probe(task, (INPUTS[:3], targets[:3]), targets)


def test_bce_of_outputs_outside_its_range_is_refused():
    task = made("MultilabelClassification", nn.BCELoss())
    with pytest.raises(UsageError, match=r"BCELoss expects probabilities, but .* torch.nn.BCEWithLogitsLoss"):
        probe(task, (INPUTS[:3], THREE[:3]), THREE)


def test_cross_entropy_after_a_log_softmax_is_right_and_accepted():
    probe(made("Classification", nn.CrossEntropyLoss(), nn.LogSoftmax(1)), (INPUTS[:3], LABELS[:3]), LABELS)


def test_a_loss_of_the_user_says_what_it_expects(tmp_path):
    class Brier(nn.Module):
        expects = "probabilities"

        def forward(self, outputs, targets):
            return (outputs - targets).square().mean()

    task = made("BinaryClassification", Brier(), nn.Sigmoid())
    probe(task, (INPUTS[:3], ONE[:3]), ONE)
    columns = predicted(task, loader(INPUTS, ONE), tmp_path)
    torch.testing.assert_close(columns["probabilities"][:, 1:].float(), task.network(INPUTS).detach())
    Brier.expects = "percent"
    with pytest.raises(UsageError, match=r"Brier.expects is percent: for BinaryClassification, it must be logits"):
        made("BinaryClassification", Brier())


def test_a_loss_that_extends_one_of_torch_expects_the_same():
    class Focal(nn.BCELoss):
        def forward(self, outputs, targets):
            return super().forward(outputs, targets).square()

    assert made("BinaryClassification", Focal(), nn.Sigmoid()).outputs_are == "probabilities"


def test_scores_have_no_probabilities(tmp_path):
    task = made("Classification", nn.MultiMarginLoss())
    assert predicted(task, loader(INPUTS, LABELS), tmp_path).keys() == {"prediction", "target"}


def test_a_task_with_its_own_compute_loss_takes_any_loss():
    class Own(Classification):
        def compute_loss(self, outputs, targets):
            return self.loss(outputs.softmax(1), nn.functional.one_hot(targets, 3).float())

    task = Own(**parts(nn.Linear(4, 3), nn.MSELoss()), classes=3)
    probe(task, (INPUTS[:3], LABELS[:3]), LABELS)
    assert task.outputs_are == "logits"


@pytest.mark.parametrize("module", ["my_project", "firstlight.losses.two_terms"])
def test_a_new_loss_of_terms_fits_any_task(module, monkeypatch):
    class TwoTerms(nn.Module):
        def forward(self, outputs, targets):
            return {"entropy": nn.functional.cross_entropy(outputs, targets), "size": outputs.square().mean()}

    for each in (TwoTerms, TwoTerms.forward):
        monkeypatch.setattr(each, "__module__", module)
    task = Classification(**parts(nn.Linear(4, 3), TwoTerms()), classes=3, monitor="val/entropy")
    probe(task, (INPUTS[:3], LABELS[:3]), LABELS)
    assert task.mode == "min"


@pytest.mark.parametrize("kind", [BinaryClassification, Classification, LanguageModel, Regression])
def test_the_first_loss_of_each_task_is_the_one_that_it_recommends(kind):
    assert next(iter(kind.losses)) in (nn.BCEWithLogitsLoss, nn.CrossEntropyLoss, nn.MSELoss)


def test_the_table_of_pairs_names_each_accepted_loss():
    rows = [line.split("|")[1:3] for line in (ROOT / "docs" / "losses.md").read_text().splitlines() if "| `" in line]
    for name in TASKS:
        losses = " ".join(loss for task, loss in rows if f"`{name}`" in task)
        for kind in getattr(firstlight.tasks, name).losses:
            assert kind.__name__ in losses, f"docs/losses.md has no row for {name} and {kind.__name__}"
