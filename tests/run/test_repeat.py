"""`firstlight repeat`: runs with several seeds or folds, each with the bits that it has alone."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
import yaml
from scipy import stats

from firstlight.__main__ import main
from firstlight.checkpoints.io import read
from firstlight.cli.parser import CLI
from tests.helpers import CONFIG, Ranks, called, files, results

SMALL = ["--config", CONFIG, "--model.network.hidden=[16]", "--disable=progress", "--report=false"]
OPTIONS = [*SMALL, "--trainer.max_epochs=2"]


def runs_of(cwd, experiment="digits_mlp"):
    """Return the runs of the only group of an experiment, by index."""
    found = {}
    for path in (cwd / "runs" / experiment).glob("*/group.json"):
        group = json.loads(path.read_text())
        if (path.parent / "results.json").is_file():
            assert results(path.parent)["group"] == group
        found.setdefault(group["index"], []).append(path.parent)
    assert len({json.loads((each / "group.json").read_text())["name"] for same in found.values() for each in same}) == 1
    return [sorted(found[index])[-1] for index in sorted(found)]


def weights(run, name="last"):
    return read(run / "checkpoints" / f"{name}.ckpt")["state_dict"]


def check_same(one, other):
    """Check that two runs have the same metrics and weights, to the last bit."""
    for name in ("metrics", "best"):
        assert results(one)[name] == results(other)[name]
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def rows_of(table):
    """Return the cells of the printed table of means by the name of the metric."""
    means = table[table.index("95 % interval") :].splitlines()[1:]
    return {row[0]: row[1:] for row in (re.split(r"  +", line) for line in means if line.startswith(("val/", "test/")))}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("seeds")
    return cwd, called("repeat", *OPTIONS, "--seed_everything=5", "--seeds=3", cwd=cwd)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("folds")
    return cwd, called("repeat", *OPTIONS, "--folds", "3", cwd=cwd)


def test_each_seed_is_an_ordinary_run_of_one_group(seeds):
    cwd, _ = seeds
    runs = runs_of(cwd)
    groups = [results(run)["group"] for run in runs]
    assert [(group["kind"], group["index"], group["count"]) for group in groups] == [("seeds", i, 3) for i in range(3)]
    assert groups[0]["name"] == runs[0].name
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] for run in runs] == [5, 6, 7]
    assert len({results(run)["metrics"]["test/loss"] for run in runs}) == 3


def test_seeds_share_the_split(seeds):
    cwd, _ = seeds
    assert len({read(run / "checkpoints" / "best.ckpt")["Digits"]["split"] for run in runs_of(cwd)}) == 1


@pytest.mark.parametrize("group", [pytest.param("seeds", marks=pytest.mark.slow), "folds"])
def test_the_config_of_each_repetition_gives_run_the_same_bits(group, request, tmp_path):
    cwd, _ = request.getfixturevalue(group)
    for index, run in enumerate(runs_of(cwd)):
        alone = tmp_path / str(index)
        alone.mkdir()
        called("run", "--config", str(run / "config.yaml"), cwd=alone)
        (other,) = [path.parent for path in alone.glob("runs/digits_mlp/*/results.json")]
        check_same(run, other)
        assert "group" not in results(other)


def test_printed_means_and_intervals_of_seeds_are_those_of_scipy(seeds):
    cwd, done = seeds
    rows = rows_of(done.stdout)
    assert {"val/loss", "test/accuracy"} <= rows.keys()
    for name, (mean, std, interval) in rows.items():
        values = [(results(run)["metrics"] | results(run)["best"])[name] for run in runs_of(cwd)]
        low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert (mean, std) == (f"{np.mean(values):.6g}", f"{np.std(values, ddof=1):.3g}")
        assert interval == f"{low:.6g} to {high:.6g}"
    for index, run in enumerate(runs_of(cwd)):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"seed {5 + index} "))
        assert line.endswith(f"runs/digits_mlp/{run.name}")
        assert f"{results(run)['metrics']['test/loss']:.6g}" in line


def test_folds_divide_all_samples_but_those_of_the_shared_test_split(folds):
    cwd, _ = folds
    modules = [CLI("fit", ["--config", str(run / "config.yaml")]).experiment.datamodule for run in runs_of(cwd)]
    plain = CLI("fit", OPTIONS).experiment.datamodule
    assert [(module.fold, module.folds) for module in modules] == [(0, 3), (1, 3), (2, 3)]
    assert all(module.rows("test").tolist() == plain.rows("test").tolist() for module in modules)
    validated = np.concatenate([module.rows("val") for module in modules])
    assert sorted(validated) == sorted([*plain.rows("train"), *plain.rows("val")])


def test_intervals_of_folds_are_corrected_for_shared_training_samples(folds):
    cwd, done = folds
    rows = rows_of(done.stdout)
    for name, (mean, _, interval) in rows.items():
        values = [(results(run)["metrics"] | results(run)["best"])[name] for run in runs_of(cwd)]
        assert mean == f"{np.mean(values):.6g}"
        # 1/3 and the scored samples by the training samples, 509 to 1,018.
        half = stats.t.ppf(0.975, 2) * np.sqrt((1 / 3 + 1 / 2) * np.var(values, ddof=1))
        expected = "-" if name.startswith("test/") else f"{np.mean(values) - half:.6g} to {np.mean(values) + half:.6g}"
        assert interval == expected


def test_json_holds_each_run_and_the_means(folds):
    cwd, printed = folds
    done = called("repeat", *OPTIONS, "--folds=3", "--resume", "--json", cwd=cwd)
    (found,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (found["event"], found["kind"], len(found["runs"])) == ("group", "folds", 3)
    assert found["metrics"]["test/loss"]["interval"] is None
    low, high = found["metrics"]["val/loss"]["interval"]
    assert rows_of(printed.stdout)["val/loss"][2] == f"{low:.6g} to {high:.6g}"


LEAKY = """
import torch
from lightning.pytorch import Callback
from torch import nn

BUILT = []


class Net(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        BUILT.append(1)
        self.layers = nn.Sequential(nn.Linear(in_features, 8 * len(BUILT)), nn.Linear(8 * len(BUILT), out_features))

    def forward(self, inputs):
        return self.layers(inputs.flatten(1).to(self.layers[0].weight.dtype)).float()


class Leaves(Callback):
    def on_fit_end(self, trainer, module):
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(len(BUILT))
        torch.use_deterministic_algorithms(True)
"""


def test_what_a_repetition_leaves_in_the_process_does_not_change_the_next_one(tmp_path):
    (tmp_path / "leaky.py").write_text(LEAKY)
    options = [
        "--config",
        CONFIG,
        "--trainer.max_epochs=1",
        "--model.network=leaky.Net",
        "--disable=progress",
        "--report=false",
    ]
    called("repeat", *options, "--trainer.callbacks=[leaky.Leaves]", "--seeds=2", cwd=tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "leaky.py").write_text(LEAKY)
    for run in runs_of(tmp_path):
        called("run", "--config", str(run / "config.yaml"), "--experiment", run.name, cwd=tmp_path / "alone")
        (other,) = [path.parent for path in (tmp_path / "alone").glob(f"runs/{run.name}/*/results.json")]
        check_same(run, other)


COMPILED = """
import torch
from lightning.pytorch import Callback
from torch import nn


class Net(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(in_features, out_features)), backend="eager")

    def forward(self, inputs):
        return self.layers(inputs)


class Counts(Callback):
    def setup(self, trainer, module, stage):
        torch._dynamo.utils.counters.clear()

    def on_fit_end(self, trainer, module):
        with open("graphs", "a") as file:
            print(torch._dynamo.utils.counters["stats"]["unique_graphs"], file=file)
"""


@pytest.mark.slow
def test_each_repetition_compiles_its_own_code(tmp_path):
    (tmp_path / "mine.py").write_text(COMPILED)
    options = [
        "--config",
        CONFIG,
        "--trainer.max_epochs=1",
        "--model.network=mine.Net",
        "--disable=progress",
        "--report=false",
    ]
    called("repeat", *options, "--trainer.callbacks=[mine.Counts]", "--seeds=2", cwd=tmp_path)
    first, second = (tmp_path / "graphs").read_text().split()
    assert first == second != "0"


def start(cwd, *more):
    args = ["repeat", *SMALL, "--trainer.max_epochs=8", "--last.every_n_steps=7", "--seeds=3", *more]
    return Ranks(main, args, cwd=cwd)


def stopped_in_second_run(group, cwd, number):
    """Send a signal to a group while its second run trains; return the exit code."""
    assert group.wait_for("repeat seed 1, 2 of 3\n")
    deadline = time.monotonic() + 120
    while len(list(cwd.glob("runs/digits_mlp/*/checkpoints/last.ckpt"))) < 2:
        assert time.monotonic() < deadline and group.processes[0].exitcode is None
        time.sleep(0.002)
    os.kill(group.processes[0].pid, number)
    return group.wait()[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    start(cwd).succeed()
    return cwd


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_group_keeps_finished_runs_and_ends_with_the_same_bits(number, uninterrupted, tmp_path):
    group = start(tmp_path)
    code = stopped_in_second_run(group, tmp_path, number)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    if number != signal.SIGKILL:
        assert group.stdout.endswith("repeat interrupted; continue with the same command and --resume\n")
    finished = runs_of(tmp_path)[0]
    before = files(finished)
    done = start(tmp_path, "--resume").succeed()
    assert f"repeat seed 0, 1 of 3: finished in runs/digits_mlp/{finished.name}\n" in done.stdout
    assert f"resume runs/digits_mlp/{runs_of(tmp_path)[1].name} at step " in done.stdout
    assert files(finished) == before
    assert len(list(tmp_path.glob("runs/digits_mlp/*/config.yaml"))) == 3
    for one, other in zip(runs_of(uninterrupted), runs_of(tmp_path), strict=True):
        check_same(one, other)


def test_group_grows_with_more_seeds(seeds, tmp_path):
    cwd, _ = seeds
    called("repeat", *OPTIONS, "--seed_everything=5", "--seeds=2", cwd=tmp_path)
    done = called("repeat", *OPTIONS, "--seed_everything=5", "--seeds=3", "--resume", cwd=tmp_path)
    assert done.stdout.count(": finished in") == 2
    assert [results(run)["group"]["count"] for run in runs_of(tmp_path)] == [3, 3, 3]
    for one, other in zip(runs_of(cwd), runs_of(tmp_path), strict=True):
        check_same(one, other)
    fewer = called("repeat", *OPTIONS, "--seed_everything=5", "--seeds=2", "--resume", cwd=tmp_path, code=2).stderr
    assert "the newest has 3 of them, and not 2; leave --resume out to start another group\n" in fewer


def test_resumed_group_with_other_options_is_refused(folds):
    cwd, _ = folds
    before = files(cwd)
    args = ["repeat", *OPTIONS, "--folds=3", "--resume"]
    error = called(*args, "--model.optimizer.lr=0.1", cwd=cwd, code=2).stderr
    assert error.startswith("firstlight: no group of folds in runs/digits_mlp has the options of this command: model.")
    assert re.search(r"optimizer\.init_args\.lr of \S+ is 0\.003, and not 0\.1; leave --resume out", error)
    error = called(*args, "--seed_everything=9", cwd=cwd, code=2).stderr
    assert re.search(r"seed_everything of \S+ is 0, and not 9", error)
    assert files(cwd) == before


def test_resume_without_a_group_starts_one(tmp_path):
    called("run", *OPTIONS, cwd=tmp_path)
    called("repeat", *OPTIONS, "--trainer.max_epochs=1", "--seeds=2", "--resume", cwd=tmp_path)
    assert len(runs_of(tmp_path)) == 2
    assert len(list(tmp_path.glob("runs/digits_mlp/*/config.yaml"))) == 3


FAILS = """
import torch
from lightning.pytorch import Callback


class Fails(Callback):
    def on_train_start(self, trainer, module):
        if torch.initial_seed() == 1:
            next(module.parameters()).data.fill_(float("nan"))
"""


def test_failed_repetition_is_named_and_the_others_are_summarised(tmp_path):
    (tmp_path / "mine.py").write_text(FAILS)
    done = called("repeat", *OPTIONS, "--trainer.callbacks=[mine.Fails]", "--seeds=3", cwd=tmp_path, code=1)
    assert done.stderr.endswith("firstlight: 1 of 3 repetitions failed: seed 1\n")
    assert ": 2 of 3 seeds\n" in done.stdout
    assert (
        rows_of(done.stdout)["val/loss"][0]
        == f"{np.mean([results(runs_of(tmp_path)[i])['best']['val/loss'] for i in (0, 2)]):.6g}"
    )


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Own(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def step(self, batch, name):
        loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log(name, loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train/loss")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val/loss")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test/loss")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    def loader(self, shuffle=False):
        inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs), 8, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(True)

    val_dataloader = test_dataloader = loader
"""


def test_own_module_and_data_repeat_with_seeds_and_refuse_folds(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    args = [
        "repeat",
        "--model=own.Own",
        "--data=own.Data",
        "--monitor=val/loss",
        "--mode=min",
        "--disable=progress",
        "--report=false",
    ]
    done = called(*args, "--trainer.max_epochs=2", "--seeds=2", cwd=tmp_path)
    assert len({results(run)["metrics"]["test/loss"] for run in runs_of(tmp_path, "unnamed")}) == 2
    assert "test/loss" in rows_of(done.stdout)
    error = called(*args, "--folds=2", cwd=tmp_path, code=2).stderr
    assert error == "firstlight: --folds needs a firstlight.data module, and Data is not one: use --seeds\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "repeat needs --seeds N or --folds N, one of them"),
        (["--seeds=2", "--folds=2"], "repeat needs --seeds N or --folds N, one of them"),
        (["--seeds=1"], "repeat was given seeds=1: it must be at least 2"),
        (["--folds=1"], "repeat was given folds=1: it must be at least 2"),
        (["--seeds=2", "--trainer.devices=2", "--trainer.accelerator=cpu"], "repeat trains in one process, but the"),
        (["--seeds=2", "--disable=best"], "run tests the best checkpoint, but none will be written"),
    ],
)
def test_wrong_use_is_refused_in_one_line_and_leaves_no_directory(args, message, tmp_path):
    error = called("repeat", *OPTIONS, *args, cwd=tmp_path, code=2).stderr
    assert error.startswith(f"firstlight: {message}") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_repeat_of_a_run_names_its_configuration(seeds):
    cwd, _ = seeds
    run = f"runs/digits_mlp/{runs_of(cwd)[0].name}"
    error = called("repeat", "--run", run, "--seeds=2", cwd=cwd, code=2).stderr
    assert error == f"firstlight: repeat starts new runs: in place of --run, give --config {run}/config.yaml\n"


def test_other_verbs_refuse_seeds(tmp_path):
    error = called("run", *OPTIONS, "--seeds=2", cwd=tmp_path, code=2).stderr
    assert error == "firstlight: --seeds is an option of repeat and sweep: leave it out of run\n"


def test_damaged_group_file_is_no_member(tmp_path):
    called("repeat", *OPTIONS, "--trainer.max_epochs=1", "--seeds=2", cwd=tmp_path)
    (runs_of(tmp_path)[1] / "group.json").write_text("{")
    done = called("repeat", *OPTIONS, "--trainer.max_epochs=1", "--seeds=2", "--resume", cwd=tmp_path)
    assert done.stdout.count(": finished in") == 1


def test_runs_on_other_data_are_not_one_group(tmp_path):
    rows = [f"{index},{index % 7},{index % 7 * 0.5 + index % 3}" for index in range(60)]
    table = tmp_path / "d.csv"
    table.write_text("a,b,y\n" + "\n".join(rows) + "\n")
    options = [
        "--model=Regression", "--model.network=MLP", "--model.network.hidden=[4]", "--model.loss=torch.nn.MSELoss",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01", "--model.schedule=Constant", "--data=Table",
        "--data.path=d.csv", "--data.target=y", "--trainer.max_epochs=1", "--report=false",
    ]  # fmt: skip
    called("repeat", *options, "--seeds=2", cwd=tmp_path)
    table.write_text("a,b,y\n" + "\n".join(reversed(rows)) + "\n")
    refused = called("repeat", *options, "--seeds=3", "--resume", cwd=tmp_path, code=2)
    assert "was trained on other data than" in refused.stderr and "mean" not in refused.stdout
