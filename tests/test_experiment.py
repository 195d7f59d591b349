import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from firstlight import runs
from firstlight.__main__ import main
from firstlight.networks import MLP
from firstlight.schedules import WarmupCosine
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, ROOT, firstlight, logged, newest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four epochs in a folder of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = firstlight("run", "--config", CONFIG, "--trainer.max_epochs=4", cwd=folder)
    return folder, newest(folder), done


def results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "evaluations" not in path.parts}


def test_run_prints_a_short_summary_and_no_warning(finished):
    _, run, done = finished
    assert done.stderr == ""
    assert re.search(r"1,257 train, 270 val, 270 test samples", done.stdout)
    assert re.search(r"160 optimiser steps, 8 of them warm-up", done.stdout)
    assert re.search(r"test/accuracy 0\.9\d+ \(best checkpoint\)", done.stdout)
    assert re.search(rf"runs/digits_mlp/{run.name}\n", done.stdout)
    assert re.search(r"tensorboard --logdir runs/digits_mlp$", done.stdout.strip())
    assert len(done.stdout.splitlines()) <= 8


def test_run_directory_holds_what_the_design_says(finished):
    _, run, _ = finished
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        ".lock",
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "results.json",
    }
    assert sum("tfevents" in name for name in names) == 1


def test_results_name_metrics_best_steps_and_versions(finished):
    _, run, _ = finished
    found = results(run)
    assert found["metrics"].keys() == {"test/loss", "test/accuracy"}
    assert found["best"].keys() == {"epoch", "step", "val/loss", "val/accuracy"}
    assert found["steps"] == 160
    assert found["checkpoint"] == "checkpoints/best.ckpt"
    assert {"python", "firstlight", "torch", "lightning"} <= found["versions"].keys()


def test_best_is_the_best_of_all_validations(finished):
    _, run, _ = finished
    best = results(run)["best"]
    step, value = min(logged(run, "val/loss"), key=lambda pair: pair[1])
    assert (best["step"], best["val/loss"]) == (step + 1, value)


def test_logs_use_the_names_of_the_design(finished):
    _, run, _ = finished
    with (run / "metrics.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    blocks = {"grad_norm/total", "grad_norm/hidden0", "grad_norm/hidden1", "grad_norm/output"}
    assert names == {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "epoch"} | blocks


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_new_process_scores_the_checkpoint_to_the_same_digits(finished, verb):
    folder, run, _ = finished
    before = files(run)
    firstlight(verb, "--run", "runs/digits_mlp/latest", "--ckpt", "best", cwd=folder)
    assert files(run) == before
    (written,) = (run / "evaluations").glob(f"{verb}-*/results.json")
    scored = json.loads(written.read_text())["metrics"]
    if verb == "test":
        assert scored == results(run)["metrics"]
    else:
        assert scored == {name: value for name, value in results(run)["best"].items() if "/" in name}


def test_predictions_agree_with_the_test_accuracy(finished):
    folder, run, _ = finished
    firstlight("predict", "--run", str(run), cwd=folder)
    (written,) = run.glob("evaluations/predict-*/predictions.csv")
    rows = list(csv.DictReader(written.read_text().splitlines()))
    right = sum(row["prediction"] == row["target"] for row in rows) / len(rows)
    assert right == pytest.approx(results(run)["metrics"]["test/accuracy"])
    for row in rows:
        probabilities = {name[-1]: float(value) for name, value in row.items() if name.startswith("probabilities/")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(probabilities, key=probabilities.get) == row["prediction"]
    assert len({int(row["index"]) for row in rows}) == 270


def test_a_checkpoint_of_the_command_line_loads_bare(finished):
    _, run, _ = finished
    task = Classification.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert isinstance(task.network, MLP)
    assert task.schedule == WarmupCosine()
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in task.state_dict().items())


def test_weights_of_another_network_are_refused(finished):
    folder, run, _ = finished
    done = firstlight("test", "--run", str(run), "--model.network.hidden=[7]", cwd=folder, code=2)
    assert "holds the weights of another network" in done.stderr


def test_tensorboard_shows_scalars_and_the_best_beside_the_hyperparameters(finished):
    folder, run, _ = finished
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs/digits_mlp", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tags = poll(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", lambda found: run.name in found)[run.name]
        assert {"train/loss", "val/loss", "grad_norm/total", "lr", "best/val/loss"} <= tags.keys()
        curve = poll(f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run={run.name}&tag=val%2Floss", bool)
        assert [(step, pytest.approx(value)) for _, step, value in curve] == logged(run, "val/loss")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/data/plugin/hparams/experiment", b"{}", {"Content-Type": "application/json"}
        )
        experiment = json.loads(urllib.request.urlopen(request, timeout=30).read())
        shown = {info["name"] for info in experiment["hparamInfos"]}
        assert {"optimizer/lr", "network/hidden", "data/batch_size"} <= shown
        assert "best/val/loss" in {info["name"]["tag"] for info in experiment["metricInfos"]}
    finally:
        server.terminate()
        server.wait(30)


def poll(url, enough):
    deadline = time.monotonic() + 90
    while True:
        try:
            found = json.loads(urllib.request.urlopen(url, timeout=10).read())
            if enough(found):
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{url} did not answer"
        time.sleep(0.5)


def test_a_run_goes_on_where_it_ended_and_moves_once_to_the_new_horizon(tmp_path):
    common = ("--trainer.log_every_n_steps=1", "--without=[early_stopping]")
    firstlight("fit", "--config", CONFIG, "--trainer.max_epochs=2", *common, cwd=tmp_path)
    run = newest(tmp_path)
    before = (run / "metrics.csv").read_bytes()
    done = firstlight("fit", "--run", str(run), "--trainer.max_epochs=3", cwd=tmp_path)
    assert newest(tmp_path) == run
    assert (run / "metrics.csv").read_bytes().startswith(before)
    assert "planned with 80 optimiser steps and now has 120: at step 80" in done.stderr
    rates = [value for _, value in logged(run, "lr")]
    first, then = WarmupCosine(), WarmupCosine(warmup_steps=4)
    expected = [first(step, 80) for step in range(80)] + [then(step, 120) for step in range(80, 120)]
    assert rates == pytest.approx([0.003 * factor for factor in expected])
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert len(list(run.glob("config-until-*.yaml"))) == 1


SCHEDULES = {
    "accumulation": (["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4"], 20),
    "max_steps": (["--trainer.max_steps=23", "--trainer.max_epochs=-1"], 23),
    "limited batches": (["--trainer.max_epochs=3", "--trainer.limit_train_batches=7"], 21),
    "two processes": (["--config", DDP, "--trainer.max_epochs=1"], 20),
}


@pytest.mark.parametrize(("options", "total"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_schedule_follows_the_optimiser_steps_of_the_run(options, total, tmp_path):
    firstlight("fit", "--config", CONFIG, *options, "--trainer.log_every_n_steps=1", cwd=tmp_path)
    rates = logged(newest(tmp_path), "lr")
    assert rates == [(step, pytest.approx(0.003 * WarmupCosine()(step, total))) for step in range(total)]


def test_two_processes_share_one_run_and_test_each_sample_once(tmp_path):
    done = firstlight("run", "--config", CONFIG, "--config", DDP, "--trainer.max_epochs=2", cwd=tmp_path)
    assert done.stderr == ""
    assert len([path for path in (tmp_path / "runs" / "digits_mlp").iterdir() if path.is_dir()]) == 1
    right = results(newest(tmp_path))["metrics"]["test/accuracy"] * 270
    assert right == pytest.approx(round(right), abs=1e-3)
    again = firstlight("test", "--run", "runs/digits_mlp/latest", cwd=tmp_path)
    assert f"{right / 270:.6g}" in again.stdout


def test_two_processes_validate_each_sample_once(tmp_path):
    # 269 samples: one process has one more than the other, and the last batch of one is empty.
    options = ["--trainer.max_epochs=1", "--data.val_fraction=0.1497", "--data.batch_size=67"]
    firstlight("fit", "--config", CONFIG, "--config", DDP, *options, cwd=tmp_path)
    run = newest(tmp_path)
    firstlight("validate", "--run", str(run), cwd=tmp_path)
    (written,) = run.glob("evaluations/validate-*/results.json")
    scored, best = json.loads(written.read_text())["metrics"], results(run)["best"]
    assert scored["val/accuracy"] * 269 == pytest.approx(round(scored["val/accuracy"] * 269))
    assert scored["val/accuracy"] == best["val/accuracy"]
    assert scored["val/loss"] == pytest.approx(best["val/loss"], rel=1e-6)


KILL = """
import os, signal
from lightning.pytorch import Callback


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("overlay", [[], ["--config", DDP]], ids=["one process", "two processes"])
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(overlay, tmp_path):
    (tmp_path / "mine.py").write_text(KILL)
    options = ["--config", CONFIG, *overlay, "--trainer.max_epochs=4", "--trainer.log_every_n_steps=1"]
    firstlight("fit", *options, "--experiment=whole", cwd=tmp_path)
    whole = newest(tmp_path, "whole")
    kill = ["--trainer.callbacks+=mine.Kill", "--trainer.callbacks.step=53", "--experiment=killed"]
    command = [sys.executable, "-m", "firstlight", "fit", *options, *kill]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode != 0
    killed = newest(tmp_path, "killed")
    firstlight("fit", "--run", str(killed), "--trainer.callbacks=null", cwd=tmp_path)
    for name in ("last", "best"):
        ends = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (whole, killed)]
        assert ends[0]["global_step"] == ends[1]["global_step"]
        assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())
        moments = [end["optimizer_states"][0]["state"] for end in ends]
        assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[0])
        assert ends[0]["metrics"] == ends[1]["metrics"]
        assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert dict(logged(killed, "lr")) == dict(logged(whole, "lr"))
    assert dict(logged(killed, "val/loss")) == dict(logged(whole, "val/loss"))


def test_the_same_command_goes_on_when_it_is_told_to_resume(tmp_path):
    command = ["fit", "--config", CONFIG, "--resume"]
    firstlight(*command, "--trainer.max_epochs=1", cwd=tmp_path)
    first = newest(tmp_path)
    done = firstlight(*command, "--trainer.max_epochs=2", "--model.optimizer.lr=0.1", cwd=tmp_path)
    assert newest(tmp_path) == first
    assert results(first)["steps"] == 80
    assert "change model.init_args.optimizer.init_args.lr was 0.003 and is 0.1" in done.stdout
    assert max(value for step, value in logged(first, "lr") if step >= 40) > 0.01
    for option in ("--data.batch_size=16", "--trainer.accumulate_grad_batches=2", "--model.monitor=val/accuracy"):
        done = firstlight(*command, "--trainer.max_epochs=3", option, cwd=tmp_path, code=2)
        assert "the run cannot go on exactly; --inexact" in done.stderr
    done = firstlight(*command, "--trainer.max_epochs=3", "--model.optimizer=torch.optim.Adam", cwd=tmp_path, code=2)
    assert "keeps what torch.optim.AdamW remembers" in done.stderr
    options = ["--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2", "--inexact"]
    done = firstlight(*command, *options, cwd=tmp_path)
    assert "100 optimiser steps" in done.stdout
    assert results(first)["steps"] == 100


def test_a_run_that_was_moved_keeps_its_best(tmp_path):
    firstlight("fit", "--config", CONFIG, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    moved = run.rename(tmp_path / "moved")
    best = results(moved)["best"]
    firstlight("fit", "--run", str(moved), "--trainer.max_epochs=3", "--model.l1=5", cwd=tmp_path)
    assert results(moved)["best"] == best


REFUSE = """
from lightning.pytorch import Callback
from firstlight.errors import UsageError


class Refuse(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 60:
            raise UsageError("no further")
"""


def test_a_fault_in_training_leaves_what_was_trained(tmp_path):
    (tmp_path / "mine.py").write_text(REFUSE)
    firstlight("fit", "--config", CONFIG, "--trainer.callbacks+=mine.Refuse", cwd=tmp_path, code=2)
    assert (newest(tmp_path) / "checkpoints" / "last.ckpt").is_file()


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "firstlight", "fit", "--config", CONFIG, "--trainer.max_epochs=2000"]
    command += [
        "--without=[early_stopping]",
        "--trainer.log_every_n_steps=1",
        "--model.schedule=firstlight.schedules.Constant",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    run = newest(tmp_path)
    step = int(
        re.search(r"interrupted at step ([\d,]+); go on with: firstlight fit --run", printed)[1].replace(",", "")
    )
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    firstlight("fit", "--run", str(run), f"--trainer.max_steps={step + 5}", cwd=tmp_path)
    assert results(run)["steps"] == step + 5


def test_ctrl_c_while_testing_says_how_to_test_again(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\n\nclass Interrupt(Callback):\n"
        "    def on_test_start(self, trainer, pl_module):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    options = ["--trainer.max_epochs=1", "--trainer.callbacks+=mine.Interrupt"]
    done = firstlight("run", "--config", CONFIG, *options, cwd=tmp_path, code=130)
    run = newest(tmp_path)
    assert f"interrupted; go on with: firstlight test --run runs/digits_mlp/{run.name}\n" in done.stdout
    assert results(run)["steps"] == 40


def test_a_finished_run_has_nothing_left_to_do(finished):
    folder, run, _ = finished
    done = firstlight("fit", "--run", str(run), cwd=folder)
    assert "nothing to do: all 160 steps are done" in done.stdout


def test_a_run_is_trained_by_one_process_at_a_time(finished):
    folder, run, _ = finished
    with runs.lock(run):
        done = firstlight("fit", "--run", str(run), "--trainer.max_epochs=9", cwd=folder, code=2)
    assert done.stderr.startswith("firstlight: another process is training")


def test_a_run_that_goes_on_from_before_its_end_says_so(tmp_path):
    firstlight("fit", "--config", CONFIG, "--trainer.max_epochs=1", cwd=tmp_path)
    run = newest(tmp_path)
    firstlight("fit", "--run", str(run), "--trainer.max_epochs=2", "--without=last", cwd=tmp_path)
    done = firstlight("fit", "--run", str(run), "--trainer.max_epochs=3", "--without=[]", cwd=tmp_path)
    assert "resume the checkpoint is of step 40: steps up to 80 are done and logged again" in done.stdout
    done = firstlight("fit", "--run", str(run), "--trainer.max_epochs=2", cwd=tmp_path, code=2)
    assert "the run has done 120 optimiser steps, and only 80 are planned now" in done.stderr


def test_a_class_of_the_users_own_in_the_current_folder_is_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from firstlight.networks import MLP\n\n\nclass Net(MLP):\n"
        "    def __init__(self, width: int) -> None:\n        super().__init__(64, [width], 10)\n"
    )
    script = Path(sys.executable).parent / "firstlight"
    options = ["--model.network=mine.Net", "--model.network.width=5", "--trainer.max_epochs=1"]
    subprocess.run([script, "fit", "--config", CONFIG, *options], cwd=tmp_path, check=True, capture_output=True)
    firstlight("test", "--run", "runs/digits_mlp/latest", cwd=tmp_path)


def test_print_config_is_a_config(tmp_path):
    printed = firstlight("fit", "--config", CONFIG, "--print_config", cwd=tmp_path).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    firstlight("fit", "--config", "printed.yaml", "--trainer.max_steps=3", cwd=tmp_path)
    assert results(newest(tmp_path, "printed"))["steps"] == 3


@pytest.mark.parametrize("verb", ["run", "fit", "validate", "test", "predict"])
def test_every_verb_has_help(verb, capsys):
    from firstlight.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"firstlight {verb}" in printed
    assert "--early_stopping.patience" in printed


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_for_two_batches(config, tmp_path, monkeypatch):
    if str(FASHION) in config.read_text() and not FASHION.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    monkeypatch.chdir(ROOT)  # Paths in the files start there.
    given = ["--config", str(config), "--config", "configs/overlays/debug.yaml", "--runs", str(tmp_path / "runs")]
    assert main(["run", *given]) == 0
    assert results(newest(tmp_path, config.stem))["steps"] == 2


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_runs_on_the_first_experiment(overlay, tmp_path):
    firstlight("run", "--config", CONFIG, "--config", str(overlay), "--trainer.max_epochs=1", cwd=tmp_path)
    assert os.listdir(tmp_path / "runs") == ["digits_mlp"]


def test_a_refused_continuation_leaves_the_run_as_it_was(finished):
    folder, run, _ = finished
    before = {path: text for path, text in files(run).items() if "tfevents" not in path.name}
    changed = ["--model.network.hidden=[7]", "--trainer.max_epochs=5"]
    done = firstlight("fit", "--run", str(run), *changed, cwd=folder, code=2)
    assert "holds the weights of another network" in done.stderr
    assert {path: text for path, text in files(run).items() if "tfevents" not in path.name} == before


def test_what_is_left_out_is_not_replaced_by_lightnings_own(tmp_path):
    options = ["--without=[best,last,progress,early_stopping]", "--trainer.max_epochs=1"]
    assert firstlight("fit", "--config", CONFIG, *options, cwd=tmp_path).stderr == ""
    assert not list(newest(tmp_path).rglob("*.ckpt"))
