from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score
from torch import nn
from torchmetrics import Metric

from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.schedules import Constant, Cosine
from firstlight.tasks import Classification, Task
from tests.tasks.helpers import loader, parts, trainer

PARTS = {
    "network": lambda: MLP(64, [8], 10),
    "loss": nn.CrossEntropyLoss,
    "optimizer": lambda: partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "schedule": Constant,
}


def make(**changes):
    return Classification(**{**{name: part() for name, part in PARTS.items()}, "classes": 10, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    task, run = make(), trainer(folder, max_steps=3)
    run.fit(task, datamodule=Digits())
    run.save_checkpoint(folder / "a.ckpt")
    return task, folder / "a.ckpt"


def test_checkpoint_of_a_program_loads_with_all_parts_given_again(saved):
    task, path = saved
    loaded = Classification.load_from_checkpoint(path, weights_only=True, **{n: part() for n, part in PARTS.items()})
    assert loaded.classes == 10
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("missing", PARTS)
def test_checkpoint_of_a_program_is_refused_without_a_part(saved, missing):
    given = {name: part() for name, part in PARTS.items() if name != missing}
    with pytest.raises(UsageError, match=rf"does not hold {missing}: pass.*{missing}=\.\.\."):
        Classification.load_from_checkpoint(saved[1], weights_only=True, **given)


def test_training_step_works_without_a_trainer():
    inputs, targets = torch.randn(4, 64), torch.arange(4)
    task = make()
    assert torch.equal(task.training_step((inputs, targets), 0), nn.functional.cross_entropy(task(inputs), targets))


def test_a_fit_cannot_resume_from_weights_alone(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    run.fit(make(), datamodule=Digits())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="contains only the model"):  # Lightning's own words
        trainer(tmp_path, max_steps=5).fit(make(), datamodule=Digits(), ckpt_path=tmp_path / "weights.ckpt")


def test_a_new_fit_of_a_loaded_task_follows_its_own_plan(saved, tmp_path):
    parts = {name: part() for name, part in PARTS.items()} | {"schedule": Cosine()}
    loaded = Classification.load_from_checkpoint(saved[1], weights_only=True, **parts)
    run = trainer(tmp_path, max_steps=5)
    run.fit(loaded, datamodule=Digits())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * Cosine()(5, 5))


def with_decay(decay):
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=decay)
    return make(network=MLP(64, [8], 10, norm="layer"), optimizer=optimizer)


def test_weight_decay_does_not_apply_to_biases_and_norms(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(with_decay(0.1), datamodule=Digits())
    decayed, spared = run.optimizers[0].param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in spared["params"]} == {1} and spared["weight_decay"] == 0.0


@pytest.mark.parametrize(("before", "now"), [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0), (0.1, 0.1)])
def test_a_resumed_optimiser_keeps_its_state_when_weight_decay_is_turned_on_or_off(before, now, tmp_path):
    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,), names = trainer.optimizers, {p: name for name, p in pl_module.named_parameters()}
            found.append({names[p]: state["exp_avg"].clone() for p, state in optimizer.state.items()})

        on_train_end = on_train_start

    found = []
    run, resumed = (trainer(tmp_path, max_steps=steps, callbacks=[Notes()]) for steps in (3, 5))
    run.fit(with_decay(before), datamodule=Digits())
    run.save_checkpoint(tmp_path / "last.ckpt")
    task = with_decay(now)
    resumed.fit(task, datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    _, saved, restored, _ = found
    assert len(saved) == 6 and saved.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in saved.items())
    decays = {id(p): group["weight_decay"] for group in resumed.optimizers[0].param_groups for p in group["params"]}
    assert all(decays[id(p)] == now * (p.ndim == 2) for p in task.parameters())


class Undirected(Metric):
    """Does not say whether higher is better."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, preds, target):
        self.total += len(target)

    def compute(self):
        return self.total


def test_mode_is_an_option_of_a_monitor_without_a_direction():
    options = {"metrics": {"share": Undirected()}, "monitor": "val/share"}
    built = partial(Task, **parts(nn.Linear(4, 1), nn.MSELoss()), **options)
    with pytest.raises(UsageError, match=r"its metric does not say .* give mode=min or mode=max"):
        built()
    assert [built(mode=mode).mode for mode in ("min", "max")] == ["min", "max"]


@pytest.mark.parametrize(("monitor", "mode", "right"), [("val/accuracy", "min", "max"), ("val/loss", "max", "min")])
def test_mode_that_would_keep_the_worst_is_refused(monitor, mode, right):
    with pytest.raises(UsageError, match=f"mode={mode}, which would keep the worst {monitor}: .* mode={right}"):
        make(monitor=monitor, mode=mode)
    assert make(monitor=monitor, mode=right).mode == right


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/accuracy", "max")])
def test_mode_follows_from_the_metric(monitor, mode):
    assert make(monitor=monitor).mode == mode


def test_unknown_monitor_is_refused_with_a_suggestion():
    with pytest.raises(UsageError, match="did you mean val/accuracy"):
        make(monitor="val/acuracy")


def test_validation_metrics_are_means_over_all_samples(tmp_path):
    task, data = make(), Digits(batch_size=64)
    (found,) = trainer(tmp_path).validate(task, datamodule=data, verbose=False)
    inputs, targets = data.tensors("val")
    with torch.no_grad():
        logits = task.eval()(inputs)
    expected = nn.functional.cross_entropy(logits.double(), targets).item()
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["val/accuracy"] == pytest.approx((logits.argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (0, 1e-3), (60, 1e-5), (1e4, 1)])
def test_metrics_equal_scikit_learn_on_the_predictions(offset, scale, precision, tmp_path):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, inputs):
            return inputs * self.weight

    logits = offset + scale * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1).where(torch.arange(50) % 4 > 0, 1)
    task, run = make(network=Given(), classes=3), trainer(tmp_path, precision=precision)
    (found,) = run.test(task, loader(logits, labels), verbose=False)
    batches = run.predict(task, loader(logits, labels))
    written = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert found["test/accuracy"] == pytest.approx(accuracy_score(written["target"], written["prediction"]), rel=1e-6)
    truth, probabilities = written["target"], written["probabilities"]
    assert found["test/loss"] == pytest.approx(log_loss(truth, probabilities), rel=1e-4)
    assert found["test/log_loss"] == pytest.approx(log_loss(truth, probabilities))
    assert found["test/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, written["prediction"]))
    assert found["test/f1"] == pytest.approx(f1_score(truth, written["prediction"], average="macro"))
    assert found["test/auroc"] == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"))
    if "16" not in precision:
        assert torch.equal(written["prediction"], logits.argmax(1))
