import csv
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from firstlight.__main__ import main
from firstlight.networks import MLP
from firstlight.schedules import WarmupCosine
from firstlight.tasks import Classification
from tests.helpers import (
    CONFIG,
    DDP,
    QUICK_CONFIGS,
    ROOT,
    Ranks,
    called,
    files,
    logged,
    newest,
    quick_or_slow,
    results,
)


def test_run_prints_a_short_summary_without_warnings(finished):
    _, run, done = finished
    assert [line for line in done.stderr.splitlines() if not line.startswith("epoch ")] == []
    assert re.search(r"1,257 train, 270 val, 270 test samples", done.stdout)
    assert re.search(r"160 optimiser steps, 8 of them warm-up", done.stdout)
    (best,) = re.findall(r"best   .*", done.stdout)
    names = "epoch", "step", "val/loss", "val/accuracy", "val/auroc", "val/balanced_accuracy"
    assert [each.split()[0] for each in best.removeprefix("best   ").split(", ")] == [*names]
    assert re.search(r"test/accuracy 0\.9\d+, .* \(best checkpoint\)", done.stdout)
    assert re.search(rf"runs/digits_mlp/{run.name}\n", done.stdout)
    assert re.search(r"tensorboard --logdir runs/digits_mlp  # http://\S+$", done.stdout.strip())
    assert len(done.stdout.splitlines()) <= 8


def test_run_directory_holds_the_documented_files(finished):
    _, run, _ = finished
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        ".lock",
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "outputs/examples.json",
        "outputs/test.npz",
        "outputs/val.npz",
        "report.html",
        "results.json",
    }
    assert any("tfevents" in name for name in names)


def test_results_name_metrics_best_steps_and_versions(finished):
    _, run, _ = finished
    found = results(run)
    names = {"loss", "accuracy", "balanced_accuracy", "f1", "auroc", "log_loss"}
    assert found["metrics"].keys() == {f"test/{name}" for name in names}
    assert found["best"].keys() == {"epoch", "step", *(f"val/{name}" for name in names)}
    assert found["per_class"].keys() == set(map(str, range(10)))
    assert found["steps"] == 160
    assert found["fast_loop"] is True
    assert found["checkpoint"] == "checkpoints/best.ckpt"
    assert {"python", "firstlight", "torch", "lightning"} <= found["versions"].keys()


def test_run_without_the_fast_loop_prints_and_writes_the_reason(tmp_path):
    options = ["--trainer.profiler=simple", "--trainer.max_steps=2", "--disable=progress"]
    done = called("fit", "--config", CONFIG, *options, cwd=tmp_path)
    assert done.stdout.count("loop   the fast loop is off, so steps take longer: a profiler is on\n") == 1
    assert results(newest(tmp_path))["fast_loop"] == "a profiler is on"


def test_best_is_the_best_of_all_validations(finished):
    _, run, _ = finished
    best = results(run)["best"]
    step, value = min(logged(run, "val/loss"), key=lambda pair: pair[1])
    assert (best["step"], best["val/loss"]) == (step + 1, value)


def test_logs_use_the_documented_names(finished):
    _, run, _ = finished
    with (run / "metrics.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    blocks = {"grad_norm/total", "grad_norm/hidden0", "grad_norm/hidden1", "grad_norm/output"}
    of_split = {f"val/{name}" for name in ("balanced_accuracy", "f1", "auroc", "log_loss")}
    logged = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "epoch"}
    # Of layers and for findings, docs/record.md names them.
    record = ("activation/", "gradient/", "update/", "fixed/", "seconds/", "initial/", "val/class_share/", "clipped")
    assert {name for name in names if not name.startswith(record)} == logged | of_split | blocks


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_checkpoint_evaluates_to_the_same_digits_in_a_new_process(finished, verb):
    folder, run, _ = finished
    before = files(run)
    Ranks(main, [verb, "--run", "runs/digits_mlp/latest", "--ckpt", "best"], cwd=folder).succeed()
    assert files(run) == before
    (written,) = (run / "evaluations").glob(f"{verb}-*/results.json")
    evaluated = json.loads(written.read_text())["metrics"]
    if verb == "test":
        assert evaluated == results(run)["metrics"]
    else:
        assert evaluated == {name: value for name, value in results(run)["best"].items() if "/" in name}


def test_predictions_agree_with_the_test_accuracy(finished):
    folder, run, _ = finished
    called("predict", "--run", str(run), cwd=folder)
    (written,) = run.glob("evaluations/predict-*/predictions.csv")
    rows = list(csv.DictReader(written.read_text().splitlines()))
    right = sum(row["prediction"] == row["target"] for row in rows) / len(rows)
    assert right == pytest.approx(results(run)["metrics"]["test/accuracy"])
    for row in rows:
        probabilities = {name[-1]: float(value) for name, value in row.items() if name.startswith("probabilities/")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(probabilities, key=probabilities.get) == row["prediction"]
    assert len({int(row["index"]) for row in rows}) == 270


def test_checkpoint_of_the_command_line_loads_without_further_arguments(finished):
    _, run, _ = finished
    task = Classification.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert isinstance(task.network, MLP)
    assert task.optimization.schedule == WarmupCosine()
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in task.state_dict().items())


def test_checkpoint_with_weights_of_another_network_is_refused(finished):
    folder, run, _ = finished
    done = called("test", "--run", str(run), "--model.network.hidden=[7]", cwd=folder, code=2)
    assert "holds the weights of another network" in done.stderr


def test_two_processes_share_one_run_and_test_each_sample_once(tmp_path):
    options = ["--config", CONFIG, "--config", DDP, "--trainer.max_epochs=2", "--report=false"]
    done = Ranks(main, ["run", *options], cwd=tmp_path, ranks=2).succeed()
    assert [line for line in done.stderr.splitlines() if not line.startswith("epoch ")] == []
    assert len([path for path in (tmp_path / "runs" / "digits_mlp").iterdir() if path.is_dir()]) == 1
    right = results(newest(tmp_path))["metrics"]["test/accuracy"] * 270
    assert right == pytest.approx(round(right), abs=1e-3)
    again = called("test", "--run", "runs/digits_mlp/latest", cwd=tmp_path)
    assert f"{right / 270:.6g}" in again.stdout


def test_two_processes_validate_each_sample_once(tmp_path):
    # 269 samples: one process has one sample more, and the last batch of the other is empty.
    options = ["--trainer.max_epochs=1", "--data.val_fraction=0.1497", "--data.batch_size=67"]
    Ranks(main, ["fit", "--config", CONFIG, "--config", DDP, *options], cwd=tmp_path, ranks=2).succeed()
    run = newest(tmp_path)
    called("validate", "--run", str(run), cwd=tmp_path)
    (written,) = run.glob("evaluations/validate-*/results.json")
    evaluated, best = json.loads(written.read_text())["metrics"], results(run)["best"]
    assert evaluated["val/accuracy"] * 269 == pytest.approx(round(evaluated["val/accuracy"] * 269))
    assert evaluated["val/accuracy"] == best["val/accuracy"]
    assert evaluated["val/loss"] == pytest.approx(best["val/loss"], rel=1e-6)


def test_user_class_in_the_current_folder_is_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from firstlight.networks import MLP\n\n\nclass Net(MLP):\n"
        "    def __init__(self, width: int) -> None:\n        super().__init__(64, [width], 10)\n"
    )
    script = Path(sys.executable).parent / "firstlight"
    options = ["--model.network=mine.Net", "--model.network.width=5", "--trainer.max_epochs=1"]
    command = [script, "fit", "--config", CONFIG, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("epoch ")] == []
    called("test", "--run", "runs/digits_mlp/latest", cwd=tmp_path)


def test_printed_config_can_be_used_as_a_config(tmp_path):
    printed = called("fit", "--config", CONFIG, "--print_config", cwd=tmp_path).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    called("fit", "--config", "printed.yaml", "--trainer.max_steps=3", cwd=tmp_path)
    assert results(newest(tmp_path, "printed"))["steps"] == 3


BROKEN = """
from lightning.pytorch import Callback

class Broken(Callback):
    def on_train_start(self, *_):
        raise ZeroDivisionError

class Interrupted(Callback):
    def on_train_start(self, *_):
        raise KeyboardInterrupt
"""


@pytest.mark.parametrize("name", ["Broken", "Interrupted"])
def test_a_run_that_ends_before_its_first_step_leaves_no_directory(name, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    fit = ["fit", "--config", CONFIG, "--trainer.max_steps=1", "--disable=progress"]
    called(*fit, cwd=tmp_path)
    run = newest(tmp_path)
    with pytest.raises(ZeroDivisionError) if name == "Broken" else nullcontext():
        called(*fit, f"--trainer.callbacks+=broken.{name}", cwd=tmp_path, code=130)
    assert newest(tmp_path) == run
    assert [each for each in run.parent.iterdir() if each.is_dir()] == [run]


def test_a_plan_without_an_end_is_told_as_one(tmp_path):
    endless = ["--trainer.max_epochs=-1", "--model.schedule=firstlight.schedules.Constant"]
    limits = ["--trainer.max_time=00:00:00:01", "--trainer.log_every_n_steps=0"]
    printed = called("fit", "--config", CONFIG, *endless, *limits, cwd=tmp_path).stdout
    assert "parameters, no limit of optimiser steps" in printed and " inf " not in printed


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Tests of two processes run that overlay.
OVERLAYS = sorted(path for path in (ROOT / "configs" / "overlays").glob("*.yaml") if str(path) != DDP)


@pytest.mark.parametrize(
    "config",
    quick_or_slow(CONFIGS, QUICK_CONFIGS),
    ids=lambda path: path.stem,
)
def test_every_config_runs_for_two_batches(config, tmp_path, monkeypatch):
    if str(FASHION) in config.read_text() and not FASHION.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    monkeypatch.chdir(ROOT)  # Paths in the files start there.
    given = ["--config", str(config), "--config", "configs/overlays/debug.yaml", "--runs", str(tmp_path / "runs")]
    assert main(["run", *given]) == 0
    assert results(newest(tmp_path, config.stem))["steps"] == 2


# The overlay for a GPU compiles the network, which takes long.
@pytest.mark.parametrize(
    "overlay", quick_or_slow(OVERLAYS, [each for each in OVERLAYS if each.stem != "gpu"]), ids=lambda path: path.stem
)
def test_every_overlay_runs_on_the_first_experiment(overlay, tmp_path):
    called("run", "--config", CONFIG, "--config", str(overlay), "--trainer.max_epochs=1", cwd=tmp_path)
    assert os.listdir(tmp_path / "runs") == ["digits_mlp"]


def test_fused_optimiser_clips_in_bfloat16(tmp_path):
    config, overlays = str(ROOT / "configs" / "corpus_lm.yaml"), ROOT / "configs" / "overlays"
    given = ["--config", config, "--config", str(overlays / "debug.yaml"), "--config", str(overlays / "gpu.yaml")]
    options = [
        "--trainer.callbacks.backend=eager",
        "--trainer.gradient_clip_val=1e-3",
        "--data.path=" + str(ROOT / "README.md"),
    ]
    for clips in (["--trainer.gradient_clip_algorithm=norm"], ["--trainer.gradient_clip_algorithm=value"]):
        assert called("fit", *given, *options, *clips, cwd=tmp_path).stdout.count("epoch, 2 steps") == 1


def test_disabled_callbacks_are_not_replaced_by_those_of_lightning(tmp_path):
    options = ["--disable=[best,last,progress,early_stopping]", "--trainer.max_epochs=1"]
    assert called("fit", "--config", CONFIG, *options, cwd=tmp_path).stderr == ""
    assert not list(newest(tmp_path).rglob("*.ckpt"))
