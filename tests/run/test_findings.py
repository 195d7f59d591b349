import numpy as np
import pytest

from tests.helpers import ROOT, called, newest, results

CONFIG = """
model:
  class_path: firstlight.tasks.BinaryClassification
  init_args:
    network: {class_path: firstlight.networks.MLP, init_args: {hidden: [4]}}
    loss: {class_path: torch.nn.BCEWithLogitsLoss}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
    schedule: {class_path: firstlight.schedules.Cosine}
data:
  class_path: firstlight.data.Table
  init_args: {path: table.csv, target: y, batch_size: 64, missing: mean}
trainer: {max_epochs: 1, logger: false}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with an experiment on a table that has six faults."""
    generator = np.random.default_rng(0)
    lines = ["a,b,copy,one,leak,gaps,number,y"]
    for row in range(400):
        a, b = generator.normal(size=2)
        label = int(row % 10 == 0)
        gap = "" if row % 4 else "1.5"
        lines.append(f"{a:.4f},{b:.4f},{a:.4f},7,{label + b / 100:.4f},{gap},{row},{label}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "faults.yaml").write_text(CONFIG)
    return tmp_path


def test_fit_prints_the_five_most_severe_findings_and_stores_all(folder):
    printed = called("fit", "--config", "faults.yaml", "--disable=progress", cwd=folder).stdout
    lines = [line for line in printed.splitlines() if line.startswith("data ")]
    severities = ["fault", "warning", "info"]
    found = results(newest(folder, "faults"))["findings"]
    assert found[0]["name"] == "leakage"  # The likeliest cause, before what it causes.
    found.sort(key=lambda finding: severities.index(finding["severity"]))
    found = [finding for finding in found if finding["epoch"] is None]  # Those in the data.
    assert lines[0] == "data   280 train, 60 val, 60 test samples"
    assert lines[1:6] == [f"data   {finding['text']}: {finding['advice']}" for finding in found[:5]]
    assert lines[6:] == ["data   1 more finding: see results.json, or firstlight check"]
    names = {finding["name"]: finding["severity"] for finding in found}
    assert names == {
        "leakage": "fault",
        "class_imbalance": "warning",
        "identifier": "warning",
        "constant": "info",
        "duplicate": "info",
        "missing": "info",
    }
    assert all(set(finding) == {"name", "severity", "text", "evidence", "advice", "epoch", "step"} for finding in found)


def test_imbalance_is_no_warning_where_the_loss_weighs_the_classes(folder):
    called("fit", "--config", "faults.yaml", "--model.pos_weight=balanced", "--disable=progress", cwd=folder)
    found = {each["name"]: each["severity"] for each in results(newest(folder, "faults"))["findings"]}
    assert found["class_imbalance"] == "info"


def test_resumed_run_keeps_its_findings_and_does_not_repeat_them(folder):
    called("fit", "--config", "faults.yaml", "--disable=progress", cwd=folder)
    run = newest(folder, "faults")
    before = results(run)["findings"]
    again = called("fit", "--run", str(run), "--trainer.max_epochs=2", "--disable=progress", cwd=folder).stdout
    assert "280 train" in again
    # Its last lines may name it as a cause once more.
    assert [line for line in again.splitlines() if line.startswith("data ")] == [
        "data   280 train, 60 val, 60 test samples"
    ]
    places = {each["name"]: (each["epoch"], each["step"]) for each in results(run)["findings"]}
    assert places == {each["name"]: (each["epoch"], each["step"]) for each in before}
    assert results(run)["facts"]["not_recorded"] == []


def test_check_prints_a_line_for_each_finding(folder):
    lines = called("check", "--config", "faults.yaml", "--verbose", cwd=folder).stdout.splitlines()
    told = [line for line in lines if line.startswith("quality ")]
    assert len(told) == 6
    assert all(line.split()[1] == "warn" for line in told)
    assert told[0].startswith("quality    warn     column leak (1.000) alone predicts the target")
    assert lines[0].startswith("fault    leakage: column leak (1.000) alone predicts the target")


def test_class_that_the_own_test_split_lacks_is_told_and_its_metrics_are_undefined(folder):
    generator = np.random.default_rng(0)
    lines = ["x,part,y"]
    for row in range(300):
        part = ("train", "val", "test")[row % 3]
        lines.append(f"{generator.normal():.4f},{part},{0 if part == 'test' else row % 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    done = called("run", "--config", "faults.yaml", "--data.split=part", "--disable=progress", cwd=folder)
    found = results(newest(folder, "faults"))
    assert "data   class 1 has no sample in the test split: metrics leave it out or are undefined there" in done.stdout
    assert 0 <= found["metrics"]["test/accuracy"] <= 1
    assert np.isnan(found["metrics"]["test/auroc"])


def test_run_split_by_time_says_so_and_resumes(folder):
    lines = (folder / "table.csv").read_text().splitlines()
    (folder / "table.csv").write_text("\n".join(lines[:1] + lines[:0:-1]) + "\n")  # The latest rows come first.
    options = ["--config", "faults.yaml", "--data.time=number", "--data.columns=[a,b]", "--disable=progress"]
    printed = called("fit", *options, cwd=folder).stdout
    split = "280 train, 60 val, 60 test samples; by time number: train from 0, val from 280, test from 340"
    assert f"data   {split}\n" in printed
    assert split in called("check", *options, cwd=folder).stdout
    run = newest(folder, "faults")
    resumed = called("fit", "--run", str(run), "--trainer.max_epochs=2", "--disable=progress", cwd=folder).stdout
    assert f"data   {split}\n" in resumed


def test_the_end_of_a_run_names_findings_that_were_told_before_once(tmp_path):
    config = str(ROOT / "configs" / "digits_mlp.yaml")
    options = ("--model.optimizer.lr=3", "--trainer.max_epochs=3", "--disable=progress")
    printed = called("fit", "--config", config, *options, cwd=tmp_path).stdout
    lines = [line.removeprefix("seen   ") for line in printed.splitlines() if line.startswith("seen ")]
    told = {line.split(": ", 1)[1] for line in lines if line.startswith("epoch ")}
    ends = [line for line in lines if line.startswith("still true at the end")]
    assert len(lines) == len({*lines}) and not told & {*lines}
    assert len(ends) == 1 and " (epoch 1)" in ends[0]
