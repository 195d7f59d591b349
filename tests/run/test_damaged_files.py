"""Damaged files of a run's folder: a verb works or ends with one line, without a traceback and without a hang."""

import csv
import random
import shutil
import zipfile

import pytest
import torch
from torch.utils.serialization import config

import firstlight
from firstlight.__main__ import main
from firstlight.checkpoints.io import AtomicCheckpointIO, read, read_checkpoint_metrics
from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.insight.record import SeriesReader
from firstlight.run import directory
from firstlight.tasks import Classification
from tests.helpers import ROOT, newest, quick_or_slow

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    quick = ["--trainer.max_epochs=1", "--disable=progress", f"--runs={folder}/runs", "--model.network.hidden=[4]"]
    assert main(["fit", "--config", str(ROOT / "configs/digits_mlp.yaml"), *quick]) == 0
    return newest(folder)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.parent.parent, tmp_path / "runs")
    return tmp_path / "runs" / trained.parent.name / trained.name


def said(capsys, code, *args):
    """Run a verb; return its one line on stderr for exit code 2, and what it printed otherwise."""
    capsys.readouterr()
    found = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert found in code, out + err
    if found:
        (line,) = err.splitlines()
        assert line.startswith("firstlight: ") and len(line) < 1000
        return line
    return out


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
)
CONFIGS = {
    "a bomb": BOMB,
    "a node within itself": "a: &a [*a]\n",
    "deep nesting": "a: " + "[" * 5000 + "]" * 5000,
    "a very long file": "a: [" + "1," * 600_000 + "]",
    "no YAML": "a: [",
    "no mapping": "- 1",
    "nothing": "",
    "bytes": b"\xff\xfe\x00",
    "control characters": "a: \x01",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_damaged_config_of_a_run_is_refused_in_one_line(kind, run, capsys):
    text = CONFIGS[kind]
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        firstlight.load(run)
    for line in (str(refused.value), said(capsys, {2}, "test", "--run", run), said(capsys, {2}, "compare", run, run)):
        assert "config.yaml" in line or (kind == "nothing" and "--config FILE" in line)
        assert {"a bomb": "expand", "a node within itself": "expand", "deep nesting": "deeply"}.get(kind, "") in line
    (run / "config.yaml").write_text("a: 1")
    with pytest.raises(UsageError, match=r"config\.yaml holds no model$"):
        firstlight.load(run)


LATEST = [b"\xff\xfe", b"", b"../../x", b"/etc", b"a\0b", b"x" * 5000, b"two\nlines", b".."]


@pytest.mark.parametrize("content", LATEST, ids=lambda content: repr(content[:8]))
def test_damaged_latest_is_refused_in_one_line(content, run):
    latest = run.parent / "latest"
    latest.write_bytes(content)
    with pytest.raises(UsageError, match=r"latest.*give the folder of the run$") as refused:
        directory.find(latest)
    assert "\n" not in str(refused.value)


HEADER = b"step,name,value\n"
METRICS = {
    "no header": (b"", 0), "bytes": (b"\xff\xfe\x00", 0), "zeros": (b"\0" * 100, 0),
    "other columns": (b"a,b\n1,2\n", 0), "no values": (b"step,name\n", 0), "no number": (HEADER + b"x,lr,1\n", 8),
    "a large number": (HEADER + b"9" * 400 + b",lr,1\n", 8),
    "no whole number": (HEADER + b"-5,lr,1\n1.5,lr,2\n", 8),
    "an open quote, which takes the rest": (HEADER + b'"1,lr,1\n', 0),
    "a field that ends reading": (HEADER + b"1" * 200_000 + b",lr,1\n", 0),
}  # fmt: skip
"""By damage: the content of the file, and its steps after a line of step 7 is added."""


@pytest.mark.parametrize(("content", "steps"), METRICS.values(), ids=METRICS)
def test_damaged_metrics_have_the_steps_of_their_readable_lines(content, steps, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    assert directory.logged_steps(tmp_path) == 0
    (tmp_path / "metrics.csv").write_bytes(content + b"7,lr,0.5\n")
    assert directory.logged_steps(tmp_path) == steps


def test_report_and_run_leave_out_lines_of_metrics_that_are_no_steps(run, capsys):
    with (run / "metrics.csv").open("a") as file:
        file.write("99999999999999999999,val/loss,1\n-3,val/loss,1\nnan,val/loss,1\n1e3,val/loss,1\n2,val/loss,1e400\n")
        file.write(f"{'9' * 5000},val/loss,1\n")
    read = SeriesReader(run / "metrics.csv").read()
    assert read["val/loss"].steps.max() < 100 and all((each.steps >= 0).all() for each in read.values())
    said(capsys, {0}, "report", "--run", run)
    said(capsys, {0}, "run", "--run", run, "--trainer.max_epochs=2", "--disable=progress")


def test_run_with_damaged_metrics_and_a_folder_as_lock(run, capsys):
    (run / "metrics.csv").write_bytes(b"\xff\xfe\0,\n")
    said(capsys, {0}, "fit", "--run", run, "--trainer.max_epochs=2", "--disable=progress")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").mkdir()
    line = said(capsys, {2}, "fit", "--run", run, "--trainer.max_epochs=3")
    assert f"cannot lock {run / '.lock'}: " in line
    said(capsys, {0}, "test", "--run", run, "--disable=progress")


RESULTS = [b"", b"{", b"[]", b"\xff", b'{"metrics": 3}', b"[" * 100_000, b'{"a": NaN}', b'"x"']


@pytest.mark.parametrize("content", RESULTS, ids=lambda content: repr(content[:12]))
def test_damaged_results_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"results\.json .*; remove it$") as refused:
        directory.read_results(tmp_path)
    assert "\n" not in str(refused.value)
    directory.write_results(tmp_path, {"metrics": {}})
    assert directory.read_results(tmp_path)["metrics"] == {}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


WRONG = {
    "a text": "x", "a number": 3, "nothing": None, "a list": [1], "an empty mapping": {}, "a tensor": torch.zeros(2),
    "numbers as names": {1: 2}, "deep nesting": nested(100), "a wrong entry": {"x": "y"}, "entries": [{"x": "y"}],
}  # fmt: skip
FIELDS = [
    "state_dict", "epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states",
    "lr_schedulers", "metrics", "optimization", "train_log", "Digits", "hyper_parameters",
    "datamodule_hyper_parameters", "hparams_name", "hparams_type", "random_state", "frozen",
]  # fmt: skip


@pytest.mark.parametrize("field", quick_or_slow(FIELDS, {"loops", "hyper_parameters"}))
def test_checkpoint_with_a_field_of_another_type_is_refused_in_one_line_or_works(field, run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    rng = random.Random(field)
    for kind in ["missing", *WRONG]:
        checkpoint = {name: value for name, value in whole.items() if name != field}
        if kind != "missing":
            checkpoint[field] = WRONG[kind]
        torch.save(checkpoint, path)
        for load in (Classification.load_from_checkpoint, Digits.load_from_checkpoint, read_checkpoint_metrics):
            try:
                load(path)
            except UsageError as error:
                assert "\n" not in str(error) and str(error).isprintable(), (kind, str(error))
        if rng.random() < 0.05:  # The command line is slower.
            said(capsys, {0, 2}, "test", "--run", run, "--ckpt", "last", "--disable=progress")
    said(capsys, {0, 2}, "fit", "--run", run, "--trainer.max_epochs=2", "--disable=progress")


def test_optimiser_state_of_another_shape_is_refused_in_one_line(run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    whole["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3, 5)
    torch.save(whole, path)
    line = said(capsys, {2}, "fit", "--run", run, "--trainer.max_epochs=2", "--disable=progress")
    assert (
        "last.ckpt cannot be restored: exp_avg of the optimiser has the shape (3, 5), and its parameter (4, 64)" in line
    )


def test_damaged_best_checkpoint_does_not_decide_what_is_best(run, capsys):
    best = run / "checkpoints" / "best.ckpt"
    state = next(each for name, each in read(best)["callbacks"].items() if name.startswith("BestCheckpoint"))
    score = state["best_model_score"].numpy().tobytes()
    assert score in best.read_bytes()
    best.write_bytes(best.read_bytes().replace(score, bytes(len(score))))  # A loss that no epoch can reach.
    said(capsys, {0}, "fit", "--run", run, "--trainer.max_epochs=2", "--disable=progress")
    assert read_checkpoint_metrics(best)["val/loss"] > 0
    assert read(best)["epoch"] == 1


ENTRIES = [
    ("Digits.loader", "x"), ("Digits.loader.batches_consumed", "x"), ("Digits.loader.seed", -1),
    ("Digits.loader.epoch", None), ("random_state", "x"), ("random_state.0", [1]), ("random_state.0.torch", "x"),
    ("random_state.0.torch", torch.zeros(3)), ("random_state.0.python", (3, "x", None)), ("random_state.0.numpy", ()),
    ("random_state.0.loaders", [1]), ("random_state.0.attributes", {"initial": {}, "saved": {"data": 1}}),
    ("random_state.0.evaluation", None), ("frozen", 1), ("evaluating", 1), ("callback_metrics", 1),
    ("optimization.steps", "x"), ("optimization.found", {"x": 1}),
    ("optimization.added", [["no such weight"]]), ("optimization.limits", [torch.zeros(2)]),
    ("train_log.batches", 1), ("train_log.batches.0", {"has_metrics": True, "losses": "x"}),
    ("train_log.callback_metrics", {"train/loss": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        # Each fourth is quick: all parts of a checkpoint have one.
        pytest.param(place, value, id=f"{place}={str(value)[:20]}", marks=[pytest.mark.slow] if number % 4 else [])
        for number, (place, value) in enumerate(ENTRIES)
    ],
)
def test_resume_from_a_state_of_another_form_is_refused_in_one_line(place, value, run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    *parents, name = place.split(".")
    at = checkpoint
    for parent in parents:
        at = at[int(parent) if isinstance(at, list) else parent]
    at[int(name) if isinstance(at, list) else name] = value
    torch.save(checkpoint, path)
    (run / "checkpoints" / "best.ckpt").unlink()
    line = said(capsys, {2}, "fit", "--run", run, "--trainer.max_epochs=2", "--disable=progress")
    assert "damaged" in line


CYCLE = {}
CYCLE["itself"] = CYCLE
TABLE = ROOT / "configs" / "data" / "bicycles.csv"
CRAFTED = {
    "a category that is a tensor": ("Table.encoder.categories", [5, 3, torch.zeros(3)], "test", "categories"),
    "more categories than memory": ("Table.encoder.categories.0", 2**40, "predict", "categories"),
    "columns that are a tensor": ("Table.columns", torch.tensor(1.0), "export", "columns"),
    "categories of no column": ("Table.categories", {}, "load", "categories"),
    "a kind of a column": ("Table.encoder.kinds.0", "x", "test", "of the kinds that categorical and dates say"),
    "a mean of another length": ("Table.mean", torch.zeros(2), "load", "mean"),
    "a mean without axes": ("Table.mean", torch.tensor(0.0), "test", "mean"),
    "no mean": ("Table.mean", None, "predict", "mean"),
    "no mapping": ("Table", "x", "load", "Table"),
    "patience as a text": ("callbacks.EarlyStopping.wait_count", "3", "fit", "wait_count"),
    "scores as a text": ("callbacks.BestCheckpoint.best_k_models", {"best.ckpt": "x"}, "fit", "best_k_models"),
    "an optimiser within itself": ("optimizer_states.0.state", CYCLE, "fit", "a container that holds itself"),
    "betas of an optimiser": ("optimizer_states.0.param_groups.0.betas", [], "fit", "betas"),
    "a class that is a mapping": ("datamodule_hyper_parameters._class_path", {"init_args": "x"}, "load", "not a class"),
    "a class that is a list": ("hyper_parameters._class_path", ["x"], "test", "not a class"),
}
"""By kind of damage: place, value, the verb that meets it, and what its line names."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--disable=progress", f"--runs={folder}/runs"]
    config = str(ROOT / "configs/bicycles.yaml")
    assert main(["fit", "--config", config, "--data.path", str(TABLE), "--model.network.hidden=[4]", *quick]) == 0
    return newest(folder, "bicycles")


@pytest.mark.parametrize(("place", "value", "verb", "named"), CRAFTED.values(), ids=CRAFTED)
def test_crafted_state_is_refused_in_one_line(place, value, verb, named, table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(table, tmp_path / "run")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    *parents, name = place.split(".")
    at = checkpoint
    for parent in parents:
        key = next((key for key in at if str(key).startswith(parent)), None) if isinstance(at, dict) else int(parent)
        at = at[key]
    at[int(name) if isinstance(at, list) else name] = value
    with config.patch({"save.compute_crc32": True}):
        for file in ("best", "last"):
            torch.save(checkpoint, run / "checkpoints" / f"{file}.ckpt")
    if verb == "load":
        with pytest.raises(UsageError) as refused:
            firstlight.load(run / "checkpoints" / "best.ckpt")
        line = str(refused.value)
    elif "class" in place:
        line = said(capsys, {2}, verb, "--ckpt", run / "checkpoints" / "best.ckpt", "--data.path", TABLE)
    else:
        options = {"fit": ["--trainer.max_epochs=2"], "export": ["--to=safetensors"]}.get(verb, [])
        line = said(capsys, {2}, verb, "--run", run, "--disable=progress", *options)
    assert named in line and line.isprintable()
    assert any(word in line for word in ("damaged", "best.ckpt", "last.ckpt", "the checkpoint"))


def test_records_that_are_compressed_or_share_bytes_are_not_read(run):
    path = run / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(UsageError, match=r"its records are larger than the file"):
        read("bomb.ckpt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile("packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name) + random.Random(0).randbytes(100_000))
        archive.writestr("more", random.Random(1).randbytes(1_000_000), zipfile.ZIP_STORED)
    with pytest.raises(UsageError, match=r"is compressed|larger than the file"):
        read("packed.ckpt")


@pytest.mark.parametrize("flips", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_changed_bytes_of_the_pickle_with_right_checksums_are_refused_or_load(flips, run):
    path, rng = run / "checkpoints" / "last.ckpt", random.Random(2)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    for _ in range(flips):
        data = bytearray(records[name])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with zipfile.ZipFile("changed.ckpt", "w") as archive:
            for each, content in records.items():
                archive.writestr(each, bytes(data) if each == name else content)
        for load in (
            AtomicCheckpointIO().load_checkpoint,
            read_checkpoint_metrics,
            Classification.load_from_checkpoint,
        ):
            try:
                load("changed.ckpt")
            except UsageError as error:
                assert "\n" not in str(error)


def test_reader_of_metrics_ignores_no_complete_line(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "name", "value"], [3, "a,b", 1.0], [12, 'say "x"', 2.0]])
    assert directory.logged_steps(tmp_path) == 13
