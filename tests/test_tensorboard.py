"""What TensorBoard shows of runs, read back from its server, and from a browser."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import yaml
from PIL import Image

from firstlight.loggers import TensorBoard, chart_layout, log_findings
from firstlight.run import board
from firstlight.run.predictor import load
from tests.helpers import ROOT, called, logged, results

QUICK = ["--trainer.log_every_n_steps=10", "--disable=progress", "--report=false"]
DIGITS = ["--config", str(ROOT / "configs" / "digits_mlp.yaml"), "--trainer.max_epochs=4", *QUICK]
RATES = (0.003, 0.001)


class Server:
    """A TensorBoard server, asked over HTTP."""

    def __init__(self, address):
        self.address = address

    def get(self, path, data=None, **query):
        url = f"{self.address}/data/plugin/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
        return urllib.request.urlopen(request, timeout=60).read()

    def json(self, path, data=None, **query):
        return json.loads(self.get(path, data, **query))

    def picture(self, run, tag):
        (found,) = self.json("images/images", run=run, tag=tag, sample=0)
        data = self.get("images/individualImage?" + found["query"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@contextmanager
def serving(folder, runs):
    """Yield a server of a folder when it has read these runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server, deadline = Server(f"http://127.0.0.1:{port}"), time.monotonic() + 120
    try:
        while True:
            with suppress(OSError):
                tags = server.json("scalars/tags")
                if {*runs} <= tags.keys():
                    break
            assert time.monotonic() < deadline, "TensorBoard did not answer"
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two runs of digits that differ in their learning rate, one of embeddings, and one of texts."""
    folder = tmp_path_factory.mktemp("board")
    for rate in RATES:
        called("run", *DIGITS, f"--model.optimizer.lr={rate}", cwd=folder)
    for name in ("digits_supcon", "letters"):
        called("run", "--config", f"firstlight:{name}", "--trainer.max_epochs=2", *QUICK, cwd=folder)
    found = [path.parent for path in sorted(folder.glob("runs/*/*/config.yaml"))]
    rate = {
        path: yaml.safe_load((path / "config.yaml").read_text())["model"]["init_args"]["optimizer"] for path in found
    }
    ordered = sorted(found, key=lambda path: (path.parent.name, -rate[path]["init_args"]["lr"]))
    return ordered


@pytest.fixture(scope="module")
def server(runs):
    folder = runs[0].parents[1]
    logger = TensorBoard(folder / "findings" / "a")
    finding = {"name": "overfitting", "severity": "warning", "text": "val/loss rises", "advice": "stop", "epoch": 6}
    log_findings(logger, [finding], 120)
    logger.log_metrics({"best/x": 1.0}, 120)
    logger.finalize("success")
    with serving(folder, ["findings/a", *(f"{names(run)}/hparams" for run in runs)]) as server:
        yield server


def names(run):
    return f"{run.parent.name}/{run.name}"


def test_train_and_validation_share_charts_with_learning_rate_and_gradient_norms(runs, server):
    layout = server.json("custom_scalars/layout")["category"]
    charts = {each["title"]: {c["title"]: c["multiline"]["tag"] for c in each["chart"]} for each in layout}
    assert next(iter(charts)) == "train and validation" and next(iter(charts["train and validation"])) == "loss"

    def curves(category, title):
        found = {}
        for tag in charts[category][title]:
            found |= server.json("custom_scalars/scalars", run=names(runs[0]), tag=tag)["tag_to_events"]
        return {tag: [(step, pytest.approx(value)) for _, step, value in events] for tag, events in found.items()}

    for metric in ("loss", "accuracy"):
        both = [f"train/{metric}", f"val/{metric}"]
        assert curves("train and validation", metric) == {tag: logged(runs[0], tag) for tag in both}
    assert curves("optimisation", "learning rate") == {"lr": logged(runs[0], "lr")}
    blocks = [f"grad_norm/{name}" for name in ("total", "hidden0", "hidden1", "output")]
    assert curves("optimisation", "gradient norm") == {tag: logged(runs[0], tag) for tag in blocks}
    assert {*curves("by epoch", "loss")} == {"Epoch/train/loss", "Epoch/val/loss"}


def test_curves_by_epoch_have_the_epoch_as_their_step(runs, server):
    curve = server.json("scalars/scalars", run=names(runs[0]), tag="Epoch/val/loss")
    values = [value for _, value in logged(runs[0], "val/loss")]
    assert [(step, value) for _, step, value in curve] == [(n, pytest.approx(v)) for n, v in enumerate(values, 1)]
    curve = server.json("scalars/scalars", run=names(runs[0]), tag="Epoch/train/loss")
    last = dict(logged(runs[0], "train/loss"))
    assert [(step, value) for _, step, value in curve] == [(n, pytest.approx(last[40 * n - 1])) for n in (1, 2, 3, 4)]


def test_hparams_show_what_differs_first_and_the_best_metrics(runs, server):
    experiment = server.json("hparams/experiment", b"{}")
    columns = experiment["hparamInfos"]
    assert {each["name"] for each in columns if each["differs"]} >= {"optimizer/lr"}
    assert {"optimizer/lr", "network/hidden", "data/batch_size"} <= {each["name"] for each in columns}
    differ = [each["differs"] for each in columns]
    assert differ == sorted(differ, reverse=True)
    metrics = [each["name"]["tag"] for each in experiment["metricInfos"]]
    assert (
        metrics[0] == "best/monitor" and "best/val/loss" in metrics and all(tag.startswith("best") for tag in metrics)
    )
    wanted = {"colParams": [{"hparam": "optimizer/lr", "includeInResult": True}], "sliceSize": 10}
    wanted |= {"startIndex": 0, "allowedStatuses": ["STATUS_SUCCESS"]}
    wanted["colParams"] += [{"metric": {"tag": tag, "group": ""}, "includeInResult": True} for tag in metrics]
    groups = server.json("hparams/session_groups", json.dumps(wanted).encode())["sessionGroups"]
    found = {each["sessions"][0]["name"]: each for each in groups}
    for run, rate in zip(runs[:2], RATES, strict=True):
        group = found[f"{names(run)}/hparams"]
        assert group["hparams"]["optimizer/lr"] == rate
        shown = {each["name"]["tag"]: each["value"] for each in group["metricValues"]}
        best = results(run)["best"]
        expected = {f"best{'_at' * ('/' not in name)}/{name}": value for name, value in best.items()}
        assert {tag: shown[tag] for tag in expected} == {tag: pytest.approx(value) for tag, value in expected.items()}
        assert shown["best/monitor"] == pytest.approx(best["val/loss"])


def test_the_confusion_matrix_is_a_picture_of_its_counts(runs, server):
    picture = server.picture(names(runs[0]), "test/confusion")
    with np.load(runs[0] / "outputs" / "test.npz") as file:
        targets, predicted = file["targets"], file["outputs"].argmax(1)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (targets, predicted), 1)
    assert picture.shape[0] > 300 and picture.std() > 10
    assert np.array_equal(picture, board.matrix_pixels(counts, [str(n) for n in range(10)])[..., :3])


def test_the_most_confident_errors_are_pictures_or_texts(runs, server):
    with np.load(runs[0] / "outputs" / "test.npz") as file:
        wrong = (file["targets"] != file["outputs"].argmax(1)).sum()
    picture = server.picture(names(runs[0]), "test/errors")
    assert picture.shape[1] == 170 * min(4, wrong) and picture.shape[0] == 215 * -(-min(12, wrong) // 4)
    (found,) = server.json("text/text", run=names(runs[-1]), tag="test/errors/text_summary")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", found["text"])
    with np.load(runs[-1] / "outputs" / "test.npz") as file:
        outputs, targets = file["outputs"], file["targets"]
    classes = [*results(runs[-1])["per_class"]]
    places = np.flatnonzero(outputs.argmax(1) != targets)
    first = places[outputs.max(1)[places].argmax()]
    assert (
        cells[1]
        == f"{classes[targets[first]]} taken for {classes[outputs[first].argmax()]} ({outputs[first].max():.0%})"
    )


def test_the_projector_has_the_embeddings_of_the_validation_split(runs, server):
    run = runs[2]
    (tensor,) = server.json("projector/info", run=names(run))["embeddings"]
    size, dimensions = tensor["tensorShape"]
    data = server.get("projector/tensor", run=names(run), name=tensor["tensorName"])
    found = np.frombuffer(data, np.float32).reshape(size, dimensions)
    predictor = load(run)
    predictor.datamodule.setup()
    inputs, targets = predictor.datamodule.tensors("val")
    expected = predictor.module.predict_step((inputs, targets), 0)["embedding"].detach().numpy()
    assert np.allclose(found, expected, atol=1e-5)
    labels = server.get("projector/metadata", run=names(run), name=tensor["tensorName"]).decode().split()
    assert labels == [str(each) for each in targets.tolist()]
    sprite = server.get("projector/sprite_image", run=names(run), name=tensor["tensorName"])
    assert Image.open(io.BytesIO(sprite)).width == 8 * int(np.ceil(size**0.5))


def test_findings_are_text(server):
    (found,) = server.json("text/text", run="findings/a", tag="findings/text_summary")
    assert found["step"] == 120
    text = "<p><strong>warning</strong> overfitting, epoch 7: val/loss rises. <em>stop</em></p>"
    assert text in found["text"]


def test_a_run_without_a_logger_writes_no_events(tmp_path):
    called("run", *DIGITS, "--trainer.max_epochs=1", "--trainer.logger=false", cwd=tmp_path)
    assert not [*tmp_path.rglob("*tfevents*"), *tmp_path.rglob("projector_config.pbtxt")]


def test_a_resumed_run_repeats_no_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    called("fit", *DIGITS, "--trainer.max_epochs=2", cwd=tmp_path)
    called("fit", "--run=runs/digits_mlp/latest", "--trainer.max_epochs=3", "--allow_inexact", cwd=tmp_path)
    (run,) = (path.parent for path in tmp_path.glob("runs/*/*/config.yaml"))
    events = EventAccumulator(str(run)).Reload()
    assert [each.step for each in events.Scalars("Epoch/val/loss")] == [1, 2, 3]


def test_a_fitted_run_shows_its_confusion_matrix_after_run_has_tested_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def pictures(run):
        return EventAccumulator(str(run)).Reload().Tags()["images"]

    called("fit", *DIGITS, "--trainer.max_epochs=1", cwd=tmp_path)
    (run,) = (path.parent for path in tmp_path.glob("runs/*/*/config.yaml"))
    assert pictures(run) == []
    called("run", "--run=runs/digits_mlp/latest", cwd=tmp_path)
    assert pictures(run) == ["test/confusion", "test/errors"]


@pytest.mark.parametrize("separator", ["/", "_"])
def test_the_layout_pairs_train_with_validation(separator):
    tags = [f"train{separator}loss", f"val{separator}loss", f"val{separator}f.1", "lr"]
    charts = chart_layout(tags)["train and validation"]
    assert list(charts) == ["loss", "f.1"]
    matching = {
        name: [tag for tag in tags for each in curves if re.match(each, tag)] for name, (_, curves) in charts.items()
    }
    assert matching == {"loss": tags[:2], "f.1": tags[2:3]}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_draws_the_charts_of_train_against_validation(server, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1300"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000"]
    shot = tmp_path / "shot.png"
    address = f"{server.address}/#custom_scalars"
    subprocess.run([*command, f"--screenshot={shot}", address], check=True, capture_output=True, timeout=300)
    picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The first chart, below the title and right of the list of runs. The axes and the text are grey.
    chart = picture[150:340, 370:730]
    coloured = (chart.max(2) - chart.min(2) > 60).sum()
    assert coloured > 300, base64.b64encode(shot.read_bytes())[:80]
