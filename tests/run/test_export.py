"""`firstlight export` writes what predicts as the checkpoint does, also in programs without torch."""

import csv
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import ndtri as scipy_ndtri

import firstlight
from firstlight.checkpoints.io import read
from firstlight.data import Digits
from firstlight.data.encoder import TableEncoder, ndtri
from firstlight.networks import ConvNet
from firstlight.run.export.formats import Pt2, traced
from tests.helpers import ROOT, called, newest, quick_or_slow

pytest.importorskip("onnxruntime")

TABLE = """
model:
  class_path: firstlight.tasks.TASK
  init_args:
    network: {class_path: firstlight.networks.TabM, init_args: {hidden: [8], members: 2, bins: 4, embedding: 4}}
    loss: torch.nn.LOSS
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
    schedule: firstlight.schedules.Constant
data:
  class_path: firstlight.data.Table
  init_args:
    {path: table.csv, target: TARGET, kind: KIND, categorical: [town], dates: [day], ignore: [IGNORE], missing: mean,
     scale: quantile, min_frequency: 3, indicators: true, batch_size: 16}
trainer: {max_epochs: 2, log_every_n_steps: 1, enable_progress_bar: false}
report: false
"""
MODEL = """
model:
  class_path: firstlight.tasks.TASK
  init_args:
    network: NETWORK
    loss: {class_path: torch.nn.CrossEntropyLoss, init_args: {ignore_index: IGNORED}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
    schedule: firstlight.schedules.Constant
data: DATA
trainer: {max_epochs: 1, limit_train_batches: 2, log_every_n_steps: 1, enable_progress_bar: false}
report: false
"""
LETTERS = f"{{class_path: firstlight.data.LabelledText, init_args: {{path: {ROOT}/configs/data/letters.csv, text: name, label: script}}}}"  # noqa: E501
CONVNET = "{class_path: firstlight.networks.ConvNet, init_args: {widths: [4]}}"
CORPUS = f"{{class_path: firstlight.data.Corpus, init_args: {{path: {ROOT}/LICENSE, length: 32, context: 8}}}}"
CONFIGS = {
    "classes": TABLE.replace("TASK", "Classification").replace("LOSS", "CrossEntropyLoss").replace("KIND", "multiclass")
    .replace("TARGET", "label").replace("IGNORE", "price"),
    "prices": TABLE.replace("TASK", "Regression").replace("LOSS", "MSELoss").replace("KIND", "regression")
    .replace("TARGET", "price").replace("IGNORE", "label"),
    "convnet": MODEL.replace("NETWORK", CONVNET).replace("DATA", "firstlight.data.Digits"),
    "resnet": MODEL.replace("NETWORK", "{class_path: firstlight.networks.ResNet, init_args: {width: 4, depth: 8}}")
    .replace("DATA", "firstlight.data.Digits"),
    "ngrams": MODEL.replace("NETWORK", "firstlight.networks.NgramClassifier").replace("DATA", LETTERS),
    "transformer": MODEL.replace(
        "NETWORK", "{class_path: firstlight.networks.TransformerClassifier, init_args: {width: 8, layers: 1, heads: 2}}"
    ).replace("DATA", LETTERS),
    "language": MODEL.replace("TASK", "LanguageModel").replace("IGNORED", "0").replace(
        "NETWORK", "{class_path: firstlight.networks.TransformerLM, init_args: {width: 8, layers: 1, heads: 2}}"
    ).replace("DATA", CORPUS),
}  # fmt: skip

WITHOUT_TORCH = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
description = json.loads(session.get_modelmeta().custom_metadata_map["firstlight"])
assert [each.name for each in session.get_outputs()] == description["outputs"]
found = session.run(None, {"inputs": np.load(sys.argv[2])})
np.savez(sys.argv[3], **dict(zip(description["outputs"], found)))
assert not {"torch", "lightning", "firstlight"} & {*sys.modules}
print(json.dumps(description))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains a configuration for a moment and returns its run."""
    folder = tmp_path_factory.mktemp("exports")
    generator = random.Random(0)
    lines = ["height,town,day,label,price"]
    for row in range(240):
        height = "" if row % 9 == 4 else f"{generator.gauss(1e6, 3):.3f}"
        town = "" if row % 7 == 3 else generator.choice(["Oslo", "Rome", "Oslo", "Bonn"] + ["Ulm"] * (row % 120 == 1))
        lines.append(f"{height},{town},20{row % 20:02}-0{row % 9 + 1}-1{row % 10},{'abc'[row % 3]},{row * 1000 + 2e5}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")

    def run(name):
        if not (folder / "runs" / name).exists():
            text = CONFIGS[name].replace("TASK", "Classification").replace("IGNORED", "-100")
            (folder / f"{name}.yaml").write_text(text)
            called("run", "--config", f"{name}.yaml", cwd=folder)
        return newest(folder, name)

    return run


def exported(run, to, *options):
    """Return the file that an export wrote, and what it printed."""
    printed = called("export", "--run", str(run), "--to", to, *options, cwd=run.parents[2]).stdout
    return run.parents[2] / printed.split("wrote ")[1].strip(), printed


def raw_test_inputs(run):
    """Return the test samples as a program without firstlight would make them, and the checkpoint's predictions."""
    printed = called("predict", "--run", str(run), cwd=run.parents[2]).stdout
    with open(run.parents[2] / printed.split("wrote ")[1].strip(), newline="") as file:
        predicted = list(csv.DictReader(file))
    rows = [int(row["index"]) for row in predicted]
    name = run.parent.name
    if name in ("convnet", "resnet"):
        return Digits().load().inputs[rows], predicted
    if name in ("ngrams", "transformer"):
        with open(ROOT / "configs" / "data" / "letters.csv", newline="", encoding="utf-8") as file:
            texts = [row["name"].encode() for row in csv.DictReader(file)]
        texts = [texts[row] for row in rows]
        return np.array([[*(byte + 1 for byte in text), *[0] * (80 - len(text))] for text in texts]), predicted
    with open(run.parents[2] / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [table[row] for row in rows], predicted


def as_numbers(table, columns):
    """Return rows of text as numbers, as the description of an exported model says."""
    found = np.full((len(table), len(columns)), np.nan)
    for index, column in enumerate(columns):
        for row, cells in enumerate(table):
            text = cells[column["name"]]
            if text and column["kind"] == "category":
                found[row, index] = column["categories"].index(text) if text in column["categories"] else -1
            elif text and column["kind"] == "date":
                found[row, index] = (np.datetime64(text) - np.datetime64("1970-01-01")) / np.timedelta64(1, "s")
            elif text:
                found[row, index] = float(text)
    return found


def assert_predicted(found, predicted, names):
    if "probabilities" in found:
        expected = [[float(row[f"probabilities/{name}"]) for name in names] for row in predicted]
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
    else:
        np.testing.assert_allclose(found["prediction"], [float(row["prediction"]) for row in predicted], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    quick_or_slow(["classes", "prices", "convnet", "resnet", "ngrams", "transformer"], {"classes", "convnet"}),
)
def test_onnx_predicts_raw_inputs_in_a_process_without_torch(name, runs, tmp_path):
    run = runs(name)
    file, printed = exported(run, "onnx")
    assert "largest difference" in printed
    inputs, predicted = raw_test_inputs(run)
    description = json.loads((file.parent / "model.json").read_text())
    if isinstance(inputs, list):
        inputs = as_numbers(inputs, description["inputs"]["columns"])
    for rows in (slice(None), slice(0, 1)):  # Batches of any size.
        np.save(tmp_path / "inputs.npy", inputs[rows])
        arguments = [str(path) for path in (file, tmp_path / "inputs.npy", tmp_path / "found.npz")]
        told = subprocess.check_output([sys.executable, "-c", WITHOUT_TORCH, *arguments], text=True, timeout=300)
        assert json.loads(told) == description
        assert_predicted(np.load(tmp_path / "found.npz"), predicted[rows], description["class_names"])


@pytest.mark.parametrize("to", ["pt2", "safetensors"])
@pytest.mark.parametrize("name", quick_or_slow(["classes", "convnet", "language"], {"classes", "convnet"}))
def test_other_formats_hold_the_model(name, to, runs):
    file, printed = exported(runs(name), to)
    assert float(printed.split("largest difference ")[1].split()[0]) < 1e-5
    if to == "pt2":
        extra = {"description.json": ""}
        loaded = torch.export.load(file, extra_files=extra).module()
        assert json.loads(extra["description.json"]) == json.loads((file.parent / "model.json").read_text())
        if name == "convnet":
            inputs, predicted = raw_test_inputs(runs(name))
            assert_predicted(
                {name: each.detach() for name, each in loaded(torch.from_numpy(inputs[:1])).items()},
                predicted[:1],
                range(10),
            )
    else:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["firstlight"])["network"]
            weights = read(runs(name) / "checkpoints" / "best.ckpt")["state_dict"]
            assert all(torch.equal(opened.get_tensor(f"task.{each}"), value) for each, value in weights.items())


def test_channels_last_weights_are_written_right_and_without_a_warning(tmp_path):
    network, inputs = ConvNet(in_channels=1, widths=[4, 8], out_features=10).eval(), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = network(inputs)
    with (tmp_path / "model.pt2").open("wb") as file:
        Pt2().write(network, inputs, {}, file)
    assert torch.equal(Pt2().load(tmp_path / "model.pt2", network)(inputs), expected)


def changed(name, change):
    """Return a change of one output of a file."""
    return lambda found: {**found, name: change(found[name])}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("convnet", changed("probabilities", lambda each: each * 1.001), "in probabilities by 0.001, a share of"),
        ("convnet", changed("probabilities", lambda each: torch.cat([each, each], 1)), "in probabilities by inf"),
        ("convnet", changed("probabilities", lambda each: each * torch.nan), "in probabilities by nan"),
        ("convnet", changed("prediction", lambda each: (each + 1) % 10), "in prediction by 1, a share of"),
        ("convnet", lambda found: {"prediction": found["prediction"]}, "in probabilities by inf"),
        ("convnet", lambda found: {**found, "more": found["prediction"]}, "in more by inf"),
        ("language", changed("logits", lambda each: torch.cat([each, each[:, :1]], 1)), "in logits by inf"),
        ("transformer", changed("probabilities", lambda each: torch.cat([each, each], 1)), "in probabilities by inf"),
    ],
)
def test_a_file_that_predicts_otherwise_is_refused_and_removed(name, change, told, runs, monkeypatch):
    run = runs(name)
    before = {*run.rglob("*")}
    real = firstlight.run.export.formats.Safetensors.load

    def load(form, file, model):
        return lambda inputs: change(real(form, file, model)(inputs))

    monkeypatch.setattr(firstlight.run.export.formats.Safetensors, "load", load)
    done = called("export", "--run", str(run), "--to", "safetensors", cwd=run.parents[2], code=1)
    assert f"the safetensors file differs from the checkpoint {told}" in done.stderr
    assert "at most 0.0001 is right" in done.stderr and "nothing was written" in done.stderr
    assert {*run.rglob("*")} == before


def test_a_model_card_of_a_refit_says_that_the_model_has_seen_the_validation_samples(runs):
    folder = runs("prices").parents[2]
    (folder / "again.yaml").write_text((folder / "prices.yaml").read_text() + "refit: true\n")
    called("run", "--config", "again.yaml", cwd=folder)
    run = newest(folder, "again")
    results = json.loads((run / "results.json").read_text())
    best, steps = results["best"], results["refit"]["steps"]
    card = (exported(run, "safetensors")[0].parent / "model_card.md").read_text()
    assert "Table: 168 train, 36 val, 36 test samples. The model has seen those of train and val." in card
    assert f"- checkpoint: {steps} steps on the training and validation samples\n" in card
    told = f"- best checkpoint, of the training samples alone: epoch {best['epoch']}, step {best['step']}, val/loss"
    assert f"{told} {best['val/loss']:.6g}" in card
    other = (exported(run, "safetensors", "--ckpt=best")[0].parent / "model_card.md").read_text()
    assert "has seen" not in other and f"- checkpoint: epoch {best['epoch']}, step {best['step']}, val/loss" in other


def test_a_model_card_tells_data_metrics_and_configuration(runs):
    run = runs("classes")
    results = json.loads((run / "results.json").read_text())
    finding = {
        "name": "class_imbalance",
        "severity": "warning",
        "text": "few of class c",
        "advice": "weigh them",
        "evidence": {},
    }
    (run / "results.json").write_text(json.dumps({**results, "findings": [finding]}))
    file, _ = exported(run, "safetensors")
    card = (file.parent / "model_card.md").read_text()
    (run / "results.json").write_text(json.dumps(results))
    for text in (
        "`TabM`, trained by firstlight",
        "| town | category | index, -1 for others | Bonn, Oslo, Rome |",
        "| day | date | seconds since 1970-01-01 in UTC | ISO 8601 |",
        "Classes, in the order of their indices: a, b, c.",
        "Table: 168 train, 36 val, 36 test samples.",
        f"test/accuracy {results['metrics']['test/accuracy']:.6g}",
        "- warning: few of class c: weigh them",
        "class_path: firstlight.networks.TabM",
    ):
        assert text in card
    assert "table.csv" not in card  # People share it, so it holds no path.


def test_a_model_card_holds_test_metrics_of_its_own_checkpoint_only(runs):
    file, _ = exported(runs("classes"), "safetensors", "--ckpt=last")
    assert "test/accuracy" not in (file.parent / "model_card.md").read_text()


def test_what_cannot_be_exported_is_told_in_one_line(runs, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from firstlight.networks import MLP\nclass Branches(MLP):\n"
        "    def __init__(self):\n        super().__init__(64, [4], 10)\n"
        "    def forward(self, inputs):\n"
        "        return super().forward(inputs if inputs.sum() > 0 else -inputs)\n"
    )
    text = CONFIGS["convnet"].replace("TASK", "Classification").replace("IGNORED", "-100")
    (tmp_path / "own.yaml").write_text(text.replace(CONVNET, "my_nets.Branches"))
    called("run", "--config", "own.yaml", cwd=tmp_path)
    run = newest(tmp_path, "own")
    done = called("export", "--run", str(run), "--to", "pt2", cwd=tmp_path, code=2)
    assert done.stderr.startswith("firstlight: Branches cannot be traced: ") and done.stderr.count("\n") == 1
    assert not (run / "exports").exists()
    done = called("export", "--run", str(run), cwd=tmp_path, code=2)
    assert "export needs a format: --to onnx, --to pt2, --to safetensors" in done.stderr


def test_a_checkpoint_alone_is_exported_with_its_data(runs):
    run = runs("prices")
    folder = run.parents[2]
    path = str(run / "checkpoints" / "best.ckpt")
    done = called("export", "--ckpt", path, "--to", "safetensors", cwd=folder, code=2)
    assert "add --data.path" in done.stderr
    done = called("export", "--ckpt", path, "--to", "safetensors", "--data.path", "table.csv", cwd=folder)
    assert "on 36 test samples" in done.stdout and "runs/unnamed/exports/" in done.stdout


@pytest.mark.parametrize("scale", ["standard", "quantile"])
@pytest.mark.parametrize("kinds", [["number", "date", "category"], ["number"], ["date"], ["category"]])
def test_encoder_counts_when_it_is_exported(scale, kinds):
    generator = torch.Generator().manual_seed(0)
    columns = {
        "number": (torch.randn(500, generator=generator).double() * 9).round(),  # With ties.
        "date": torch.rand(500, generator=generator).double() * 1e9,
        "category": torch.randint(-1, 3, (500,), generator=generator).double(),
    }
    rows = torch.stack([columns[kind] for kind in kinds], 1)
    rows[::7, 0] = torch.nan
    sizes = [3] * kinds.count("category")
    encoder = TableEncoder.fit(rows, kinds, sizes, [True] * len(sizes), scale, True)
    outside = torch.cat([rows, rows * 3, rows[:1] * 0 - 1e12])
    found = traced(_Named(encoder), rows).module()(outside)["features"]
    torch.testing.assert_close(found, encoder(outside), rtol=0, atol=1e-13)


class _Named(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs):
        return {"features": self.encoder(inputs)}


def test_ndtri_equals_that_of_scipy():
    probability = torch.cat([torch.linspace(1e-6, 1 - 1e-6, 9_999, dtype=torch.float64), torch.tensor([1e-9, 0.5])])
    np.testing.assert_allclose(ndtri(probability), scipy_ndtri(probability.numpy()), rtol=1e-13, atol=1e-13)
