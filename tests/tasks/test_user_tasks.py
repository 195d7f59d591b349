"""Tasks and networks of a user: several losses, outputs that are no tensor, and mistakes."""

from functools import partial

import pytest
import torch
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import seed_everything
from torch import nn
from torchmetrics import MeanAbsoluteError

from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.loggers import History
from firstlight.networks import MLP
from firstlight.preflight.probe import probe
from firstlight.schedules import Constant
from firstlight.tasks import BinaryClassification, Classification, Embedding, LanguageModel, Regression, Task
from tests.helpers import called, newest
from tests.tasks.helpers import loader, parts, predicted, trainer
from tests.tasks.test_train_log import Saves

INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 3
TARGETS = INPUTS[:, :1] + 1


class TwoHeads(nn.Module):
    """Returns a tuple, or a dict."""

    def __init__(self, outputs=3, form="tuple"):
        super().__init__()
        self.first, self.second, self.form = nn.Linear(4, outputs), nn.Linear(4, 2), form

    def forward(self, inputs):
        outputs = self.first(inputs), self.second(inputs)
        return outputs if self.form == "tuple" else dict(zip("ab", outputs, strict=True))


class TwoLosses(Task):
    """Two terms and no metrics."""

    def compute_loss(self, outputs, targets):
        first, second = outputs.values() if isinstance(outputs, dict) else outputs
        return {
            "cross_entropy": nn.functional.cross_entropy(first, targets),
            "size": 0.1 * second.square().sum(1).mean(),
        }


class Weighted(Classification):
    """A second term beside a loss with class weights."""

    def compute_loss(self, outputs, targets):
        return {"cross_entropy": super().compute_loss(outputs, targets), "size": 0.01 * outputs.square().mean()}


def build(kind, network, **changes):
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    return kind(**{"network": network, "optimizer": optimizer, "schedule": Constant(), **changes})


def two_losses(form="tuple", **changes):
    torch.manual_seed(0)
    return build(TwoLosses, TwoHeads(form=form), **changes)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_terms_are_logged_as_weighted_means_beside_their_sum(form, tmp_path):
    task = two_losses(form)
    (found,) = trainer(tmp_path).test(task, loader(INPUTS, LABELS, batch_size=7), verbose=False)
    with torch.no_grad():
        expected = {f"test/{name}": term.item() for name, term in task.compute_loss(task(INPUTS), LABELS).items()}
    assert found == pytest.approx({"test/loss": sum(expected.values()), **expected}, rel=1e-5)


def test_terms_have_the_weight_of_the_loss(tmp_path):
    weight = torch.tensor([1.0, 5.0, 20.0])
    task = build(Weighted, MLP(4, [], 3), loss=nn.CrossEntropyLoss(weight), classes=3)
    batches = loader(INPUTS, LABELS.sort().values, batch_size=7)
    (found,) = trainer(tmp_path).validate(task, batches, verbose=False)
    sizes, sums = 0, {"cross_entropy": 0, "size": 0}
    for inputs, targets in batches:
        with torch.no_grad():
            terms = task.compute_loss(task(inputs), targets)
        size = weight[targets].sum()
        sizes += size
        sums = {name: sums[name] + size * term for name, term in terms.items()}
    for name, total in sums.items():
        assert found[f"val/{name}"] == pytest.approx((total / sizes).item(), rel=1e-5)
    assert found["val/loss"] == pytest.approx((sum(sums.values()) / sizes).item(), rel=1e-5)
    assert "val/accuracy" in found


def test_the_sum_of_the_terms_is_minimised(tmp_path):
    class Summed(TwoLosses):
        def compute_loss(self, outputs, targets):
            return sum(super().compute_loss(outputs, targets).values())

    weights = []
    for kind in (TwoLosses, Summed):
        torch.manual_seed(0)
        task = build(kind, TwoHeads())
        trainer(tmp_path, max_epochs=2).fit(task, loader(INPUTS, LABELS), loader(INPUTS, LABELS))
        weights.append(torch.cat([value.flatten() for value in task.state_dict().values()]))
    torch.testing.assert_close(*weights)


def test_state_dict_holds_the_network_and_no_metrics():
    task = two_losses(metrics={"mae": MeanAbsoluteError()})
    assert task.state_dict().keys() == {f"network.{name}" for name in task.network.state_dict()}
    assert len(list(task.children())) == 1


class DigitHeads(TwoHeads):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, inputs):
        return super().forward(inputs.flatten(1))


@pytest.mark.parametrize("step", [3, 9, 13])
def test_run_resumed_in_mid_epoch_logs_and_ends_the_same(step, tmp_path):
    saves = Saves(tmp_path / "a.ckpt", step)

    def fit(*callbacks, ckpt_path=None):
        seed_everything(0, verbose=False)
        task, history = build(TwoLosses, DigitHeads()), History()
        run = trainer(tmp_path, max_epochs=2, logger=history, log_every_n_steps=5, callbacks=list(callbacks))
        data = Digits(batch_size=128, split_seed=0)
        run.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return task, {name: dict(zip(*history[name], strict=True)) for name in ("train/cross_entropy", "train/size")}

    whole, logged = fit(saves)
    resumed, rest = fit(ckpt_path=saves.path)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    for name, values in rest.items():
        assert values == {at: value for at, value in logged[name].items() if at >= step} != {}


def test_a_term_can_be_monitored_and_a_misspelt_one_is_refused_by_the_probe():
    task = two_losses(monitor="val/size")
    assert task.mode == "min"
    probe(task, (INPUTS[:3], LABELS[:3]), LABELS)
    with pytest.raises(UsageError, match=r"unknown monitor=val/siz; .*, val/size; did you mean val/size\?"):
        probe(two_losses(monitor="val/siz"), (INPUTS[:3], LABELS[:3]), LABELS)


def test_a_metric_of_a_user_can_be_monitored(tmp_path):
    class WithMetric(TwoLosses):
        def metric_inputs(self, outputs, targets):
            return outputs[0].argmax(1).float(), targets.float()

    task = build(WithMetric, TwoHeads(), metrics={"mae": MeanAbsoluteError()}, monitor="val/mae")
    probe(task, (INPUTS[:3], LABELS[:3]), LABELS)
    (found,) = trainer(tmp_path).validate(task, loader(INPUTS, LABELS), verbose=False)
    with torch.no_grad():
        expected = (task(INPUTS)[0].argmax(1) - LABELS).abs().float().mean().item()
    assert found["val/mae"] == pytest.approx(expected)
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, loader(INPUTS, LABELS), loader(INPUTS, LABELS))
    run.save_checkpoint(tmp_path / "a.ckpt")
    given = {"network": TwoHeads(), "optimizer": task.optimization.build_optimizer, "schedule": Constant()}
    with pytest.raises(UsageError, match="does not hold metrics"):
        WithMetric.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **given)


OURS = {
    "Task": (Task, {"loss": nn.CrossEntropyLoss()}, LABELS),
    "Classification": (Classification, {"loss": nn.CrossEntropyLoss(), "classes": 3}, LABELS),
    "Regression": (Regression, {"loss": nn.MSELoss()}, TARGETS),
}


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize(("kind", "options", "targets"), OURS.values(), ids=OURS)
def test_outputs_that_are_no_tensor_are_refused_where_one_is_expected(kind, options, targets, form, tmp_path):
    task = build(kind, TwoHeads(form=form), **options)
    message = rf"TwoHeads returned a {form} of .*\(., 3\) float32.*{kind.__name__}\.compute_loss expects a tensor: "
    with pytest.raises(UsageError, match=message):
        probe(task, (INPUTS[:3], targets[:3]), targets)
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path).validate(task, loader(INPUTS, targets), verbose=False)


def test_metrics_that_cannot_read_the_outputs_are_named(tmp_path):
    class OwnLoss(Classification):
        def compute_loss(self, outputs, targets):
            return self.loss(outputs[0], targets)

    task = build(OwnLoss, TwoHeads(), loss=nn.CrossEntropyLoss(), classes=3)
    with pytest.raises(UsageError, match=r"OwnLoss\.metric_inputs expects a tensor.*override metric_inputs"):
        probe(task, (INPUTS[:3], LABELS[:3]), LABELS)
    with pytest.raises(UsageError, match=r"OwnLoss\.predict_step expects a tensor: override predict_step"):
        predicted(task, loader(INPUTS, LABELS), tmp_path)


def test_a_task_that_changes_the_outputs_is_named_as_their_source():
    class Pairs(Task):
        def forward(self, inputs):
            return inputs, *self.network(inputs)

        def compute_loss(self, outputs, targets):
            return outputs[1].square().mean()

    task = build(Pairs, TwoHeads(), metrics={"mae": MeanAbsoluteError()})
    with pytest.raises(
        UsageError, match=r"^Pairs\.forward returned a tuple of \(3, 4\) float32, \(3, 3\) float32, \(3, 2\)"
    ):
        probe(task, (INPUTS[:3], LABELS[:3]), LABELS)


@pytest.mark.parametrize("module", ["my_project", "firstlight.losses.two_heads"])
def test_a_new_loss_may_take_a_tuple_and_return_terms(module, monkeypatch):
    class Loss(nn.Module):
        def forward(self, outputs, targets):
            return {"a": nn.functional.cross_entropy(outputs[0], targets), "b": outputs[1].square().mean()}

    monkeypatch.setattr(Loss, "__module__", module)
    probe(build(Task, TwoHeads(), loss=Loss(), monitor="val/b"), (INPUTS[:3], LABELS[:3]), LABELS)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda first: {"a": first.square()}, r"Wrong\.compute_loss returns a dict of a \(3, 3\) float32: it must"),
        (lambda first: {}, "returns a dict of : it must return the mean loss"),
        (lambda first: 1.5, "returns a float: it must return the mean loss"),
        (lambda first: {"loss": first.mean()}, "returns a term for val/loss, which is logged already"),
        (lambda first: {"a": first.mean(), "b": first.square().sum()}, r"returns the b .* twice: it must be a mean"),
    ],
)
def test_probe_refuses_a_loss_that_is_no_mean_or_has_a_wrong_name(losses, message):
    class Wrong(Task):
        def compute_loss(self, outputs, targets):
            return losses(outputs[0])

    with pytest.raises(UsageError, match=message):
        probe(build(Wrong, TwoHeads()), (INPUTS[:3], LABELS[:3]), LABELS)


def test_perplexity_is_not_computed_from_a_loss_with_more_terms(tmp_path):
    class Regularised(LanguageModel):
        def compute_loss(self, outputs, targets):
            return {"nll": super().compute_loss(outputs, targets), "size": outputs.square().mean()}

    tokens = torch.randint(1, 7, (20, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (LanguageModel, Regularised):
        torch.manual_seed(0)
        task = kind(**parts(nn.Embedding(7, 7), nn.CrossEntropyLoss(ignore_index=0)))
        batches = loader(tokens[:, :-1], tokens[:, 1:])
        found += trainer(tmp_path).validate(task, batches, verbose=False)
    assert found[1]["val/perplexity"] == pytest.approx(found[0]["val/perplexity"], rel=1e-5)
    assert found[1]["val/nll"] == pytest.approx(found[0]["val/loss"], rel=1e-5)


def test_a_task_without_a_loss_is_refused():
    with pytest.raises(UsageError, match="Task has no loss: give it one, or override compute_loss"):
        build(Task, TwoHeads())


PROJECT = """
import torch
from torch import nn
from firstlight.schedules import Schedule
from firstlight.tasks import Task

class Mine(Task):
    def __init__(self, network: nn.Module, {argument}, schedule: Schedule):
        super().__init__(network, optimizer, schedule, nn.CrossEntropyLoss())
"""
CONFIG = """
model:
  class_path: my_project.Mine
  init_args:
    network: {class_path: firstlight.networks.MLP, init_args: {in_features: 64, hidden: [8], out_features: 10}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}
    schedule: firstlight.schedules.WarmupCosine
data: firstlight.data.Digits
trainer: {max_epochs: 1}
"""


@pytest.mark.parametrize("argument", ["optimizer", "optimizer: object", "optimizer: dict"])
def test_an_optimizer_without_its_annotation_is_refused_in_one_line(argument, tmp_path):
    (tmp_path / "my_project.py").write_text(PROJECT.format(argument=argument))
    (tmp_path / "mine.yaml").write_text(CONFIG)
    done = called("fit", "--config", "mine.yaml", cwd=tmp_path, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert "Mine was given optimizer=" in done.stderr
    assert "optimizer: OptimizerCallable (from lightning.pytorch.cli)" in done.stderr


def test_a_task_with_its_own_init_runs_and_metrics_are_named_in_yaml(tmp_path):
    code = PROJECT.replace("{argument}", "optimizer: OptimizerCallable") + (
        "\nfrom lightning.pytorch.cli import OptimizerCallable\n"
        "class Plain(Task):\n"
        "    def metric_inputs(self, outputs, targets):\n"
        "        return outputs.argmax(1), targets\n"
    )
    code = code.replace("import torch\n", "import torch\nfrom lightning.pytorch.cli import OptimizerCallable\n", 1)
    (tmp_path / "my_project.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    called("fit", "--config", "mine.yaml", cwd=tmp_path)
    (tmp_path / "plain.yaml").write_text(
        CONFIG.replace("my_project.Mine", "my_project.Plain").replace(
            "    schedule:", "    loss: torch.nn.CrossEntropyLoss\n"
            "    metrics: {mae: torchmetrics.MeanAbsoluteError}\n    monitor: val/mae\n    schedule:",
        )
    )  # fmt: skip
    done = called("run", "--config", "plain.yaml", cwd=tmp_path)
    assert "val/mae" in done.stdout and "test/mae" in done.stdout
    done = called("test", "--run", str(newest(tmp_path, "plain")), cwd=tmp_path)
    assert "test/mae" in done.stdout


@pytest.mark.parametrize("task", [LanguageModel, Classification, Regression, Embedding, BinaryClassification])
def test_own_task_without_a_constructor_takes_the_options_of_its_base(task):
    # jsonargparse 4.53 drops an option behind a positional argument of `super().__init__`.
    options = [parameter.name for parameter in get_signature_parameters(task, None)]
    assert [parameter.name for parameter in get_signature_parameters(type("Own", (task,), {}), None)] == options
    assert {"monitor", "mode", "l1"} < {*options}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (4, r"Classification has classes=3, but MLP returns 4 outputs per sample: .*, or classes=4"),
        (2, r"Classification has classes=3, but MLP returns 2 outputs per sample: set out_features=3, or classes=2$"),
    ],
)
def test_outputs_that_are_not_one_for_each_class_are_refused_with_any_loader(outputs, message, tmp_path):
    task = build(Classification, MLP(4, [], outputs), loss=nn.CrossEntropyLoss(), classes=3)
    batches = loader(INPUTS, LABELS.clamp(max=outputs - 1))
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, max_epochs=1).fit(task, batches, batches)


class OwnValidation(Classification):
    """Takes several loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if not dataloader_idx:
            super().validation_step(batch, batch_idx)


def test_several_loaders_of_a_split_are_refused_unless_the_step_is_the_users(tmp_path):
    batches, others = loader(INPUTS, LABELS), loader(INPUTS[:7], LABELS[:7])
    options = {"loss": nn.CrossEntropyLoss(), "classes": 3}
    task = build(Classification, MLP(4, [], 3), **options)
    with pytest.raises(UsageError, match="the data has 2 loaders for validation_step, but Classification logs one set"):
        trainer(tmp_path, max_epochs=1).fit(task, batches, [batches, others])
    with pytest.raises(UsageError, match="the data has 2 loaders for test_step"):
        trainer(tmp_path).test(task, [batches, others], verbose=False)
    own = build(OwnValidation, MLP(4, [], 3), **options)
    found = trainer(tmp_path).validate(own, [batches, others], verbose=False)[0]
    assert found == trainer(tmp_path).validate(own, batches, verbose=False)[0]
