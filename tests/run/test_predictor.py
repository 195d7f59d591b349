"""`firstlight.load` predicts in a program what `firstlight predict` writes, from raw inputs."""

import csv
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from lightning.pytorch import Trainer

import firstlight
from firstlight.checkpoints.io import AtomicCheckpointIO, read
from firstlight.data import BreastCancer, Diabetes, Digits, Tensors
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.run.predictor import Predictor
from firstlight.schedules import Constant
from firstlight.tasks import BinaryClassification, Classification
from tests.helpers import ROOT, called, newest, quick_or_slow

DATA = ROOT / "configs" / "data"


def frame(name):
    return pandas.read_csv(DATA / name, dtype=str, keep_default_na=False)


RAW = {
    "wine": lambda: frame("wine.csv"),
    "bicycles": lambda: frame("bicycles.csv").to_dict("records"),
    "topics": lambda: frame("topics.csv"),
    "letters": lambda: frame("letters.csv")["name"].tolist(),
    "breast_cancer": lambda: BreastCancer().load().inputs,
    "diabetes": lambda: pandas.DataFrame(Diabetes().load().inputs, columns=Diabetes().load().columns[:-1]),
    "digits_convnet": lambda: torch.from_numpy(Digits().load().inputs),
}
"""By name of the configuration, the raw inputs of all samples."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains a configuration for a moment and returns its folder and its run."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("configs", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)

    def run(name):
        if not (folder / "runs" / name).exists():
            few = [
                "--report=false",
                "--trainer.max_epochs=1",
                "--trainer.limit_train_batches=4",
                "--trainer.log_every_n_steps=1",
            ]
            called("run", "--config", f"configs/{name}.yaml", *few, cwd=folder)
        return newest(folder, name)

    return run


def written(run, *options):
    """Return `predictions.csv` of `firstlight predict` as rows of text."""
    printed = called("predict", "--run", str(run), *options, cwd=run.parents[2]).stdout
    with open(run.parents[2] / printed.split("wrote ")[1].strip(), newline="") as file:
        return list(csv.DictReader(file))


def taken(raw, rows):
    if isinstance(raw, pandas.DataFrame):
        return raw.iloc[rows]
    return [raw[row] for row in rows] if isinstance(raw, list) else raw[rows]


def assert_equal(predicted, rows):
    """Compare predictions with the rows of predictions.csv, to the last digit."""
    assert len(predicted) == len(rows)
    names = [name for name in rows[0] if name != "index" and not name.startswith("target")]
    assert [*predicted.columns] == names
    for name in names:
        assert [str(value) for value in predicted[name].tolist()] == [row[name] for row in rows]


@pytest.mark.parametrize("name", quick_or_slow(RAW, {"wine", "letters", "diabetes", "digits_convnet"}))
def test_predictions_of_raw_inputs_equal_those_of_the_command_line(name, runs, monkeypatch):
    run = runs(name)
    rows = written(run)
    monkeypatch.setattr(Trainer, "__init__", None)  # No trainer is made.
    inputs = taken(RAW[name](), [int(row["index"]) for row in rows])
    for path in (run, run / "checkpoints" / "best.ckpt"):
        assert_equal(firstlight.load(path).predict(inputs), rows)


@pytest.mark.parametrize(("name", "file"), [("wine", "wine.csv"), ("letters", "letters.csv")])
def test_predictions_of_a_file_equal_those_of_the_command_line(name, file, runs, tmp_path):
    lines = (DATA / file).read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([lines[0], *lines[:0:-1][:70]]) + "\n")
    rows = written(runs(name), "--data.path", str(tmp_path / "new.csv"))
    assert_equal(firstlight.load(runs(name)).predict(tmp_path / "new.csv"), rows)


def test_language_model_scores_texts(runs, tmp_path):
    run = runs("corpus_lm")
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "new.txt").write_text(text)
    rows = written(run, "--data.path", str(tmp_path / "new.txt"))
    predictor = firstlight.load(run)
    assert_equal(predictor.predict(tmp_path / "new.txt"), rows)
    assert_equal(predictor.predict([text]), rows)


def test_precision_of_the_run_is_kept(runs, tmp_path):
    shutil.copytree(runs("digits_convnet"), tmp_path / "a" / "b" / "run")
    run = tmp_path / "a" / "b" / "run"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  precision: null\n", "  precision: bf16-mixed\n"))
    rows = written(run)
    raw = taken(RAW["digits_convnet"](), [int(row["index"]) for row in rows])
    assert_equal(firstlight.load(run).predict(raw), rows)
    assert not firstlight.load(runs("digits_convnet")).predict(raw).equals(firstlight.load(run).predict(raw))


def test_threads_get_the_predictions_of_one(runs):
    predictor, table = firstlight.load(runs("bicycles")), RAW["bicycles"]()
    parts = [table[start : start + 7] for start in range(0, 70, 7)]
    expected = [predictor.predict(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for one, other in zip(expected, pool.map(predictor.predict, parts), strict=True):
                pandas.testing.assert_frame_equal(one, other, check_exact=True)


def test_index_of_a_frame_is_kept_and_targets_are_not_needed(runs):
    table = RAW["wine"]().iloc[5:9].set_index(pandas.Index(["a", "b", "c", "d"]))
    predictor = firstlight.load(runs("wine"))
    predicted = predictor.predict(table)
    assert [*predicted.index] == [*"abcd"]
    assert predictor.predict(table.drop(columns="grape")).equals(predicted)
    assert predictor.predict(table.assign(grape="no class")).equals(predicted)


def test_images_may_have_their_channels_last_or_none(runs):
    images, predictor = Digits().load().inputs[:9], firstlight.load(runs("digits_convnet"))
    for same in (np.moveaxis(images, 1, -1), images[:, 0], images[:, 0].astype(int), torch.from_numpy(images)):
        assert predictor.predict(same).equals(predictor.predict(images))


def test_a_file_of_arrays_needs_no_targets(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (90, 4, 5, 3), np.uint8)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", np.arange(90) % 3)
    np.save(tmp_path / "new.npy", images[:7])
    config = ROOT / "configs" / "digits_convnet.yaml"
    data = ["--data=firstlight.data.Arrays", "--data.path=x.npy", "--data.targets_path=y.npy"]
    sizes = ["--model.classes=3", "--model.network.in_channels=3", "--model.network.out_features=3"]
    few = ["--report=false", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    called("run", "--config", str(config), *data, *sizes, *few, cwd=tmp_path)
    run = newest(tmp_path, "digits_convnet")
    rows = written(run, "--data.path=new.npy", "--data.targets_path=null")
    with chdir(tmp_path):
        for path in (run, run / "checkpoints" / "best.ckpt"):
            for raw in ("new.npy", images[:7]):
                assert_equal(firstlight.load(path).predict(raw), rows)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("wine", np.zeros((3, 13)), "takes a DataFrame, a list of dicts or a path, not a ndarray of shape (3, 13)"),
        ("wine", [{"alcohol": 1.0}], "the input has no column"),
        ("wine", [], "a list"),
        ("breast_cancer", np.zeros((3, 29)), "have the shape (3, 29): they must be (N, 30)"),
        ("digits_convnet", np.zeros((3, 1, 8, 9), np.uint8), "have the shape (3, 1, 8, 9): they must be (N, 1, 8, 8)"),
        ("digits_convnet", np.zeros((3, 1, 8, 8)), "the network was trained on integers from 0 to 255"),
        ("digits_convnet", np.full((3, 1, 8, 8), 256), "the network was trained on integers from 0 to 255"),
        ("digits_convnet", "new.png", "Digits reads no file"),
        ("letters", [1, 2], "must be a list of texts"),
        ("letters", [{"text": "a"}], "no column name; available: text"),
        ("letters", [{"name": None}], "row 0 column name is not a text"),
    ],
)
def test_raw_inputs_of_another_kind_are_refused(name, raw, message, runs):
    with pytest.raises(UsageError) as refused:
        firstlight.load(runs(name)).predict(raw)
    assert message in str(refused.value)


def test_gaps_are_handled_as_in_training(runs):
    rows = RAW["wine"]().to_dict("records")[:4]
    rows[2]["alcohol"] = None
    with pytest.raises(UsageError, match="line 4 column alcohol"):
        firstlight.load(runs("wine")).predict(rows)
    predictor = firstlight.load(runs("wine"))
    predictor.datamodule.missing = "drop"
    assert [*predictor.predict(rows).index] == [0, 1, 3]


def test_import_is_light():
    code = "import firstlight, sys; firstlight.load; print({'torch', 'pandas', 'lightning'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("which", ["best", "last"])
def test_which_chooses_the_checkpoint_of_a_run(which, runs):
    run = runs("wine")
    weights = read(run / "checkpoints" / f"{which}.ckpt")["state_dict"]
    found = firstlight.load(run, which).module.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in weights.items())
    with pytest.raises(UsageError, match="leave it out"):
        firstlight.load(run / "checkpoints" / "best.ckpt", which)


def test_missing_runs_and_checkpoints_are_named(runs, tmp_path):
    for path, message in (("a.ckpt", "there is no checkpoint"), ("runs/a", "there is no run"), (".", "is not a run")):
        with chdir(tmp_path), pytest.raises(UsageError, match=message):
            firstlight.load(path)
    with pytest.raises(UsageError, match="has no final checkpoint"):
        firstlight.load(runs("wine"), "final")
    with pytest.raises(UsageError, match="are trusted"):
        firstlight.load(runs("wine"), trust=["my_project"])


def test_a_checkpoint_runs_no_code_and_opens_no_file(runs, tmp_path):
    """The data module gets no location from the checkpoint, and classes are judged before they are imported."""
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('canary').touch()\nclass Net: pass\n")
    checkpoint = read(runs("wine") / "checkpoints" / "best.ckpt")
    changes = {
        "names evil.Net": lambda kept: kept["hyper_parameters"]["network"].update(class_path="evil.Net"),
        "a location": lambda kept: kept["datamodule_hyper_parameters"].update(path="/etc/passwd"),
        "names evil.Data": lambda kept: kept["datamodule_hyper_parameters"].update(_class_path="evil.Data"),
    }
    for message, change in changes.items():
        crafted = {**checkpoint, **{name: dict(checkpoint[name]) for name in checkpoint if name.endswith("parameters")}}
        crafted["hyper_parameters"]["network"] = dict(crafted["hyper_parameters"]["network"])
        change(crafted)
        AtomicCheckpointIO().save_checkpoint(crafted, tmp_path / "a.ckpt")
        with chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            with pytest.raises(UsageError, match=message):
                firstlight.load("a.ckpt")
    assert not (tmp_path / "canary").exists()


def test_own_classes_of_a_checkpoint_must_be_trusted(runs, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from firstlight.networks import MLP\nclass Mine(MLP):\n"
        "    def __init__(self, in_features: int, hidden: list[int], out_features: int):\n"
        "        super().__init__(in_features, hidden, out_features)\n"
    )
    few = ["--report=false", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--model.network=my_nets.Mine"]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    called("run", "--config", "configs/wine.yaml", *few, cwd=tmp_path)
    run, table = newest(tmp_path, "wine"), RAW["wine"]()
    with chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        expected = firstlight.load(run).predict(table)
        with pytest.raises(UsageError, match="if you trust my_nets"):
            firstlight.load(run / "checkpoints" / "best.ckpt")
        assert firstlight.load(run / "checkpoints" / "best.ckpt", trust="my_nets").predict(table).equals(expected)
        sys.modules.pop("my_nets")


def test_predictor_of_a_program(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.normal(50, 9, (200, 3))
    data = Tensors(inputs, inputs[:, 0] > 50)
    parts = torch.nn.BCEWithLogitsLoss(), partial(torch.optim.AdamW, lr=0.03), Constant()
    task = BinaryClassification(MLP(3, [8], 1), *parts)
    trainer = Trainer(
        max_epochs=20, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(task, data)
    predicted = Predictor(task, data, "cpu").predict(inputs)
    assert (predicted["prediction"] == np.where(inputs[:, 0] > 50, "True", "False")).mean() > 0.95
    with pytest.raises(UsageError, match="was not fitted"):
        Predictor(task, Tensors(inputs, inputs[:, 0] > 50))


def test_a_task_loaded_alone_refuses_inputs_unless_they_are_prepared(runs):
    path = runs("breast_cancer") / "checkpoints" / "best.ckpt"
    data = BreastCancer()
    data.setup()
    prepared, targets = data.tensors("test")
    task = BinaryClassification.load_from_checkpoint(path).eval()
    for call in (lambda: task(prepared), lambda: task.predict_step((prepared, targets), 0)):
        with pytest.raises(UsageError, match="loaded without the BreastCancer that prepares its inputs"):
            call()
    given = BinaryClassification.load_from_checkpoint(path, prepared_inputs=True).eval()
    alone = given.predict_step((prepared, targets), 0)["probabilities"][:, 1].tolist()
    rows = data.rows("test").tolist()
    whole = firstlight.load(path).predict(data.load().inputs[rows])["probabilities/benign"].tolist()
    assert alone == pytest.approx(whole, abs=1e-6)


def test_a_loaded_task_trains_on_and_predicts_with_a_trainer(runs):
    task = Classification.load_from_checkpoint(runs("digits_convnet") / "checkpoints" / "best.ckpt")
    trainer = Trainer(
        max_epochs=1, limit_train_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(task, Digits())


@pytest.mark.slow
def test_image_files_are_decoded_as_in_training(runs, tmp_path):
    run = runs("image_folder")
    files = sorted((DATA / "patterns").rglob("*.png"))[::9] or sorted(DATA.glob("patterns/*/*"))[::9]
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / f"{number:02}{file.suffix}")
    copies = sorted(tmp_path.iterdir())
    rows = written(run, "--data.path", str(tmp_path))
    predictor = firstlight.load(run)
    named = predictor.predict(tmp_path)
    assert [*named.index] == [file.name for file in copies] == [row.pop("file") for row in rows]
    for raw in (tmp_path, copies, [str(file) for file in copies], [file.read_bytes() for file in copies]):
        assert_equal(predictor.predict(raw), rows)
    (tmp_path / "00.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"00\.png cannot be read: not an image"):
        predictor.predict([tmp_path / "00.png"])
    with pytest.raises(UsageError, match="image 0 cannot be read: empty file"):
        predictor.predict([b""])


def test_a_device_that_is_not_there_is_told(runs):
    with pytest.raises(UsageError, match=r"device=cuda cannot be used: .*; device='cpu' always can"):
        firstlight.load(runs("wine"), device="cuda")


def test_batches_are_those_of_the_command_line(runs, monkeypatch):
    """The last digits of a matrix product may depend on the number of its rows."""
    predictor, sizes = firstlight.load(runs("wine")), []
    step = predictor.module.predict_step
    monkeypatch.setattr(
        predictor.module, "predict_step", lambda batch, i: sizes.append(len(batch[0])) or step(batch, i)
    )
    predictor.predict(RAW["wine"]().iloc[:35])
    assert sizes == [16, 16, 3]
