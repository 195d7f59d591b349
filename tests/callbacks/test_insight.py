"""What the callback Insight records is right, complete, and changes nothing."""

import gc
import json
import math
import sys
import time
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from firstlight.__main__ import main
from firstlight.callbacks import Insight
from firstlight.callbacks.activations import Update, layers, measure_layer
from firstlight.data import Digits
from firstlight.fast_loop.epoch_loop import FastEpochLoop
from firstlight.loggers import History, MetricsCSV
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, ROOT, Ranks, called, logged, newest, repeatable_lines, results

DATA = ROOT / "configs" / "data"
SHORT = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=20", "--trainer.log_every_n_steps=5")


class Network(nn.Module):
    """A network with a dead feature, a sigmoid and a functional ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5)
        self.third = nn.Linear(5, 1)
        with torch.no_grad():
            self.first.bias[2] = -100

    def forward(self, inputs):
        return self.third((10 * self.second(self.first(inputs).relu())).sigmoid())


class Foreign(LightningModule):
    def __init__(self, network=None, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.network = network or Network()
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), 0.1)


def loader(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size)


def fit(module, tmp_path, data=None, **options):
    """Fit with Insight; return the callback and the trainer."""
    insight = Insight()
    options = {"logger": MetricsCSV(tmp_path / "metrics.csv"), "max_epochs": 1, "log_every_n_steps": 1, **options}
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[insight],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data or loader())
    return insight, trainer


def weights(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["random_state"][0]["torch"]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return all(map(same, one, other)) if isinstance(one, list | tuple) else one == other


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("digits_mlp", ()),
        ("digits_mlp", ("--trainer.accumulate_grad_batches=3", "--trainer.gradient_clip_val=0.5")),
        ("diabetes", ()),
        ("letters_transformer", (f"--data.path={DATA}/letters.csv", "--data.batch_size=16")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("digits_mlp", ("--trainer.precision=bf16-mixed",)),
                ("digits_convnet", ()),
                ("digits_convnet_augmented", ()),
                ("digits_supcon", ()),
                ("unicode_names_transformer", ("--data.batch_size=16",)),
                ("bicycles_tabm", (f"--data.path={DATA}/bicycles.csv",)),
            )
        ),
    ],
)
def test_weights_have_the_same_bits_with_and_without_the_record(config, options, tmp_path):
    command = ("fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), *SHORT, *options)
    called(*command, "--experiment=on", cwd=tmp_path)
    called(*command, "--experiment=off", "--disable=[insight]", cwd=tmp_path)
    on, off = newest(tmp_path, "on"), newest(tmp_path, "off")
    assert same(weights(on), weights(off))
    lines = set(repeatable_lines(on))
    assert set(repeatable_lines(off)) <= lines
    names = {line.split(",")[1] for line in lines}
    assert {"fixed/loss_eval", "fixed/loss_train", "initial/loss"} <= names
    assert all(any(name.startswith(kind) for name in names) for kind in ("activation/std/", "gradient/norm/"))
    assert "facts" in results(on) and "facts" not in results(off)


def test_layers_are_measured_as_by_hand(tmp_path):
    module = Foreign()
    fit(module, tmp_path, max_steps=2)
    again = Foreign().network
    for step, (inputs, targets) in zip(range(2), loader(), strict=False):
        before = [each.weight.detach().clone() for each in (again.first, again.second, again.third)]
        first = again.first(inputs)
        hidden = first.relu()
        sums = again.second(hidden)
        units = (10 * sums).sigmoid()
        outputs = again.third(units)
        loss = nn.functional.mse_loss(outputs, targets)
        again.zero_grad()
        loss.backward()
        with torch.no_grad():
            for each in again.parameters():
                each -= 0.1 * each.grad
        expected = {
            "activation/zeros/network.second": (hidden == 0).float().mean(),
            "activation/dead/network.second": (hidden == 0).all(0).float().mean(),
            "activation/zeros/network.third": 0,
            "activation/saturated/network.third": ((units < 0.01) | (units > 0.99)).float().mean(),
            "activation/std/network.first": first.std(0, correction=0).mean(),
            "activation/std/network.third": outputs.std(0, correction=0).mean(),
            "gradient/norm/network.second": again.second.weight.grad.norm(),
            "update/ratio/network.first": (again.first.weight - before[0]).norm() / before[0].norm(),
        }
        for name, value in expected.items():
            assert dict(logged(tmp_path, name))[step] == pytest.approx(
                float(torch.as_tensor(value).detach()), rel=1e-4
            ), name
        assert dict(logged(tmp_path, "activation/dead/network.second"))[step] >= 1 / 6
    assert not logged(tmp_path, "activation/zeros/network.first")  # Its inputs are data.
    assert not logged(tmp_path, "activation/saturated/network.second")
    assert logged(tmp_path, "initial/loss") == [(0, pytest.approx(first_loss(), rel=1e-6))]
    assert len(logged(tmp_path, "seconds/step")) == len(logged(tmp_path, "seconds/wait")) == 2


def first_loss():
    inputs, targets = next(iter(loader()))
    return nn.functional.mse_loss(Foreign().network(inputs), targets).item()


def test_a_history_in_memory_gives_the_findings_of_a_metrics_file(tmp_path):
    def run(logger):
        torch.manual_seed(0)
        network = MLP(64, [16, 16], 10, activation=nn.Identity)
        task = Classification(network, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=1e-7), Constant(), classes=10)
        insight, trainer = fit(task, tmp_path, Digits(), logger=logger, max_epochs=2, log_every_n_steps=10)
        return insight.finish(trainer), insight.record(trainer).series

    (found, series), (expected, file) = run(History()), run(MetricsCSV(tmp_path / "metrics.csv"))
    assert [each.name for each in found][:2] == ["missing_nonlinearity", "learning_rate_too_low"]
    assert found == expected
    assert series.keys() == file.keys()
    for name in series.keys() - {"seconds/step", "seconds/wait"}:
        assert series[name].steps.tolist() == file[name].steps.tolist()
        assert series[name].values.tolist() == file[name].values.tolist()


@pytest.mark.parametrize(("value", "algorithm", "clipped"), [(1e-3, "norm", 1), (1e9, "norm", 0), (1e-3, "value", 1)])
def test_clipping_is_recorded(value, algorithm, clipped, tmp_path):
    fit(Foreign(), tmp_path, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
    assert [found for _, found in logged(tmp_path, "clipped")] == [clipped] * 4


def test_dropout_does_not_count_as_zeros():
    inputs = torch.ones(64, 32, requires_grad=True).relu()
    for each in (inputs, nn.functional.dropout(inputs, 0.5), nn.functional.dropout(inputs, 0.5).unflatten(1, (4, 8))):
        name, found = measure_layer(nn.Linear(8, 1), each, each)
        assert name == "ReLU" and found["zeros"] == 0 and found["dead"] == 0


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        torch.zeros(2, 3, dtype=torch.int64),
        (torch.zeros(2, 3),),
        torch.zeros(0, 3, requires_grad=True).relu(),
        torch.full((2, 3), torch.nan, requires_grad=True).relu(),
        torch.zeros((), requires_grad=True) * 1,
        torch.zeros(3, requires_grad=True).relu(),
    ],
)
def test_any_input_of_a_layer_is_measured_or_left_out(inputs):
    name, found = measure_layer(nn.Linear(3, 1), inputs, inputs)
    assert isinstance(name, str) and all(value.ndim == 0 for value in found.values())


def test_a_large_network_has_forty_measured_layers_with_the_first_and_the_last():
    found = list(layers(nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))))
    assert len(found) == 40 and found[0] == "0" and found[-1] == "99"


def test_the_update_of_a_large_weight_in_any_order_of_memory_is_estimated():
    weight = nn.Parameter(torch.randn(512, 64, 3, 3).contiguous(memory_format=torch.channels_last))
    update = Update({"a": weight})
    with torch.no_grad():
        weight *= 1.01
    assert float(update.ratios()["a"]) == pytest.approx(0.01, rel=1e-3)


class Odd(Classification):
    """Never zeroes its gradients, cuts a branch off, and keeps dropout in evaluation mode."""

    def optimizer_zero_grad(self, *given):
        pass

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.network.eval()

    def forward(self, inputs):
        return self.network(inputs) + self.cut(inputs.flatten(1)).detach()


def test_facts_tell_what_is_odd_about_a_run(tmp_path):
    task = Odd(MLP(64, [8], 10, dropout=0.5), nn.CrossEntropyLoss(), torch.optim.SGD, Constant(), 10)
    task.cut = nn.Linear(64, 10)
    nn.init.constant_(task.cut.weight, 0.25)
    task.network.output.requires_grad_(False)
    insight, trainer = fit(task, tmp_path, Digits(on_device=False))
    facts = insight.facts(trainer)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["zero_grad_seen"] is False
    assert facts["modules_in_eval"] == ["network"]
    found = {each["name"]: (each["trainable"], each["has_gradient"]) for each in facts["layers"]}
    assert found == {"network.hidden0.0": (True, True), "network.output": (False, False), "cut": (True, False)}
    assert facts["constant_weights"] == ["cut"]
    assert facts["dropout"] == [0.5] and facts["activations"] == ["ReLU"]
    assert facts["optimizer"]["class"] == "SGD" and facts["optimizer"]["lr"] == 0.001
    assert facts["kind"] == "classification" and facts["loss"] == "CrossEntropyLoss"
    assert facts["chance_loss"] == pytest.approx(entropy(facts["class_counts"]), rel=1e-5)
    assert facts["initial_loss"] == logged(tmp_path, "initial/loss")[0][1]
    assert facts["shuffled"]["label_runs"] == pytest.approx(1, abs=0.1)
    assert facts["shuffled"]["order_repeats"] is False


def entropy(counts):
    return -sum(count / sum(counts) * math.log(count / sum(counts)) for count in counts)


@pytest.mark.parametrize(("activation", "is_affine"), [(nn.ReLU, False), (nn.Identity, True)])
def test_a_network_without_a_nonlinearity_is_affine(activation, is_affine, tmp_path):
    network = MLP(64, [16, 16], 10, activation=activation, norm="batch", dropout=0.1)
    task = Classification(network, nn.CrossEntropyLoss(), torch.optim.SGD, Constant(), 10)
    insight, trainer = fit(task, tmp_path, Digits(), limit_train_batches=1)
    assert (insight.facts(trainer)["affine_error"] < 1e-4) is is_affine


def test_an_averaged_copy_is_no_frozen_layer(tmp_path):
    class Averages(Foreign):
        def __init__(self):
            super().__init__()
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))

        def on_train_batch_end(self, *args):
            self.averaged.update_parameters(self.network)

    insight, trainer = fit(Averages(), tmp_path)
    assert [each["name"] for each in insight.facts(trainer)["layers"]] == [
        "network.first",
        "network.second",
        "network.third",
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_order_of_a_foreign_loader_is_seen(shuffle, tmp_path):
    class Classifies(Foreign):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    labels = torch.arange(4).repeat_interleave(100)
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(400, 4), labels), 20, shuffle=shuffle)
    insight, trainer = fit(Classifies(nn.Linear(4, 4)), tmp_path, data, max_epochs=2)
    found = insight.facts(trainer)["shuffled"]
    assert found["label_runs"] > 50 if not shuffle else found["label_runs"] == pytest.approx(1, abs=0.3)
    assert found["order_repeats"] is not shuffle


class Adversarial(LightningModule):
    """Two optimisers, of which one steps in each second batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 1), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for index, (optimizer, part) in enumerate(zip(self.optimizers(), (self.one, self.other), strict=True)):
            if index <= batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(part(batch[0]).square().mean())
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.one, self.other)]


def test_several_optimisers_with_manual_steps_are_recorded(tmp_path):
    insight, trainer = fit(Adversarial(), tmp_path, log_every_n_steps=2)
    for kind in ("activation/std", "gradient/norm", "update/ratio"):
        assert [step for step, _ in logged(tmp_path, f"{kind}/one")] == [1, 3], kind
        assert [step for step, _ in logged(tmp_path, f"{kind}/other")] == [1, 3], kind
    assert insight.facts(trainer)["initial_loss"] is None and insight.facts(trainer)["optimizers"] == 2


def test_sparse_gradients_are_recorded(tmp_path):
    class Words(Foreign):
        def training_step(self, batch, batch_idx):
            return self.network(batch[0].abs().long()).square().mean()

    fit(Words(nn.Embedding(50, 3, sparse=True)), tmp_path)
    assert all(value > 0 for _, value in logged(tmp_path, "gradient/norm/network"))
    assert all(value > 0 for _, value in logged(tmp_path, "update/ratio/network"))


def test_a_compiled_network_has_no_activations(tmp_path):
    network = Network()
    network.compile(backend="eager")
    insight, trainer = fit(Foreign(network), tmp_path)
    assert insight.facts(trainer)["compiled"] is True
    assert not logged(tmp_path, "activation/std/network.first") and logged(tmp_path, "gradient/norm/network.first")


class Counts(nn.Module):
    """A network whose forward pass changes attributes, a buffer and a generator."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs):
        self.calls += 1
        self.scale = self.scale * 1.01
        noise = torch.rand((), generator=self.generator) + torch.rand(())
        return self.layer(inputs.flatten(1)) * (self.calls + self.scale + noise)


def test_a_network_that_counts_its_calls_is_not_disturbed(tmp_path):
    ends = []
    for name in ("on", "off"):
        torch.manual_seed(0)
        task = Classification(Counts(), nn.CrossEntropyLoss(), torch.optim.SGD, Constant(), 10)
        more = {"logger": False} if name == "off" else {}  # Without a logger, nothing is recorded.
        fit(task, tmp_path / name, Digits(), max_epochs=2, log_every_n_steps=7, **more)
        ends.append({**task.state_dict(), "calls": torch.tensor(task.network.calls), "next": torch.rand(1)})
    assert same(*ends)
    assert len(logged(tmp_path / "on", "fixed/loss_train")) >= 2


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_a_run_without_a_record(tmp_path):
    for name, more in (("on", []), ("off", ["--disable=[insight]"])):
        command = ["fit", "--config", CONFIG, "--config", DDP, *SHORT, f"--experiment={name}", *more]
        Ranks(main, command, cwd=tmp_path, ranks=2).succeed()
    on, off = newest(tmp_path, "on"), newest(tmp_path, "off")
    assert same(weights(on), weights(off))
    assert set(repeatable_lines(off)) <= set(repeatable_lines(on))
    assert results(on)["facts"]["processes"] == 2


def test_a_run_that_fails_has_results_with_error_and_facts(tmp_path):
    failed = called("run", "--config", CONFIG, "--model.optimizer.lr=1e30", cwd=tmp_path, code=1)
    found = results(newest(tmp_path))
    assert found["error"] in failed.stderr and "gradient is not finite" in found["error"]
    assert found["facts"]["ending"] == found["error"] and found["facts"]["optimizer"]["lr"] == 1e30
    assert found["metrics"] == {} and isinstance(found["findings"], list)


def test_a_fault_in_the_rules_does_not_end_a_run(tmp_path, monkeypatch):
    def fails(record):
        raise ZeroDivisionError

    monkeypatch.setattr("firstlight.callbacks.insight.find", fails)
    called("fit", "--config", CONFIG, *SHORT, cwd=tmp_path)
    found = results(newest(tmp_path))
    assert found["findings"] == [] and found["facts"]["not_recorded"] == ["ZeroDivisionError: "]


def test_checkpoints_do_not_depend_on_the_time_that_a_loader_takes(tmp_path):
    def slow_collate(samples):
        time.sleep(0.05)
        return default_collate(samples)

    samples = loader().dataset
    slow, trainer = fit(Foreign(), tmp_path / "slow", DataLoader(samples, 4, collate_fn=slow_collate))
    slow.evaluate(trainer)
    fast, trainer = fit(Foreign(), tmp_path / "fast", DataLoader(samples, 4))
    fast.evaluate(trainer)
    assert "slow_loader" in [finding.name for finding in slow.findings]
    assert slow.state_dict() == fast.state_dict()


def test_between_loggings_the_record_adds_at_most_six_python_calls_a_step(tmp_path, monkeypatch):
    advance, counts = FastEpochLoop.advance, {}

    def watched(step, fetcher):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        gc.disable()  # What is collected may call Python.
        sys.setprofile(count)
        try:
            advance(step, fetcher)
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.setdefault(step.global_step, []).append(calls)

    monkeypatch.setattr(FastEpochLoop, "advance", watched)
    command = ("fit", "--config", CONFIG, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=50")
    called(*command, cwd=tmp_path)
    called(*command, "--disable=[insight]", cwd=tmp_path)
    assert len(counts) == 80
    for step, (on, off) in counts.items():
        if step > 2 and step % 40 != 1 and step % 50:
            assert on - off <= 6, step
