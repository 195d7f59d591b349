"""Score a new file with the checkpoint of a run, from the command line."""

import csv
import json
import random
from pathlib import Path

import pytest

from firstlight.__main__ import main

CONFIG = """
model:
  class_path: firstlight.tasks.Classification
  init_args:
    classes: 2
    network: {class_path: firstlight.networks.MLP, init_args: {in_features: 3, hidden: [8], out_features: 2}}
    loss: torch.nn.CrossEntropyLoss
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.03}}
    schedule: firstlight.schedules.WarmupCosine
data:
  class_path: firstlight.data.Table
  init_args: {path: PATH, target: age group, kind: multiclass, columns: [age, city], categorical: [city]}
trainer: {max_epochs: 10, log_every_n_steps: 1, enable_progress_bar: false}
report: false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run that was trained on a table to tell who is older than 40."""
    folder = tmp_path_factory.mktemp("run")
    generator = random.Random(0)
    ages = [generator.randint(20, 60) for _ in range(200)]
    lines = [f"{age},{generator.choice(('Oslo', 'Rome'))},{'old' if age > 40 else 'young'}" for age in ages]
    (folder / "data.csv").write_text("\n".join(["age,city,age group", *lines]))
    (folder / "table.yaml").write_text(CONFIG.replace("PATH", str(folder / "data.csv")))
    assert main(["run", "--config", str(folder / "table.yaml"), "--runs", str(folder / "runs")]) == 0
    return folder / "runs" / "table" / (folder / "runs" / "table" / "latest").read_text().strip()


@pytest.fixture
def new(tmp_path):
    def write(text):
        (tmp_path / "new.csv").write_text(text)
        return ["--data.path", str(tmp_path / "new.csv")]

    return write


def test_predict_on_a_file_without_targets_uses_the_classes_of_the_run(run, new):
    given = new("city,note,age\nRome,a,25\nLima,b,59\nOslo,c,22\nRome,d,55\n")
    assert main(["predict", "--run", str(run), *given]) == 0
    written = max(run.glob("evaluations/predict-*")) / "predictions.csv"
    rows = list(csv.DictReader(written.read_text().splitlines()))
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["prediction"] for row in rows] == ["young", "old", "young", "old"]
    assert rows[0].keys() == {"index", "prediction", "probabilities/old", "probabilities/young"}


def test_test_on_a_new_file_uses_all_rows(run, new):
    given = new("city,age,age group\nRome,25,young\nOslo,21,young\nOslo,22,young\nRome,55,young\n")
    assert main(["test", "--run", str(run), *given]) == 0
    results = json.loads(max(run.glob("evaluations/test-*")).joinpath("results.json").read_text())
    assert results["metrics"]["test/accuracy"] == 0.75


def test_run_fills_inputs_drops_rows_without_a_target_and_knows_each_spelling(tmp_path, capsys):
    lines = [
        f"{age},{'Oslo' if age % 3 else 'Rome '},{' old' if age > 40 else 'young'}" for age in [*range(20, 60)] * 3
    ]
    lines[4], lines[7], lines[9], lines[50] = "N/A,Oslo,young", "27,?,young", "29,Oslo,NA", "31,Rome,  "
    (tmp_path / "data.csv").write_text("\n".join(["age,city,age group", *lines]))
    (tmp_path / "table.yaml").write_text(CONFIG.replace("PATH", str(tmp_path / "data.csv")))
    options = ["--config", str(tmp_path / "table.yaml"), "--runs", str(tmp_path / "runs"), "--trainer.max_epochs=1"]
    assert main(["run", *options, "--data.missing=mean"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "2 rows with missing or invalid values: line 11 column age group (NA), line 52 column age group (empty);"
        in line
    )
    assert line.endswith("; missing_targets=drop drops rows without a valid target")
    assert main(["run", *options, "--data.missing=mean", "--data.missing_targets=drop"]) == 0
    assert "samples, 2 dropped" in capsys.readouterr().out
    run = tmp_path / "runs" / "table" / (tmp_path / "runs" / "table" / "latest").read_text().strip()
    everything = "\n".join(["age,city,age group", *(line.rsplit(",", 1)[0] + "," for line in lines)])
    (tmp_path / "new.csv").write_text(everything)
    assert main(["predict", "--run", str(run), "--data.path", str(tmp_path / "new.csv")]) == 0
    written = max(run.glob("evaluations/predict-*")) / "predictions.csv"
    rows = list(csv.DictReader(written.read_text().splitlines()))
    assert [row["index"] for row in rows] == [str(index) for index in range(120)]
    assert rows[0].keys() == {"index", "prediction", "probabilities/old", "probabilities/young"}


@pytest.mark.parametrize(
    ("verb", "text", "message"),
    [
        ("test", "city,age\nRome,25\n", "only predict works .* new.csv has no column age group; available: city, age"),
        (
            "validate",
            "city,age,age group\nRome,25,young\n",
            "new.csv has no val split: .* so all samples are test samples",
        ),
        ("predict", "city\nRome\n", "new.csv has no column age; available: city"),
        ("predict", "city,age\nRome,x\n", "new.csv: 1 row with .* line 2 column age (x)"),
        ("predict", "city,age,age group\nRome,25,baby\n", "line 2 column age group is baby, .* classes old, young"),
        ("predict", "", "new.csv is empty"),
        ("fit", "city,age\nRome,25\n", "new.csv has no column age group"),
    ],
)
def test_file_that_does_not_fit_the_run_ends_with_one_line(verb, text, message, run, new, capsys):
    before = sorted(run.rglob("*"))
    assert main([verb, "--run", str(run), *new(text)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in message.split(" .* "))
    assert sorted(run.rglob("*")) == before


def test_resuming_with_another_file_is_refused(run, new, capsys):
    config, results = ((run / name).read_bytes() for name in ("config.yaml", "results.json"))
    changed = (run.parents[2] / "data.csv").read_text() + "\n30,Rome,young\n"
    assert main(["fit", "--run", str(run), *new(changed), "--trainer.max_epochs=11"]) == 2
    assert (
        "new.csv is not the data that the checkpoint was trained on: resume with the same data"
        in capsys.readouterr().err
    )
    assert [config, results] == [(run / name).read_bytes() for name in ("config.yaml", "results.json")]
    assert not list(Path(run).glob("*-until-*"))
