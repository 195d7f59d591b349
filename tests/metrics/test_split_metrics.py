import pytest
import torch
from torchmetrics import MeanSquaredError, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from firstlight.errors import UsageError
from firstlight.metrics import BitsPerByte, SplitMetrics
from firstlight.metrics import split_metrics as module

METRICS = {"rmse": MeanSquaredError(squared=False), "r": PearsonCorrCoef()}
CPU = torch.device("cpu")


def random_batches(weighted=(), sizes=(7, 7, 13, 3, 7, 1)):
    """Return batches for `update`; some have a tensor as weight."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand((), generator=generator),
            torch.rand((), generator=generator) if number in weighted else size,
            tuple(torch.rand(2, size, generator=generator)),
        )
        for number, size in enumerate(sizes)
    ]


def with_terms(batch):
    loss, weight, inputs = batch
    return loss, weight, inputs, {"fit": 0.25 * loss, "penalty": 0.75 * loss}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("weighted", [(), (0, 1, 2, 3, 4, 5), (0, 1, 2), (3, 4, 5)])
@pytest.mark.parametrize("names", [("rmse", "r"), ()])
@pytest.mark.parametrize("has_terms", [False, True])
def test_state_restored_from_a_file_gives_the_same_bits(has_terms, weighted, names, tmp_path):
    batches = random_batches(weighted)
    if not names:
        batches = [(loss, weight, None) for loss, weight, _ in batches]
    if has_terms:
        batches = [with_terms(batch) for batch in batches]

    def new():
        return SplitMetrics("train", {name: METRICS[name] for name in names})

    whole, stopped = new(), new()
    for batch in batches:
        whole.update(*batch)
    for batch in batches:
        torch.save(stopped.state_dict(), tmp_path / "state")
        stopped = new()
        stopped.update(*batches[0])  # This batch is forgotten.
        stopped.load_state_dict(torch.load(tmp_path / "state", weights_only=True), CPU)
        stopped.update(*batch)
    assert ("predictions" in stopped.state_dict()) == bool(names)
    values = stopped.compute()
    assert same(values, whole.compute())
    terms = {"train/fit", "train/penalty"} if has_terms else set()
    assert values.keys() == {"train/loss", *terms, *(f"train/{name}" for name in names)}
    assert stopped.compute() == stopped.state_dict() == {}


def test_state_is_empty_after_some_batches_were_summed(monkeypatch):
    monkeypatch.setattr(module, "_MAX_ELEMENTS", 20)
    metrics = SplitMetrics("train", {"rmse": MeanSquaredError()})
    for kept in (True, True, False, False):
        metrics.update(torch.zeros(()), 8, (torch.zeros(8), torch.zeros(8)))
        assert bool(metrics.state_dict()) == kept
    metrics.load_state_dict({}, CPU)
    assert metrics.compute() == {}


@pytest.mark.parametrize("names", [("rmse",), ()])
def test_restored_metrics_sum_at_the_same_batch_as_before(names, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ELEMENTS", 20)
    monkeypatch.setattr(module, "_ELEMENTS_PER_LOSS", 8)
    whole, restored = (SplitMetrics("train", {name: METRICS[name] for name in names}) for _ in range(2))
    inputs = (torch.zeros(8), torch.zeros(8)) if names else None
    for kept in (True, True, False):
        restored.load_state_dict(whole.state_dict(), CPU)
        for each in (whole, restored):
            each.update(torch.ones(()), 8, inputs)
        assert bool(restored.state_dict()) == bool(whole.state_dict()) == kept


def test_state_of_other_metrics_is_not_restored():
    some, none = SplitMetrics("train", {"rmse": MeanSquaredError()}), SplitMetrics("train", {})
    some.update(torch.ones(()), 3, (torch.zeros(3), torch.zeros(3)))
    none.update(torch.ones(()), 3)
    states = some.state_dict(), none.state_dict()
    some.load_state_dict(states[1], CPU)
    none.load_state_dict(states[0], CPU)
    assert some.compute() == none.compute() == {}


def test_values_do_not_depend_on_how_many_batches_are_summed_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 7, 3)
    batches = [
        (torch.rand((), generator=generator), size, (torch.randn(size, 4, generator=generator), torch.arange(size) % 4))
        for size in sizes
    ]
    found = []
    for most in (0, 2**22):
        monkeypatch.setattr(module, "_MAX_ELEMENTS", most)
        metrics = SplitMetrics("val", {"accuracy": MulticlassAccuracy(4, average="micro")})
        assert metrics.compute() == {}
        for batch in batches:
            metrics.update(*with_terms(batch))
        found.append(metrics.compute())
        assert metrics.compute() == {}
    loss = sum(batch[0] * size for batch, size in zip(batches, sizes, strict=True)) / sum(sizes)
    correct = torch.cat([outputs.argmax(1) == targets for _, _, (outputs, targets) in batches]).float().mean()
    for values in found:
        assert values["val/loss"] == pytest.approx(loss.item())
        assert values["val/fit"] == pytest.approx(0.25 * loss.item())
        assert values["val/penalty"] == pytest.approx(0.75 * loss.item())
        assert values["val/accuracy"] == pytest.approx(correct.item())


def test_metrics_without_inputs_get_losses_and_weights():
    metrics = SplitMetrics("val", {"bits": BitsPerByte()})
    metrics.update(torch.tensor(2.0), torch.tensor(3))
    metrics.update(torch.tensor(4.0), torch.tensor(1))
    assert metrics.compute()["val/bits"] == pytest.approx(2.5 / torch.tensor(2.0).log().item())


def test_memory_is_bounded_without_predictions(monkeypatch):
    monkeypatch.setattr(module, "_MAX_ELEMENTS", 10 * module._ELEMENTS_PER_LOSS)
    metrics = SplitMetrics("train", {})
    for _ in range(100):
        metrics.update(torch.ones(()), 1)
        assert len(metrics._batches) <= 10


@pytest.mark.parametrize("most", [0, 2**22])
def test_terms_that_change_between_batches_are_refused(most, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ELEMENTS", most)
    metrics = SplitMetrics("train", {})

    def run():
        metrics.update(torch.ones(()), 1, None, {"kl": torch.ones(())})
        metrics.update(torch.ones(()), 1, None, {"other": torch.ones(())})
        metrics.compute()

    with pytest.raises(UsageError, match="has the terms other in one train batch and kl in another"):
        run()


@pytest.mark.parametrize("name", ["loss", "rmse"])
def test_a_term_with_a_name_that_is_taken_is_refused(name):
    metrics = SplitMetrics("train", {"rmse": MeanSquaredError()})
    metrics.update(torch.ones(()), 1, (torch.ones(1), torch.ones(1)), {name: torch.ones(())})
    with pytest.raises(UsageError, match=f"the loss has a term {name}"):
        metrics.compute()


def test_other_terms_after_compute_replace_the_earlier_ones():
    metrics = SplitMetrics("train", {})
    for name in ("first", "second"):
        metrics.update(torch.ones(()), 1, None, {name: torch.ones(())})
        assert metrics.compute().keys() == {"train/loss", f"train/{name}"}
