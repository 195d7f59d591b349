"""`firstlight sweep`: trials with the bits of a command, that continue, and of which none reads the test split."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml

from firstlight.__main__ import main
from firstlight.callbacks.pruning import open_storage, open_study
from firstlight.checkpoints.io import read
from firstlight.data import DataModule, Table
from firstlight.run.experiment import Experiment
from tests.helpers import CONFIG, DDP, ROOT, Ranks, called, files, firstlight, logged, results

SMALL = ["--config", CONFIG, "--model.network.hidden=[16]", "--trainer.max_epochs=3"]
SPACE = {
    "model.optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True},
    "data.batch_size": {"low": 32, "high": 128, "int": True},
}
NO_SEEDS = "--seeds=0"


def sweep(cwd, *options, space=SPACE, code=0):
    (cwd / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    return called("sweep", *SMALL, "--space=space.yaml", *options, cwd=cwd, code=code)


def trials(cwd, name="digits_mlp_sweep"):
    storage = open_storage(str(cwd / "runs" / name / "study.journal"))
    return optuna.load_study(study_name=name, storage=storage).trials


def check_same(one, other):
    first, second = (read(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (one, other))
    assert all(first[name].equal(second[name]) for name in first)
    assert logged(one, "val/loss") == logged(other, "val/loss")


def run_of(cwd, trial):
    return cwd / trial.user_attrs["run"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("swept")
    return cwd, sweep(cwd, "--trials=4", NO_SEEDS)


def test_the_first_trial_is_the_configuration_itself(swept, tmp_path):
    cwd, _ = swept
    called("fit", *SMALL, "--experiment=alone", cwd=tmp_path)
    alone = next((tmp_path / "runs" / "alone").glob("*/results.json")).parent
    check_same(run_of(cwd, trials(cwd)[0]), alone)


def test_a_trial_has_the_bits_of_a_command_with_its_values(swept, tmp_path):
    cwd, _ = swept
    trial = next(each for each in trials(cwd)[1:] if each.state.name == "COMPLETE" or each.number == 3)
    values = [f"--{name}={value}" for name, value in trial.user_attrs["values"].items()]
    called("fit", *SMALL, *values, "--experiment=alone", cwd=tmp_path)
    alone = next((tmp_path / "runs" / "alone").glob("*/results.json")).parent
    seen = logged(run_of(cwd, trial), "val/loss")
    assert seen == logged(alone, "val/loss")[: len(seen)]  # A pruned trial ends early.
    config = yaml.safe_load((run_of(cwd, trial) / "config.yaml").read_text())
    assert (
        config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == trial.user_attrs["values"]["model.optimizer.lr"]
    )


def test_lines_report_and_best_configuration_agree_with_the_study(swept):
    cwd, done = swept
    found = trials(cwd)
    best = min((each for each in found if each.state.name == "COMPLETE"), key=lambda each: each.value)
    assert len(re.findall(r"^trial  \d+:", done.stdout, re.MULTILINE)) == 4
    assert f"best   {best.number}: val/loss {best.value:.6g}" in done.stdout
    assert best.value == results(run_of(cwd, best))["best"]["val/loss"]
    folder = cwd / "runs" / "digits_mlp_sweep"
    page = (folder / "report.html").read_text()
    assert all(f">{each.number}</td>" in page for each in found) and "Parallel coordinates" in page
    chosen = yaml.safe_load((folder / "best.yaml").read_text())
    assert chosen["data"]["init_args"]["batch_size"] == best.user_attrs["values"]["data.batch_size"]
    again = called("fit", "--config", str(folder / "best.yaml"), "--experiment=again", cwd=cwd)
    assert f"val/loss {best.value:.6g}" in again.stdout


def test_the_same_command_continues(swept, tmp_path):
    cwd = tmp_path
    sweep(cwd, "--trials=2", NO_SEEDS)
    before = [each.user_attrs for each in trials(cwd)]
    sweep(cwd, "--trials=3", NO_SEEDS)
    assert [each.user_attrs for each in trials(cwd)][:2] == before
    assert len(trials(cwd)) == 3
    assert trials(cwd)[2].params != trials(cwd)[1].params


def test_another_configuration_or_space_is_refused(swept):
    cwd, _ = swept
    before = files(cwd / "runs").keys()
    other = sweep(cwd, "--model.l1=0.001", NO_SEEDS, code=2)
    assert "digits_mlp_sweep holds a sweep with another configuration: give --experiment NAME" in other.stderr
    other = sweep(cwd, NO_SEEDS, space={"data.batch_size": [8, 16]}, code=2)
    assert "digits_mlp_sweep holds a sweep with another space" in other.stderr
    assert files(cwd / "runs").keys() == before


def test_no_sweep_reads_the_test_split(tmp_path, monkeypatch):
    whole = DataModule.dataset

    def dataset(self, split):
        assert split != "test", "the test split was read"
        return whole(self, split)

    monkeypatch.setattr(DataModule, "dataset", dataset)
    with pytest.raises(AssertionError, match="the test split was read"):
        called("run", *SMALL, cwd=tmp_path)
    done = sweep(tmp_path, "--trials=3", "--seeds=2", space={"model.optimizer.lr": [0.1, 0.03, 0.01]})
    assert re.search(r"^gain   (the best trial is|no difference|the configuration itself)", done.stdout, re.MULTILINE)


def test_the_best_trial_is_compared_with_the_configuration_on_other_seeds(tmp_path):
    options = ("--trials=3", "--seeds=3", "--model.optimizer.lr=1e-5")
    done = sweep(tmp_path, *options, space={"model.optimizer.lr": [1e-5, 0.02]})
    assert re.search(
        r"^gain   the best trial is better than the configuration by .* in loss", done.stdout, re.MULTILINE
    )
    runs = tmp_path / "runs"
    for name in ("start", "best"):
        seeds = [
            yaml.safe_load(each.read_text())["seed_everything"] for each in runs.glob(f"*_sweep_{name}/*/config.yaml")
        ]
        assert sorted(seeds) == [1, 2, 3]
    sweep(tmp_path, *options, space={"model.optimizer.lr": [1e-5, 0.02]})  # Their runs are there.
    assert [len(list(runs.glob(f"*_sweep_{name}/*/config.yaml"))) for name in ("start", "best")] == [3, 3]
    assert "Is it better?" in (runs / "digits_mlp_sweep" / "report.html").read_text()
    shutil.rmtree(runs / "digits_mlp_sweep")
    sweep(tmp_path, *options, "--model.l1=1e-6", space={"model.optimizer.lr": [1e-5, 0.02]})
    started = [yaml.safe_load(each.read_text()) for each in runs.glob("*_sweep_start/*/config.yaml")]
    assert [each["model"]["init_args"]["l1"] for each in started].count(1e-6) == 3  # Not those of the other one.


def test_a_sweep_of_the_loss_ends_with_a_comparison(tmp_path):
    options = ("--trials=3", "--seeds=3", "--model.loss=torch.nn.CrossEntropyLoss", "--model.loss.label_smoothing=0.5")
    done = sweep(tmp_path, *options, "--trainer.max_epochs=1", space={"model.loss.label_smoothing": [0.5, 0.0]})
    values = [
        [results(each.parent)["best"]["val/loss"] for each in sorted(tmp_path.glob(f"runs/*_{name}/*/results.json"))]
        for name in ("start", "best")
    ]
    difference = (sum(values[0]) - sum(values[1])) / 3
    (amount,) = re.findall(r"^gain   the best trial is better .* by (\S+) in loss", done.stdout, re.MULTILINE)
    assert float(amount) == pytest.approx(difference, abs=0.01)


OWN = """
import torch
from lightning.pytorch import LightningModule

class Own(LightningModule):
    monitor, mode = "val_loss", "min"
    def __init__(self, lr: float = 1e-5):
        super().__init__()
        self.lr, self.net = lr, torch.nn.Linear(64, 10)
    def training_step(self, batch, index):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
        return loss * float("nan") if torch.initial_seed() == 2 and self.lr > 1e-5 else loss
    def validation_step(self, batch, index):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1]))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
"""


def test_a_comparison_leaves_out_a_seed_that_diverges_and_takes_a_monitor_of_any_name(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"model.lr": [1e-5, 0.1]}))
    options = ["--model=own.Own", "--data=firstlight.data.Digits", "--trainer.max_epochs=1", "--experiment=own"]
    done = called("sweep", *options, "--space=space.yaml", "--trials=2", "--seeds=3", cwd=tmp_path)
    assert re.search(r"^gain   best configuration, seed 2 failed: .*not finite", done.stdout, re.MULTILINE)
    assert re.search(
        r"^gain   the best trial is lower than the configuration by .* in val_loss", done.stdout, re.MULTILINE
    )
    left_out = "1 of 3 seeds are left out, because a run with them failed"
    assert f"gain   {left_out}\n" in done.stdout
    assert left_out in (tmp_path / "runs" / "own" / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "code"), [(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 0), (RuntimeError("a bug"), 1)]
)
def test_a_trial_that_an_exception_ends_has_failed_and_is_not_given_out_again(error, code, tmp_path, monkeypatch):
    fit = Experiment.fit

    def fails_at_the_second(self):
        monkeypatch.setattr(Experiment, "fit", fails if not list(tmp_path.glob("runs/*/*/results.json")) else fit)
        return fit(self)

    def fails(self):
        monkeypatch.setattr(Experiment, "fit", fit)
        raise error

    monkeypatch.setattr(Experiment, "fit", fails_at_the_second)
    options = ("--trials=3", "--trainer.max_epochs=1", NO_SEEDS)
    if code:
        with pytest.raises(RuntimeError, match="a bug"):
            sweep(tmp_path, *options)
    printed = sweep(tmp_path, *options).stdout
    found = trials(tmp_path)
    assert [each.state.name == "FAIL" for each in found] == [False, True, False]
    assert found[1].user_attrs["error"] == str(error).splitlines()[0]
    assert code or "trial  1: failed: CUDA out of memory. Tried; " in printed


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.optimizer.lrr": [1, 2]}, "space.yaml: model.optimizer.lrr=1: the configuration has no option"),
        ({"data.batch_size": {"low": 9, "high": 3}}, "space.yaml: data.batch_size: low=9 must be below high=3"),
        ({"data.batch_size": {"low": 0.5, "high": 3}}, "space.yaml: data.batch_size=0.5: "),
        ({"model.network.dropout": {"low": 0, "high": 1.5}}, "space.yaml: model.network.dropout=1.5: "),
        ({"model.network.hidden": ["x"]}, "space.yaml: model.network.hidden=x: "),
        ({"model.optimizer.lr": {"low": 0, "high": 1, "log": True}}, "low=0 must be above 0, because log is true"),
        ({"model.optimizer.lr": {"low": "1e-5", "high": 1}}, "YAML takes 1e-5 for a text: write 1.0e-5"),
        (
            {"data.batch_size": {"lo": 1}},
            "unknown key lo; known are low, high, log, int, choices, length, when; did you",
        ),
        ({"data.batch_size": {"choices": [8], "when": {"model": "x"}}}, "when: model is no option above this one"),
        ({"model.optimizer": ["torch.optim.AdamX"]}, "space.yaml: model.optimizer=torch.optim.AdamX: "),
        ([], "space.yaml holds no space"),
    ],
)
def test_a_space_that_cannot_be_right_ends_in_one_line_before_the_first_trial(space, message, tmp_path):
    done = sweep(tmp_path, space=space, code=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not files(tmp_path / "runs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials=0"], "sweep was given trials=0: it must be at least 1"),
        (["--seeds=1"], "sweep was given seeds=1: it must be at least 2"),
        (["--time=5", "--trials=3"], "--time and --trials exclude each other"),
        (["--storage=nowhere://x"], "the storage nowhere://x cannot be opened: "),
        (["--disable=best"], "sweep compares best checkpoints, but none will be written"),
        (["--time"], "sweep: argument --time: expected one argument"),
        (["--time="], "time '' is not a time: write days, hours"),
    ],
)
def test_wrong_options_end_in_one_line_and_leave_no_file(options, message, tmp_path):
    done = sweep(tmp_path, *options, code=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["space.yaml"]


TABLE = """
model:
  class_path: firstlight.tasks.Regression
  init_args:
    network: {class_path: firstlight.networks.MLP, init_args: {hidden: [8]}}
    loss: torch.nn.MSELoss
    optimizer: torch.optim.Adam
    schedule: firstlight.schedules.Constant
data:
  class_path: firstlight.data.Table
  init_args: {path: table.csv, target: y, kind: regression, batch_size: 16}
trainer: {max_epochs: 1, logger: false}
"""


def test_trials_share_a_table_that_gives_the_sizes(tmp_path, monkeypatch):
    lines = ["a,b,y", *(f"{row % 7},{row % 5},{row % 3}" for row in range(80))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "table.yaml").write_text(TABLE)
    loaded, load = [], Table.load
    monkeypatch.setattr(Table, "load", lambda self: loaded.append(1) or load(self))
    space = {"model.optimizer.lr": SPACE["model.optimizer.lr"]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    options = ["--config=table.yaml", "--space=space.yaml", NO_SEEDS]
    called("sweep", *options, "--trials=4", cwd=tmp_path)
    assert [each.state.name for each in trials(tmp_path, "table_sweep")].count("FAIL") == 0
    assert len(loaded) == 1
    # Data that give other sizes are loaded again.
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"data.ignore": [["a"], []]}))
    called("sweep", *options, "--trials=4", "--experiment=other", cwd=tmp_path)
    assert {each.state.name for each in trials(tmp_path, "other")} <= {"COMPLETE", "PRUNED"}


def test_a_sweep_that_continues_on_other_data_is_refused(tmp_path):
    lines = ["a,b,y", *(f"{row % 7},{row % 5},{row % 3}" for row in range(80))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "table.yaml").write_text(TABLE)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"model.optimizer.lr": SPACE["model.optimizer.lr"]}))
    command = ["sweep", "--config=table.yaml", "--space=space.yaml", NO_SEEDS]
    called(*command, "--trials=2", cwd=tmp_path)
    (tmp_path / "table.csv").write_text("\n".join(lines[:-1]) + "\n")
    refused = called(*command, "--trials=3", cwd=tmp_path, code=2)
    assert "was trained on other data than" in refused.stderr and "best" not in refused.stdout


def test_a_combination_that_is_refused_counts_as_failed(tmp_path):
    space = {"data.val_fraction": [0.15, 0.6], "data.test_fraction": [0.15, 0.6]}
    done = sweep(tmp_path, "--trials=8", "--trainer.max_epochs=1", NO_SEEDS, space=space)
    states = [each.state.name for each in trials(tmp_path)]
    assert len(states) == 8 and "FAIL" in states and "COMPLETE" in states
    line = next(line for line in done.stdout.splitlines() if "failed: " in line)
    assert "their sum must be below 1; val_fraction 0.6, test_fraction 0.6" in line


def test_classes_lists_and_conditions_can_be_searched(tmp_path):
    space = {
        "model.optimizer": ["torch.optim.Adam", "torch.optim.SGD"],
        "model.optimizer.momentum": {"low": 0.5, "high": 0.95, "when": {"model.optimizer": "torch.optim.SGD"}},
        "model.network.hidden": {"low": 8, "high": 32, "int": True, "length": [1, 2]},
    }
    sweep(tmp_path, "--trials=6", "--trainer.max_epochs=1", NO_SEEDS, space=space)
    for each in trials(tmp_path):
        values = each.user_attrs["values"]
        config = yaml.safe_load((run_of(tmp_path, each) / "config.yaml").read_text())["model"]["init_args"]
        assert config["optimizer"]["class_path"] == values["model.optimizer"]
        assert ("model.optimizer.momentum" in values) == (values["model.optimizer"] == "torch.optim.SGD")
        assert config["network"]["init_args"]["hidden"] == values["model.network.hidden"]
        if "model.optimizer.momentum" in values:
            assert config["optimizer"]["init_args"]["momentum"] == values["model.optimizer.momentum"]


KILL = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback


class KillOnce(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 60 and os.environ.get("FIRSTLIGHT_SWEEP_WORKER") == "2":
            try:
                Path("killed").touch(exist_ok=False)
            except FileExistsError:
                return
            Path("killed").write_text(str(trainer.default_root_dir))
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_its_trial_is_resumed_with_the_same_bits(tmp_path):
    (tmp_path / "mine.py").write_text(KILL)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"model.optimizer.lr": [0.01, 0.003]}))
    options = ["--space=space.yaml", "--trials=5", "--jobs=2", NO_SEEDS, "--trainer.callbacks+=mine.KillOnce"]
    done = firstlight("sweep", *SMALL, *options, cwd=tmp_path)
    assert "ended with exit code -9; its trial is resumed" in done.stdout
    found = trials(tmp_path)
    assert len(found) == 5 and all(each.state.is_finished() for each in found)
    killed = tmp_path / (tmp_path / "killed").read_text()
    assert len(list(killed.parent.glob("*/results.json"))) == 5
    trial = next(each for each in found if run_of(tmp_path, each) == killed)
    rate = f"--model.optimizer.lr={trial.user_attrs['values']['model.optimizer.lr']}"
    called("fit", *SMALL, rate, "--experiment=alone", cwd=tmp_path)
    alone = next((tmp_path / "runs" / "alone").glob("*/results.json")).parent
    seen = logged(killed, "val/loss")
    assert seen == logged(alone, "val/loss")[: len(seen)]


@pytest.fixture
def postgres(tmp_path):
    """The URL of a PostgreSQL server of the test's own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or not importlib.util.find_spec("psycopg"):
        pytest.skip("PostgreSQL or psycopg is not installed")
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(place, "postgres")

    def call(program, *options):
        subprocess.run([*user, programs[-1] / program, "-D", place / "data", *options], check=True, cwd=place)

    call("initdb", "-U", "tester", "-A", "trust")
    call("pg_ctl", "-w", "-l", place / "log", "-o", f"-c listen_addresses= -k {place}", "start")
    yield f"postgresql+psycopg://tester@/postgres?host={place}"
    call("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(place)


@pytest.mark.slow
def test_two_processes_share_a_study_in_postgresql(postgres, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    options = ["--space=space.yaml", "--trials=5", "--jobs=2", NO_SEEDS, f"--storage={postgres}"]
    done = firstlight("sweep", *SMALL, *options, cwd=tmp_path)
    study = optuna.load_study(study_name="digits_mlp_sweep", storage=postgres)
    assert [each.number for each in study.trials] == list(range(5))
    assert len({each.user_attrs["worker"] for each in study.trials}) == 2
    assert all(each.state.is_finished() for each in study.trials)
    assert f"val/loss {study.best_value:.6g}" in done.stdout


def test_pruning_ends_all_processes_of_a_fit_that_is_worse_than_others(tmp_path):
    storage = str(tmp_path / "study.journal")
    study = optuna.create_study(study_name="own", storage=open_storage(storage))
    for _ in range(6):
        other = study.ask()
        for step in (10, 30, 90):
            other.report(1e-3, step)
            open_study(storage, "own").pruner.prune(study, study.trials[other.number])
        study.tell(other, 1e-3)
    number = study.ask().number
    arguments = {"storage": storage, "study": "own", "trial": number, "monitor": "val/loss"}
    callbacks = json.dumps([{"class_path": "firstlight.callbacks.Pruning", "init_args": arguments}])
    options = ["fit", *SMALL, "--config", DDP, "--trainer.max_epochs=8", f"--trainer.callbacks={callbacks}"]
    Ranks(main, options, cwd=tmp_path, ranks=2).succeed()
    run = next((tmp_path / "runs").glob("*/*/results.json")).parent
    assert len(logged(run, "val/loss")) == 1
    trial = optuna.load_study(study_name="own", storage=open_storage(storage)).trials[number]
    assert trial.user_attrs["run"] == str(run.relative_to(tmp_path))
    assert list(trial.intermediate_values) == [12]  # Percent of the plan: one epoch of eight.


def test_the_objective_for_ray_tune_in_the_docs_trains(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "search.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "ray" in block)
    code = code.replace("/absolute/my.yaml", CONFIG).replace("/absolute/runs", str(tmp_path / "runs"))
    told = []
    ray = SimpleNamespace(report=told.append)  # Ray itself takes 500 MB.
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=ray))
    names = {}
    exec(code[: code.index("tune.Tuner(")], names)
    names["objective"]({"model.optimizer.lr": 0.01, "trainer.max_epochs": 1})
    (run,) = (tmp_path / "runs").glob("*/*/results.json")
    assert told == [results(run.parent)["best"]]


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.storages", None)
    done = sweep(tmp_path, code=2)
    assert done.stderr == "firstlight: a search needs optuna.storages: pip install 'firstlight[search]'\n"
