import numpy as np
import pytest

from tests.helpers import called, newest, results

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
    found = results(newest(folder, "faults"))["findings"]
    assert lines[0] == "data   280 train, 60 val, 60 test samples"
    assert lines[1:6] == [f"data   {finding['text']}: {finding['advice']}" for finding in found[:5]]
    assert lines[6:] == ["data   1 more finding: see results.json, or firstlight check"]
    names = {finding["name"]: finding["severity"] for finding in found}
    assert names == {
        "leak": "high",
        "imbalance": "medium",
        "identifier": "medium",
        "constant": "low",
        "duplicate": "low",
        "missing": "low",
    }
    assert [*names.values()] == sorted(names.values(), key=["high", "medium", "low"].index)
    assert all(set(finding) == {"name", "severity", "text", "evidence", "advice"} for finding in found)


def test_resumed_run_keeps_its_findings_and_does_not_repeat_them(folder):
    called("fit", "--config", "faults.yaml", "--disable=progress", cwd=folder)
    run = newest(folder, "faults")
    before = results(run)["findings"]
    again = called("fit", "--run", str(run), "--trainer.max_epochs=2", "--disable=progress", cwd=folder).stdout
    assert "280 train" in again
    assert "leak" not in again
    assert results(run)["findings"] == before


def test_check_prints_a_line_for_each_finding(folder):
    lines = called("check", "--config", "faults.yaml", cwd=folder).stdout.splitlines()
    told = [line for line in lines if line.startswith("quality ")]
    assert len(told) == 6
    assert all(line.split()[1] == "warn" for line in told)
    assert told[0].startswith("quality    warn     column leak (1.000) alone predicts the target")


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
