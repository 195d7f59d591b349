import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from firstlight.data import Tensors
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.preflight.probe import probe
from firstlight.tasks import Regression
from tests.helpers import ROOT, called, newest
from tests.tasks.helpers import loader, parts, predicted, trainer

INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
TARGETS = 1990 + 12 * INPUTS[:, :1] + torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
PRECISIONS = ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"]
SEVERAL = torch.cat([TARGETS, INPUTS[:, 1:2] / 100, torch.full((40, 1), 7.0)], dim=1)


def regression(**changes):
    torch.manual_seed(0)
    outputs = changes.get("outputs", 1)
    return Regression(**{**parts(MLP(4, [], outputs), nn.MSELoss(), lr=0.1), **changes})


def fitted(tmp_path, targets=TARGETS, **options):
    task = regression(outputs=targets.shape[1])
    options = {"max_epochs": 20, **options}
    run = trainer(tmp_path, **options)
    run.fit(task, loader(INPUTS, targets, batch_size=7, shuffle=True), loader(INPUTS, targets, batch_size=7))
    return task, run


@pytest.mark.parametrize("targets", [TARGETS, SEVERAL[:, :2]], ids=["one output", "two outputs"])
def test_metrics_equal_scikit_learn_in_the_users_units(targets, tmp_path):
    task, run = fitted(tmp_path, targets)
    (found,) = run.test(task, loader(INPUTS, targets, batch_size=7), verbose=False)
    predictions = predicted(task, loader(INPUTS, targets, batch_size=7), tmp_path)["prediction"]
    predictions = predictions.reshape(targets.shape).double()
    expected = {
        "test/mae": mean_absolute_error(targets.flatten(), predictions.flatten()),
        "test/rmse": root_mean_squared_error(targets.flatten(), predictions.flatten()),
        "test/r2": r2_score(targets, predictions),
    }
    loss = found.pop("test/loss")
    assert found == pytest.approx(expected, rel=1e-3)
    assert found["test/r2"] > 0.8
    standardised = (targets - predictions) / targets.double().std(dim=0, correction=0)
    assert loss == pytest.approx(standardised.square().mean().item(), rel=1e-3)


def test_metrics_stay_exact_with_a_large_target_mean(tmp_path):
    near, far = INPUTS[:, :1].round(decimals=1), 2.0**20 + INPUTS[:, :1].round(decimals=0)
    for targets in (near, far):
        task, run = fitted(tmp_path, targets, max_epochs=5)
        (found,) = run.test(task, loader(INPUTS, targets), verbose=False)
        with torch.no_grad():
            predictions = task(INPUTS).double() * task.target_std + task.target_mean
        assert found["test/r2"] == pytest.approx(r2_score(targets, predictions), abs=1e-3)


def test_statistics_are_those_of_the_whole_training_set(tmp_path):
    task, _ = fitted(tmp_path, SEVERAL, max_steps=1)
    expected = SEVERAL.double().mean(dim=0), SEVERAL.double().std(dim=0, correction=0)
    torch.testing.assert_close(task.target_mean, expected[0])
    torch.testing.assert_close(task.target_std[:2], expected[1][:2])
    assert task.target_std[2] == 1.0  # A constant target.
    assert {"target_mean", "target_std"} <= task.state_dict().keys()


def test_statistics_do_not_depend_on_how_batches_are_drawn(tmp_path):
    data = TensorDataset(INPUTS, TARGETS)
    loaders = {
        "dropping": DataLoader(data, batch_size=16, shuffle=True, drop_last=True),
        "batches": DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 16, drop_last=True)),
    }
    for each in loaders.values():
        task = regression()
        trainer(tmp_path, max_steps=1).fit(task, each, loader(INPUTS, TARGETS))
        torch.testing.assert_close(task.target_mean, TARGETS.double().mean(dim=0))


class Noisy(TensorDataset):
    """Draws a random number for every sample, as an augmentation does."""

    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + 0 * torch.rand(()) * np.random.rand(), targets


def test_reading_the_targets_consumes_no_random_state(tmp_path):
    states = []

    class Watched(Regression):
        def fit_targets(self):
            states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))
            super().fit_targets()
            states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))

    batches = DataLoader(Noisy(INPUTS, TARGETS), batch_size=8, shuffle=True)
    task = Watched(**parts(MLP(4, [], 1), nn.MSELoss()))
    trainer(tmp_path, max_epochs=1).fit(task, batches, loader(INPUTS, TARGETS))
    (before, after) = states
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("offset", "scale"), [(1.7e9, 20.0), (1e9, 1e-3), (1.0, 1e-6), (-1e9, 1.0), (0.0, 1e9)])
def test_metrics_equal_scikit_learn_on_the_predictions_for_every_offset_and_precision(
    offset, scale, precision, tmp_path
):
    values = offset + scale * (INPUTS[:, 0].double() + torch.randn(40).double() / 3)
    task, data = regression(), Tensors(INPUTS, values, batch_size=7)
    run = trainer(tmp_path, max_epochs=5, precision=precision)
    run.fit(task, data)
    (found,) = run.test(task, data, verbose=False)
    outputs = run.predict(task, data)
    predictions, targets = (torch.cat([batch[name] for batch in outputs]) for name in ("prediction", "target"))
    assert torch.equal(targets, values[data.rows("test")])
    deviation = values[data.rows("train")].std(correction=0)
    loss = ((predictions - targets) / deviation).square().mean().item()
    # A prediction in the units of the target is rounded to float64; the loss sees the outputs before that.
    rounding = np.spacing(abs(offset)) / 2 / deviation.item()
    expected = {
        "test/loss": pytest.approx(loss, rel=1e-4, abs=2 * loss**0.5 * rounding),
        "test/mae": pytest.approx(mean_absolute_error(targets, predictions), rel=1e-6),
        "test/rmse": pytest.approx(root_mean_squared_error(targets, predictions), rel=1e-6),
        "test/r2": pytest.approx(r2_score(targets, predictions), rel=1e-6),
    }
    assert found == expected
    assert len(predictions.unique()) > 3
    assert found["test/rmse"] < 2 * deviation


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float64_targets_of_any_data_loader_are_not_rounded(precision, tmp_path):
    values = 1.7e9 + 20 * INPUTS[:, :1].double()
    run = trainer(tmp_path, max_epochs=2, precision=precision)
    task = regression()
    run.fit(task, loader(INPUTS, values), loader(INPUTS, values))
    found = torch.cat([batch["target"] for batch in run.predict(task, loader(INPUTS, values))])
    assert torch.equal(found, values[:, 0])
    assert "convert_input" not in vars(run.precision_plugin)  # The trainer is as it was.


def test_time_stamps_are_predicted(tmp_path):
    inputs = torch.arange(61.0)[:, None]
    task, data = regression(network=MLP(1, [], 1)), Tensors(inputs, 1_700_000_000 + inputs[:, 0].double(), batch_size=8)
    run = trainer(tmp_path, max_epochs=40)
    run.fit(task, data)
    outputs = run.predict(task, data)
    predictions, targets = (torch.cat([batch[name] for batch in outputs]) for name in ("prediction", "target"))
    assert len(predictions.unique()) == len(targets)
    assert (predictions - targets).abs().max() < 1


def test_resumed_run_keeps_its_statistics_and_a_new_run_computes_its_own(tmp_path):
    task, run = fitted(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    moved = loader(INPUTS, TARGETS + 100)
    resumed, anew = regression(), Regression.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, **parts(MLP(4, [], 1), nn.MSELoss())
    )  # fmt: skip
    assert torch.equal(anew.target_mean, task.target_mean)
    trainer(tmp_path, max_epochs=2).fit(resumed, moved, moved, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(resumed.target_mean, task.target_mean)
    trainer(tmp_path, max_epochs=1).fit(anew, moved, moved)
    torch.testing.assert_close(anew.target_mean, task.target_mean + 100)


def test_training_does_not_depend_on_the_units_of_the_targets(tmp_path):
    weights = []
    for scale, shift in ((1.0, 0.0), (1024.0, 0.0), (1.0, 512.0)):
        # Few bits, so that scaling and shifting round nothing.
        targets = scale * (8 * INPUTS[:, :1]).round() + shift
        task = regression()
        trainer(tmp_path, max_steps=20).fit(task, loader(INPUTS, targets), loader(INPUTS, targets))
        weights.append(task.network.output.weight)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-4, atol=1e-5)


def test_targets_of_another_shape_are_refused_at_every_step(tmp_path):
    for wrong in (TARGETS[:, 0], SEVERAL, TARGETS.unsqueeze(2)):
        with pytest.raises(UsageError, match=r"for outputs \(8, 1\) float32: they must be floating point of exactly"):
            trainer(tmp_path).validate(regression(), loader(INPUTS, wrong), verbose=False)


def test_probe_refuses_wrong_targets_and_outputs():
    for wrong in (TARGETS[:, 0], SEVERAL, TARGETS.long(), TARGETS.half()):
        with pytest.raises(UsageError, match=r"they must be \(40, 1\) float64 or float32"):
            probe(regression(), (INPUTS[:3], wrong[:3]), wrong)
    with pytest.raises(UsageError, match=r"has outputs=1, but MLP returns 3 outputs per sample: set out_features=1$"):
        probe(regression(network=MLP(4, [], 3)), (INPUTS[:3], TARGETS[:3]), TARGETS)


def test_outputs_below_one_are_refused():
    with pytest.raises(UsageError, match="Regression was given outputs=0: it must be at least 1"):
        Regression(**parts(MLP(4, [], 1), nn.MSELoss(), outputs=0))


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield INPUTS[0], TARGETS[0]


@pytest.mark.parametrize("batches", [DataLoader(Stream(), batch_size=4), [(INPUTS, TARGETS)]], ids=["stream", "list"])
def test_data_without_a_length_is_refused(batches, tmp_path):
    with pytest.raises(UsageError, match="a DataLoader of a data set with a length"):
        trainer(tmp_path, max_steps=2).fit(regression(), batches, loader(INPUTS, TARGETS))


@pytest.mark.parametrize(("targets", "shape"), [(TARGETS, (40,)), (SEVERAL, (40, 3))])
def test_predictions_have_the_shape_and_unit_of_the_targets(targets, shape, tmp_path):
    task, _ = fitted(tmp_path, targets)
    found = predicted(task, loader(INPUTS, targets), tmp_path)
    assert found["prediction"].shape == found["target"].shape == shape
    assert torch.equal(found["target"].reshape(targets.shape), targets)
    assert (found["prediction"].reshape(targets.shape)[:, 0] - targets[:, 0]).abs().mean() < 4


def test_scores_of_the_command_line_equal_scikit_learn_on_the_file_and_the_predictions(tmp_path):
    folder, table = ROOT / "configs", tmp_path / "times.csv"
    times = [1_700_000_000 + second for second in range(61)]
    table.write_text("second,time\n" + "".join(f"{second},{time}\n" for second, time in enumerate(times)))
    data = ["--data=Table", f"--data.path={table}", "--data.target=time", "--data.kind=regression"]
    model = ["--model.network.in_features=1", "--trainer.max_epochs=5"]
    called("run", "--config", str(folder / "diabetes_linear.yaml"), *data, *model, cwd=tmp_path)
    run = newest(tmp_path, "diabetes_linear")
    called("test", "--run", str(run), cwd=tmp_path)
    called("predict", "--run", str(run), cwd=tmp_path)
    (results,) = run.glob("evaluations/test-*/results.json")
    found = json.loads(results.read_text())["metrics"]
    (file,) = run.glob("evaluations/predict-*/predictions.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    predictions, targets = [float(row["prediction"]) for row in rows], [times[int(row["index"])] for row in rows]
    assert found["test/r2"] == pytest.approx(r2_score(targets, predictions), rel=1e-6)
    assert found["test/rmse"] == pytest.approx(root_mean_squared_error(targets, predictions), rel=1e-6)
    assert len(set(predictions)) == len(rows)
