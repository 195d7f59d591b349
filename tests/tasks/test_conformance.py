from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import firstlight.tasks
from firstlight.errors import UsageError
from firstlight.losses import SupervisedContrastiveLoss
from firstlight.networks import MLP
from firstlight.preflight.probe import probe
from firstlight.tasks import Classification, Task
from tests.tasks.helpers import loader, parts, predicted, trainer

SAMPLES = 24


def inputs():
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))


def zeros_and_ones(labels):
    return (inputs()[:, :labels] > 0.2).float()


class Pair(nn.Module):
    """Returns a code and a reconstruction of its inputs."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, inputs):
        code = self.encoder(inputs)
        return code, self.decoder(code)


@pytest.fixture(autouse=True)
def added_to_firstlight(monkeypatch):
    """Make the classes of this file look as if a contributor had added them to firstlight."""
    for kind in (Autoencoding, Confident):
        for each in [kind, *vars(kind).values()]:
            if callable(each):
                monkeypatch.setattr(each, "__module__", f"firstlight.tasks.{kind.__name__.lower()}")


class Autoencoding(Task):
    """Two terms of its own, outputs that are a tuple, and no loss."""

    def forward(self, inputs):
        return inputs, *self.network(inputs)

    def compute_loss(self, outputs, targets):
        inputs, code, reconstruction = outputs
        return {"reconstruction": (reconstruction - inputs).square().mean(), "size": code.square().mean()}

    def predict_step(self, batch, batch_idx):
        inputs, targets = batch
        return {"code": self(inputs)[1], "target": targets}


class Confident(Classification):
    """A task of firstlight with a second term."""

    def compute_loss(self, outputs, targets):
        penalty = outputs.softmax(1).square().sum(1).mean()
        return {"cross_entropy": super().compute_loss(outputs, targets), "penalty": penalty}


def token_network():
    return MLP(6, [5], 28, norm="layer").append(nn.Unflatten(1, (4, 7)))


OF_CLASSES = {"accuracy": "max", "balanced_accuracy": "max", "f1": "max", "auroc": "max", "log_loss": "min"}

# By task: options, outputs or what builds the network, loss or None, targets, and its metrics and terms with their
# mode.
EXAMPLES = {
    "Autoencoding": ({}, Pair, None, torch.arange(SAMPLES), {"reconstruction": "min", "size": "min"}),
    "BinaryClassification": (
        {}, 1, nn.BCEWithLogitsLoss, zeros_and_ones(1),
        {"accuracy": "max", "auroc": "max", "f1": "max", "balanced_accuracy": "max", "log_loss": "min"},
    ),
    "Classification": ({"classes": 3}, 3, nn.CrossEntropyLoss, torch.arange(SAMPLES) % 3, OF_CLASSES),
    "Confident": (
        {"classes": 3}, 3, nn.CrossEntropyLoss, torch.arange(SAMPLES) % 3,
        {**OF_CLASSES, "cross_entropy": "min", "penalty": "min"},
    ),
    "Embedding": (
        {"k": 2}, 4, SupervisedContrastiveLoss, torch.arange(SAMPLES) % 3, {"nn_accuracy": "max", "recall_at_k": "max"},
    ),
    "LanguageModel": (
        {}, token_network, partial(nn.CrossEntropyLoss, ignore_index=0), torch.arange(4 * SAMPLES).view(-1, 4) % 7,
        {"perplexity": "min", "bits_per_byte": "min"},
    ),
    "MultilabelClassification": (
        {"labels": 3}, 3, nn.BCEWithLogitsLoss, zeros_and_ones(3), {"accuracy": "max", "auroc": "max", "f1": "max"},
    ),
    "Regression": (
        {"outputs": 2}, 2, nn.HuberLoss, 10 + 3 * inputs()[:, :2], {"mae": "min", "rmse": "min", "r2": "max"},
    ),
}  # fmt: skip
TASKS = {name: getattr(firstlight.tasks, name) for name in firstlight.tasks.__all__ if name != "Task"}
TASKS |= {"Autoencoding": Autoencoding, "Confident": Confident}

every_task = pytest.mark.parametrize("name", [name for name in TASKS if name in EXAMPLES])


def loss_of(name):
    build = EXAMPLES[name][2]
    return build and build()


def made(name, **changes):
    options, outputs, _, _, _ = EXAMPLES[name]
    torch.manual_seed(0)
    network = outputs() if callable(outputs) else MLP(6, [5], outputs, norm="layer")
    return TASKS[name](**{**parts(network, loss_of(name), **options), **changes})


def batches(name, **options):
    return loader(inputs(), EXAMPLES[name][3], **options)


def names(name):
    return {"loss", *EXAMPLES[name][4]}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_an_example_here(name):
    assert name in EXAMPLES, f"firstlight.tasks.{name} has no row in EXAMPLES of {__file__}: add one"


@every_task
def test_loaded_checkpoint_predicts_the_same(name, tmp_path):
    task = made(name, l1=1e-3)
    run = trainer(tmp_path, max_steps=3)
    run.fit(task, batches(name), batches(name))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = parts(made(name).network, loss_of(name))
    loaded = type(task).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **again)
    assert loaded.l1 == 1e-3 and loaded.hparams == task.hparams
    before, after = (predicted(each, batches(name), tmp_path) for each in (task, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[column]) for column, value in before.items())
    if "target" in before:
        assert torch.equal(before["target"].view(-1), EXAMPLES[name][3].view(-1))


@every_task
def test_a_checkpoint_is_refused_without_a_part(name, tmp_path):
    task, run = made(name), trainer(tmp_path, max_steps=1)
    run.fit(task, batches(name), batches(name))
    run.save_checkpoint(tmp_path / "a.ckpt")
    given = parts(task.network, loss_of(name))
    del given["network"]
    with pytest.raises(UsageError, match="does not hold network: pass"):
        type(task).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **given)


@every_task
def test_each_split_logs_its_metrics(name, tmp_path):
    task, logger = made(name), CSVLogger(tmp_path)
    run = trainer(tmp_path, max_epochs=1, logger=logger)
    run.fit(task, batches(name), batches(name))
    while_training = names(name) - task.eval_only_metrics
    expected = {f"train/{each}" for each in while_training} | {f"val/{each}" for each in names(name)}
    assert run.logged_metrics.keys() == expected
    (tested,) = run.test(task, batches(name), verbose=False)
    assert tested.keys() == {f"test/{each}" for each in names(name)}
    assert all(torch.tensor(value).isfinite() for value in tested.values())


@every_task
def test_each_metric_can_be_monitored_in_its_direction(name):
    assert made(name).monitor == "val/loss"
    for metric, mode in {"loss": "min", **EXAMPLES[name][4]}.items():
        assert made(name, monitor=f"val/{metric}").mode == mode
    with pytest.raises(UsageError, match=rf"unknown monitor=val/nothing; {name} logs val/loss\b"):
        # A program learns of it when it builds the task, or a run before its first step if terms can be monitored.
        probe(made(name, monitor="val/nothing"), (inputs()[:3], EXAMPLES[name][3][:3]), EXAMPLES[name][3])


@every_task
def test_resumed_run_ends_with_the_same_bits(name, tmp_path):
    def fit(steps, ckpt_path=None):
        seed_everything(0, verbose=False)
        task, run = made(name), trainer(tmp_path, max_steps=steps)
        run.fit(task, batches(name), batches(name), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return task, run

    whole, _ = fit(6)
    _, half = fit(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(6, tmp_path / "half.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@every_task
def test_probe_accepts_good_samples_and_changes_nothing(name):
    task = made(name).train()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    probe(task, (inputs()[:3], EXAMPLES[name][3][:3]), EXAMPLES[name][3])
    assert task.training and task.network.training
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())


@every_task
def test_probe_refuses_inputs_that_the_network_cannot_take(name):
    task = made(name)
    network = type(task.network).__name__
    with pytest.raises(UsageError, match=rf"{network} cannot take samples of shape \(5,\)"):
        probe(task, (inputs()[:, :5][:3], EXAMPLES[name][3][:3]), EXAMPLES[name][3])


@every_task
def test_training_after_a_validation_lowers_the_loss(name, tmp_path):
    task, run = made(name), trainer(tmp_path, max_epochs=30)
    (before,) = run.validate(task, batches(name, batch_size=SAMPLES), verbose=False)
    run.fit(task, batches(name, batch_size=SAMPLES), batches(name))
    (after,) = run.validate(task, batches(name, batch_size=SAMPLES), verbose=False)
    assert after["val/loss"] < before["val/loss"]


@every_task
def test_mixed_precision_trains(name, tmp_path):
    task, run = made(name), trainer(tmp_path, max_steps=3, precision="bf16-mixed")
    run.fit(task, batches(name), batches(name))
    assert all(value.isfinite() for value in run.logged_metrics.values())
    assert all(value.isfinite().all() for value in task.state_dict().values())


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@every_task
def test_l1_outside_its_range_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} was given l1={value}"):
        made(name, l1=value)


@pytest.mark.parametrize(("classes", "mend"), [(4, "set out_features=4, or classes=3"), (2, "set out_features=2")])
def test_a_wrong_number_of_classes_is_mended_in_either_place_that_can_be_right(classes, mend):
    task, labels = made("Classification", classes=classes), torch.arange(SAMPLES) % min(classes, 3)
    message = f"Classification has classes={classes}, but MLP returns 3 outputs per sample: {mend}"
    with pytest.raises(UsageError, match=message):
        probe(task, (inputs()[:3], labels[:3]), labels)
