"""`firstlight compare` groups runs, refuses what cannot be compared, and prints the same figures in each format."""

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from scipy import stats

from firstlight.run import directory
from firstlight.run.outputs import write_outputs
from tests.helpers import called, newest

SIZE = 400
TARGETS = np.random.default_rng(0).integers(0, 4, SIZE)


def make(root, experiment, name, seed=0, accuracy=0.8, group=None, split="test", outputs=True, **options):
    """Write a run as `firstlight run` does, and return which of its predictions are right."""
    run = root / "runs" / experiment / name
    run.mkdir(parents=True)
    network = {"class_path": "firstlight.networks.MLP", "init_args": {"hidden": 8, **options}}
    model = {"class_path": "firstlight.tasks.Classification", "init_args": {"network": network}}
    (run / "config.yaml").write_text(
        yaml.safe_dump({"seed_everything": seed, "experiment": experiment, "model": model})
    )
    rng = np.random.default_rng([seed, round(1000 * accuracy)])
    right = np.arange(SIZE) < rng.normal(SIZE * accuracy, 3)
    right ^= rng.random(SIZE) < 0.03
    results = {"metrics": {"test/accuracy": right.mean()}, "best": {"val/accuracy": right.mean()}}
    (run / "results.json").write_text(json.dumps(results))
    if group:
        directory.write_group(run, group)
    if outputs:
        predictions = np.where(right, TARGETS, (TARGETS + 1) % 4)
        arrays = {"index": np.arange(SIZE), "targets": TARGETS, "predictions": predictions}
        write_outputs(run, split, {"kind": np.array("classes"), **arrays})
    return right.astype(float)


def compared(tmp_path, *args, code=0):
    done = called("compare", *args, cwd=tmp_path, code=code)
    return done.stderr if code else done.stdout


def as_json(tmp_path, *args):
    return json.loads(compared(tmp_path, *args, "--format=json"))


def test_two_trained_runs_are_compared_on_their_test_samples(tmp_path):
    for name in ("wine", "digits_mlp"):
        for options in (("--model.network.hidden=[4]",), ("--model.network.hidden=[16]", "--seed_everything=1")):
            short = ("--trainer.max_epochs=1", "--report=false", "--disable=progress,early_stopping")
            called("run", "--config", f"firstlight:{name}", *short, *options, cwd=tmp_path)
    shown = compared(tmp_path, "runs/wine")
    assert "model.network.hidden  [4]  [16]" in shown
    for name in ("accuracy", "balanced_accuracy", "f1", "auroc", "log_loss"):
        assert re.search(rf"^{name} .*\(.* to .*\).*\(.* to .*\)$", shown, re.MULTILINE)
    assert "note: one run each: this compares two checkpoints" in shown
    refused = compared(tmp_path, str(newest(tmp_path, "wine")), str(newest(tmp_path)), code=2)
    assert "have different test samples" in refused


def test_one_run_each_gives_the_paired_difference(tmp_path):
    a, b = make(tmp_path, "a", "1"), make(tmp_path, "b", "1", accuracy=0.9, dropout=0.5)
    found = as_json(tmp_path, "runs/a/1", "runs/b/1")
    difference = found["differences"]["accuracy"]["B"]
    low, high = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (difference["value"], difference["low"], difference["high"]) == pytest.approx(((b - a).mean(), low, high))
    assert found["options"] == {"model.network.dropout": {"A": "-", "B": "0.5"}}
    assert found["verdicts"]["B"].startswith("B is better than A by ")


def test_runs_of_an_experiment_are_sides_by_configuration(tmp_path):
    for seed in range(6):
        make(tmp_path, "a", f"2026-01-01_00-00-0{seed}", seed)
        make(tmp_path, "b", f"2026-01-01_00-00-0{seed}", seed, accuracy=0.84, dropout=0.5)
    found = as_json(tmp_path, "runs/a", "runs/b")
    assert [(side["label"], side["kind"], len(side["runs"])) for side in found["sides"].values()] == [
        ("a", "seeds", 6),
        ("b", "seeds", 6),
    ]
    assert any("paired by seed; the sign-flip test of 6 pairs has p = 0.031" in note for note in found["notes"])
    assert found == as_json(tmp_path, "runs/[ab]/*")
    assert found["verdicts"]["B"].startswith("B is better than A by ")
    assert "nothing to compare: a is 6 runs of one configuration" in compared(tmp_path, "runs/a", code=2)


def test_five_seeds_never_reach_the_sign_flip_test(tmp_path):
    for seed in range(5):
        for name, accuracy in (("a", 0.8), ("b", 0.9)):
            make(tmp_path, name, str(seed), seed, accuracy, dropout=accuracy)
    (note,) = as_json(tmp_path, "runs/a", "runs/b")["notes"]
    assert note.endswith("p = 0.062; with fewer than 6 seeds it never reaches 0.05")


def test_a_run_that_repeats_a_seed_does_not_count_twice(tmp_path):
    for index in range(4):
        make(tmp_path, "a", f"run{index}", seed=index // 2)
        make(tmp_path, "b", f"run{index}", seed=index, dropout=0.5)
    found = as_json(tmp_path, "runs/a", "runs/b")
    assert [run[-4:] for run in found["sides"]["A"]["runs"]] == ["run1", "run3"]
    assert "a: 2 runs repeat the seed of another one and are left out" in found["notes"]


def test_groups_of_repeat_are_sides_and_folds_are_corrected(tmp_path):
    values = {"a": [], "b": []}
    for index in range(5):
        for name in values:
            group = {"name": "five", "kind": "folds", "index": index, "count": 5}
            right = make(tmp_path, name, str(index), 7 * index, 0.8, group, outputs=False, dropout=len(name))
            values[name].append(right.mean())
    found = as_json(tmp_path, "runs/a", "runs/b")
    assert found["split"] == "val"
    assert found["sides"]["B"]["label"] == "b/five"
    difference = found["differences"]["accuracy"]["B"]
    each = np.subtract(values["b"], values["a"])
    half = stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 1 / 4) * each.var(ddof=1))
    assert difference["high"] - difference["value"] == pytest.approx(half)
    told = "folds are compared on the validation samples of each fold, because all of them share the test samples"
    assert told in compared(tmp_path, "runs/a", "runs/b", "--split=test", code=2)
    make(tmp_path, "c", "1")
    assert "folds compare with folds only, but c/1 has none" in compared(tmp_path, "runs/a", "runs/c", code=2)


def test_samples_that_may_differ_are_told_if_no_outputs_show_them(tmp_path):
    for name, split_seed in (("a", 0), ("b", 0), ("c", 1)):
        for seed in range(3):
            make(tmp_path, name, str(seed), seed, outputs=False, dropout=name)
            path = tmp_path / "runs" / name / str(seed) / "config.yaml"
            data = {"class_path": "firstlight.data.Wine", "init_args": {"split_seed": split_seed, "batch_size": 8}}
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "data": data}))
    told = "test samples may differ: data.split_seed differs, and not all runs have outputs"
    assert told not in as_json(tmp_path, "runs/a/0", "runs/a/1", "runs/b/0", "runs/b/1")["notes"]
    assert told in as_json(tmp_path, "runs/a/0", "runs/a/1", "runs/c/0", "runs/c/1")["notes"]


def test_a_group_that_is_not_complete_is_said_or_refused(tmp_path):
    for index in range(3):
        make(tmp_path, "a", str(index), index, group={"name": "g", "kind": "seeds", "index": index, "count": 4})
        make(tmp_path, "b", str(index), index, group={"name": "g", "kind": "folds", "index": index, "count": 4})
    make(tmp_path, "c", "1", accuracy=0.9)
    assert "a/g has 3 of 4 runs" in as_json(tmp_path, "runs/a", "runs/c/1")["notes"]
    assert "b/g has 3 of 4 folds: repeat it to the end" in compared(tmp_path, "runs/b", "runs/a", code=2)


def test_three_sides_widen_the_intervals(tmp_path):
    a, *others = (make(tmp_path, name, "1", accuracy=x, dropout=x) for name, x in (("a", 0.7), ("b", 0.8), ("c", 0.9)))
    found = as_json(tmp_path, "runs/a/1", "runs/b/1", "runs/c/1")
    for letter, other in zip("BC", others, strict=True):
        expected = stats.ttest_rel(other, a).confidence_interval(0.975)
        difference = found["differences"]["accuracy"][letter]
        assert (difference["low"], difference["high"]) == pytest.approx(tuple(expected))
    assert any(note.startswith("2 comparisons: each interval of a difference covers 97.5 %") for note in found["notes"])


def test_each_format_holds_the_same_figures(tmp_path):
    make(tmp_path, "a", "1"), make(tmp_path, "b", "1", accuracy=0.9, dropout="a|b<c>")
    args = ("runs/a/1", "runs/b/1")
    found = as_json(tmp_path, *args)
    value = found["metrics"]["accuracy"]["B"]["value"]
    table, markdown, page = (compared(tmp_path, *args, f"--format={name}") for name in ("table", "md", "html"))
    for text in (table, markdown, page):
        assert f"{value:.4f}" in text
        assert found["verdicts"]["B"] in text
    rows = list(csv.DictReader(io.StringIO(compared(tmp_path, *args, "--format=csv"))))
    assert float(rows[1]["value"]) == value
    assert float(rows[1]["difference_low"]) == found["differences"]["accuracy"]["B"]["low"]
    assert all(line.count("|") - line.count("\\|") == 4 for line in markdown.splitlines() if line.startswith("| model"))

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts = []

        def handle_data(self, data):
            self.texts.append(data)

    parser = Cells()
    parser.feed(page)
    assert "a|b<c>" in parser.texts


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "compare needs runs: firstlight compare RUN RUN"),
        (("runs/a/1",), "nothing to compare: a/1 is one run; give another run or experiment"),
        (("runs/a/1", "runs/a/9"), "there is no run runs/a/9"),
        (("runs/x*",), "no run matches runs/x*"),
        (
            ("runs/a/1", "runs/b/1", "--metric=acuracy"),
            "unknown metric acuracy; available: accuracy, balanced",
        ),
        (("runs/a/1", "runs/c/1"), "there is no runs/c/1/outputs/test.npz: firstlight test --run runs/c/1 writes it"),
        (("runs/a/1", "runs/b/1", "--split=val"), "there is no runs/a/1/outputs/val.npz: firstlight validate --run"),
        (("runs/a/1", "runs/d/1"), "runs/a/1 and runs/d/1 have different test samples"),
        (("runs/a/1", "runs/e/1"), "runs/e/1 has not finished: resume it"),
        (("runs/a/1", "--formt=md"), "compare does not take --formt=md"),
        (("runs/a/1", "--format=pdf"), "compare: argument --format: invalid choice: 'pdf'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(args, expected, tmp_path):
    for name in "abcde":
        make(tmp_path, name, "1", outputs=name != "c", dropout=name)
    (tmp_path / "runs/e/1/results.json").unlink()
    arrays = {"index": np.arange(SIZE) + 1, "targets": TARGETS, "predictions": TARGETS}
    write_outputs(tmp_path / "runs/d/1", "test", {"kind": np.array("classes"), **arrays})
    refused = compared(tmp_path, *args, code=2)
    assert refused.startswith(f"firstlight: {expected}")
    assert refused.count("\n") == 1


def test_losses_of_other_kinds_are_not_compared(tmp_path):
    for name, smoothing in (("a", 0.0), ("b", 0.1)):
        make(tmp_path, name, "1")
        run = tmp_path / "runs" / name / "1"
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["init_args"]["loss"] = {"init_args": {"label_smoothing": smoothing}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        arrays = {"index": np.arange(SIZE), "targets": TARGETS, "predictions": TARGETS}
        loss = {"loss": np.ones(SIZE), "weight": np.ones(SIZE)}
        write_outputs(run, "test", {"kind": np.array("classes"), **arrays, **loss})
    found = as_json(tmp_path, "runs/a/1", "runs/b/1")
    assert "loss" not in found["metrics"]
    assert "loss is left out: the sides minimise different losses" in found["notes"]
    refused = compared(tmp_path, "runs/a/1", "runs/b/1", "--metric=loss", code=2)
    assert refused.startswith("firstlight: loss is left out: the sides minimise different losses; available: accuracy,")


def test_options_of_one_command_make_no_other_configuration(tmp_path):
    for seed in range(2):
        for name, dropout in (("a", 0.0), ("b", 0.5)):
            make(tmp_path, name, str(seed), seed, dropout=dropout)
    path = tmp_path / "runs" / "a" / "1" / "config.yaml"
    path.write_text(path.read_text() + "apply: false\noutput: null\nseeds: 2\nfolds: null\n")
    found = as_json(tmp_path, "runs/a", "runs/b")
    assert [len(side["runs"]) for side in found["sides"].values()] == [2, 2]


def test_compare_imports_no_torch():
    code = "import firstlight.cli.compare, sys; print('torch' in sys.modules, 'lightning' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
