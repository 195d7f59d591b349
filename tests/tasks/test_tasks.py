from functools import partial

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.metrics.split_metrics import SplitMetrics
from firstlight.networks import MLP
from firstlight.schedules import Constant, Cosine
from firstlight.tasks import Classification
from tests.tasks.helpers import trainer

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


def test_a_checkpoint_of_a_program_loads_when_every_part_is_given_again(saved):
    task, path = saved
    loaded = Classification.load_from_checkpoint(path, weights_only=True, **{n: part() for n, part in PARTS.items()})
    assert loaded.classes == 10
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("missing", PARTS)
def test_a_checkpoint_of_a_program_is_refused_without_a_part_by_its_name(saved, missing):
    given = {name: part() for name, part in PARTS.items() if name != missing}
    with pytest.raises(UsageError, match=rf"does not hold {missing}: pass.*{missing}=\.\.\."):
        Classification.load_from_checkpoint(saved[1], weights_only=True, **given)


def test_a_step_gives_a_loss_without_a_trainer():
    inputs, targets = torch.randn(4, 64), torch.arange(4)
    task = make()
    assert torch.equal(task.training_step((inputs, targets), 0), nn.functional.cross_entropy(task(inputs), targets))


def test_a_checkpoint_of_weights_alone_is_nothing_to_go_on_from(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    run.fit(make(), datamodule=Digits())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="contains only the model"):  # Lightning's own words
        trainer(tmp_path, max_steps=5).fit(make(), datamodule=Digits(), ckpt_path=tmp_path / "weights.ckpt")


def test_a_loaded_task_that_is_fitted_anew_follows_its_own_horizon(saved, tmp_path):
    parts = {name: part() for name, part in PARTS.items()} | {"schedule": Cosine()}
    loaded = Classification.load_from_checkpoint(saved[1], weights_only=True, **parts)
    run = trainer(tmp_path, max_steps=5)
    run.fit(loaded, datamodule=Digits())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * Cosine()(5, 5))


def test_biases_and_norms_are_not_decayed(tmp_path):
    task, run = make(network=MLP(64, [8], 10, norm="layer")), trainer(tmp_path, max_steps=1)
    run.fit(task, datamodule=Digits())
    decayed, spared = run.optimizers[0].param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in spared["params"]} == {1} and spared["weight_decay"] == 0.0


@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/accuracy", "max")])
def test_mode_follows_from_the_metric(monitor, mode):
    assert make(monitor=monitor).mode == mode


def test_a_monitor_that_no_metric_has_is_refused_with_a_close_name():
    with pytest.raises(UsageError, match="did you mean val/accuracy"):
        make(monitor="val/acuracy")


def test_validation_equals_the_means_over_all_samples(tmp_path):
    task, data = make(), Digits(batch_size=64)
    (found,) = trainer(tmp_path).validate(task, datamodule=data, verbose=False)
    inputs, targets = data.tensors("val")
    with torch.no_grad():
        logits = task.eval()(inputs)
    expected = nn.functional.cross_entropy(logits.double(), targets).item()
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["val/accuracy"] == pytest.approx((logits.argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("weighted", [(), (0, 1, 2, 3, 4, 5), (0, 1, 2), (3, 4, 5)])
@pytest.mark.parametrize("names", [("rmse", "r"), ()])
def test_observed_goes_on_from_a_file_to_the_last_bit(weighted, names, tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand((), generator=generator), *torch.rand(2, size, generator=generator))
        + ((torch.rand((), generator=generator),) if number in weighted else ())
        for number, size in enumerate((7, 7, 13, 3, 7, 1))
    ]
    metrics = {"rmse": MeanSquaredError(squared=False), "r": PearsonCorrCoef()}

    def new():
        return SplitMetrics("train", MetricCollection({name: metrics[name] for name in names}))

    whole, stopped = new(), new()
    for batch in batches:
        whole.add(*batch)
    for batch in batches:
        torch.save(stopped.unread(), tmp_path / "unread")
        stopped = new()
        stopped.add(*batches[0])  # which is forgotten
        stopped.restore(torch.load(tmp_path / "unread", weights_only=True))
        stopped.add(*batch)
    assert ("outputs" in stopped.unread()) == bool(names)
    assert stopped.read() == whole.read()
    assert stopped.read() == stopped.unread() == {}


def test_observed_hands_over_nothing_of_what_it_had_no_room_to_keep(monkeypatch):
    monkeypatch.setattr("firstlight.metrics.split_metrics._MOST_ELEMENTS", 20)
    observed = SplitMetrics("train", MetricCollection({"rmse": MeanSquaredError()}))
    for size in (8, 8, 8, 8):
        observed.update(torch.zeros(()), torch.zeros(size), torch.zeros(size))
        assert bool(observed.unread()) == (observed._room[0] >= 0 and not observed._counted)
    assert observed.unread() == {}
    observed.restore({})
    assert observed.compute() == {}


@pytest.mark.parametrize("names", [("rmse",), ()])
def test_observed_that_goes_on_has_as_much_room_as_before(names, monkeypatch):
    monkeypatch.setattr("firstlight.metrics.split_metrics._MOST_ELEMENTS", 20)
    metrics = {"rmse": MeanSquaredError()}
    whole, rest = (SplitMetrics("train", MetricCollection({name: metrics[name] for name in names})) for _ in range(2))
    for size in (8, 8, 8):
        rest.restore(whole.unread())
        for each in (whole, rest):
            each.add(torch.ones(()), torch.zeros(size), torch.zeros(size))
        assert rest._counted == whole._counted
    assert whole._counted


def test_observed_takes_nothing_over_from_one_with_other_metrics():
    some, none = (
        SplitMetrics("train", MetricCollection({"rmse": MeanSquaredError()})),
        SplitMetrics("train", MetricCollection({})),
    )
    for each in (some, none):
        each.add(torch.ones(()), torch.zeros(3), torch.zeros(3))
    kept = some.unread(), none.unread()
    some.restore(kept[1])
    none.restore(kept[0])
    assert some.read() == none.read() == {}


def test_observed_gives_the_same_whether_it_counts_often_or_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 7, 3)
    batches = [
        (torch.rand((), generator=generator), torch.randn(n, 4, generator=generator), torch.arange(n) % 4)
        for n in sizes
    ]
    read = []
    for most in (0, 2**22):
        monkeypatch.setattr("firstlight.metrics.split_metrics._MOST_ELEMENTS", most)
        observed = SplitMetrics("val", MetricCollection({"accuracy": MulticlassAccuracy(4, average="micro")}))
        assert observed.compute() == {}
        for batch in batches:
            observed.update(*batch)
        read.append(observed.compute())
        assert observed.compute() == {}
    loss = sum(batch[0] * size for batch, size in zip(batches, sizes, strict=True)) / sum(sizes)
    right = torch.cat([outputs.argmax(1) == targets for _, outputs, targets in batches]).float().mean()
    for values in read:
        assert values["val/loss"] == pytest.approx(loss.item())
        assert values["val/accuracy"] == pytest.approx(right.item())
