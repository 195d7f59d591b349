import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from firstlight.__main__ import main
from firstlight.run import directory
from firstlight.schedules import WarmupCosine
from tests.helpers import CONFIG, DDP, Ranks, called, files, logged, newest, quick_or_slow, results


def test_resumed_run_moves_its_schedule_once_to_the_new_length(tmp_path):
    common = ("--trainer.log_every_n_steps=1", "--disable=[early_stopping]")
    called("fit", "--config", CONFIG, "--trainer.max_epochs=2", *common, cwd=tmp_path)
    run = newest(tmp_path)
    before = (run / "metrics.csv").read_bytes()
    resumed = Ranks(main, ["fit", "--run", str(run), "--trainer.max_epochs=3"], cwd=tmp_path).succeed()
    assert newest(tmp_path) == run
    assert (run / "metrics.csv").read_bytes().startswith(before)
    assert "the plan changes from 80 to 120 optimiser steps: at step 80" in resumed.stderr
    rates = [value for _, value in logged(run, "lr")]
    first, then = WarmupCosine(), WarmupCosine(warmup_steps=4)
    expected = [first(step, 80) for step in range(80)] + [then(step, 120) for step in range(80, 120)]
    assert rates == pytest.approx([0.003 * factor for factor in expected])
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert len(list(run.glob("config-until-*.yaml"))) == 1


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


def test_run_killed_at_the_end_of_an_epoch_with_a_limit_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    (tmp_path / "mine.py").write_text(KILL)
    options = ["--config", CONFIG, "--trainer.limit_train_batches=10", "--trainer.max_epochs=4"]
    options += ["--trainer.log_every_n_steps=1", "--last.every_n_steps=7", "--last.min_seconds=0"]
    called("fit", *options, "--experiment=whole", cwd=tmp_path)
    whole = newest(tmp_path, "whole")
    kill = ["--trainer.callbacks+=mine.Kill", "--trainer.callbacks.step=21", "--experiment=killed"]
    assert Ranks(main, ["fit", *options, *kill], cwd=tmp_path).wait() == [-9]
    killed = newest(tmp_path, "killed")
    assert torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20
    called("fit", "--run", str(killed), "--trainer.callbacks=null", cwd=tmp_path)
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


FOREIGN = """
import os, random, signal
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 48
    def __getitem__(self, index):
        return torch.full((3,), float(index)) / 48 + random.random() / 10

class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=4, shuffle=True)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.average = torch.nn.Linear(3, 1), torch.zeros(1, 3)
    def training_step(self, batch, batch_idx):
        self.average = self.average.lerp(self.net.weight.detach(), 0.1)
        return (self.net(batch) - batch.sum(1, keepdim=True) * (1 + self.average.sum())).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

class Stop(Callback):
    def __init__(self, step: int):
        self.step = step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_foreign_loader_on_two_processes_stopped_within_an_epoch_resumes_with_the_same_bits(tmp_path):
    (tmp_path / "mine.py").write_text(FOREIGN)
    parts = ["--model=mine.Net", "--data=mine.Data", "--trainer.max_epochs=3", "--last.min_seconds=0"]
    options = ["fit", *parts, "--config", DDP]
    Ranks(main, [*options, "--experiment=whole"], cwd=tmp_path, ranks=2).succeed()
    stop = ["--experiment=stopped", "--trainer.callbacks+=mine.Stop", "--trainer.callbacks.step=8"]
    assert Ranks(main, [*options, *stop], cwd=tmp_path, ranks=2).wait() == [143, 143]
    stopped = newest(tmp_path, "stopped")
    progress = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert 0 < progress["epoch_loop.batch_progress"]["current"]["ready"] < 6  # Each process has six batches.
    Ranks(main, ["fit", "--run", str(stopped), "--trainer.callbacks=null"], cwd=tmp_path, ranks=2).succeed()
    ends = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (newest(tmp_path, "whole"), stopped)
    ]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


def test_same_command_with_resume_adds_a_callback_once(tmp_path):
    timer = ["--trainer.callbacks+=lightning.pytorch.callbacks.Timer", "--trainer.callbacks.duration=01:00:00:00"]
    for _ in range(2):
        done = called("fit", "--config", CONFIG, *timer, "--trainer.max_epochs=1", "--resume", cwd=tmp_path)
    assert "change " not in done.stdout
    callbacks = yaml.safe_load((newest(tmp_path) / "config.yaml").read_text())["trainer"]["callbacks"]
    assert [each["class_path"].rpartition(".")[2] for each in callbacks] == ["Timer"]


def test_same_command_with_resume_resumes_and_prints_changed_options(tmp_path):
    command = ["fit", "--config", CONFIG, "--resume"]
    called(*command, "--trainer.max_epochs=1", cwd=tmp_path)
    first = newest(tmp_path)
    done = called(*command, "--trainer.max_epochs=2", "--model.optimizer.lr=0.1", cwd=tmp_path)
    assert newest(tmp_path) == first
    assert results(first)["steps"] == 80
    assert "change model.init_args.optimizer.init_args.lr: 0.003 -> 0.1" in done.stdout
    assert max(value for step, value in logged(first, "lr") if step >= 40) > 0.01
    for option in ("--data.batch_size=16", "--trainer.accumulate_grad_batches=2", "--model.monitor=val/accuracy"):
        done = called(*command, "--trainer.max_epochs=3", option, cwd=tmp_path, code=2)
        assert "breaks exact resume: keep the saved value, or resume with --allow_inexact" in done.stderr
    done = called(*command, "--trainer.max_epochs=3", "--model.optimizer=torch.optim.Adam", cwd=tmp_path, code=2)
    assert "cannot resume with another optimizer (was torch.optim.AdamW, now torch.optim.Adam)" in done.stderr
    options = ["--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2", "--allow_inexact"]
    done = called(*command, *options, cwd=tmp_path)
    assert "100 optimiser steps" in done.stdout
    assert results(first)["steps"] == 100


def test_moved_run_keeps_its_best_checkpoint(tmp_path):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    moved = run.rename(tmp_path / "moved")
    best = results(moved)["best"]
    called("fit", "--run", str(moved), "--trainer.max_epochs=3", "--model.l1=5", cwd=tmp_path)
    assert results(moved)["best"] == best


REFUSE = """
from lightning.pytorch import Callback
from firstlight.errors import UsageError


class Refuse(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 60:
            raise UsageError("no further")
"""


def test_error_in_training_keeps_the_last_checkpoint(tmp_path):
    (tmp_path / "mine.py").write_text(REFUSE)
    called("fit", "--config", CONFIG, "--trainer.callbacks+=mine.Refuse", cwd=tmp_path, code=2)
    assert (newest(tmp_path) / "checkpoints" / "last.ckpt").is_file()


def test_ctrl_c_leaves_a_checkpoint_and_prints_how_to_resume(tmp_path):
    command = [sys.executable, "-m", "firstlight", "fit", "--config", CONFIG, "--trainer.max_epochs=2000"]
    command += [
        "--disable=[early_stopping]",
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
        re.search(r"interrupted at step ([\d,]+); resume with: firstlight fit --run", printed)[1].replace(",", "")
    )
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    called("fit", "--run", str(run), f"--trainer.max_steps={step + 5}", cwd=tmp_path)
    assert results(run)["steps"] == step + 5


def test_ctrl_c_in_a_test_prints_how_to_test_again(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\n\nclass Interrupt(Callback):\n"
        "    def on_test_start(self, trainer, pl_module):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    options = ["--trainer.max_epochs=1", "--trainer.callbacks+=mine.Interrupt"]
    interrupted = Ranks(main, ["run", "--config", CONFIG, *options], cwd=tmp_path)
    assert interrupted.wait() == [130]
    run, printed = newest(tmp_path), interrupted.stdout
    assert f"interrupted; run again with: firstlight test --run runs/digits_mlp/{run.name}\n" in printed
    assert results(run)["steps"] == 40


def test_refused_run_leaves_no_directory_and_latest_names_the_run_before(finished):
    folder, run, _ = finished
    before = files(folder / "runs")
    # Refused before, and after, the run directory is created.
    for option in ("--trainer.max_epochs=0", "--model.schedule.warmup_steps=9999", "--trainer.limit_val_batches=0"):
        called("fit", "--config", CONFIG, option, cwd=folder, code=2)
        assert files(folder / "runs") == before
        assert newest(folder) == run


def test_finished_run_has_nothing_to_do(finished):
    folder, run, _ = finished
    done = called("fit", "--run", str(run), cwd=folder)
    assert "nothing to do: all 160 steps are done" in done.stdout


def test_run_that_stopped_early_stays_stopped_and_is_tested_if_it_was_not(tmp_path):
    options = ["--trainer.max_epochs=60", "--early_stopping.patience=1", "--model.optimizer.lr=0.05"]
    done = called("fit", "--config", CONFIG, *options, cwd=tmp_path)
    assert "stopped early" in done.stdout
    run = newest(tmp_path)
    before = files(run)
    steps = results(run)["steps"]
    done = called("fit", "--run", str(run), cwd=tmp_path)
    assert (
        f"nothing to do: stopped early after {steps:,} steps; increase --early_stopping.patience to continue"
        in done.stdout
    )
    after = files(run)
    assert all(after[path] == before[path] for path in before if path.suffix in (".ckpt", ".csv", ".json", ".yaml"))
    for is_killed in (False, True):  # before it was tested
        if is_killed:
            (run / "results.json").unlink()
        called("run", "--run", str(run), cwd=tmp_path)
        assert results(run)["steps"] == steps and "test/loss" in results(run)["metrics"]
    before = files(run)
    called("run", "--run", str(run), cwd=tmp_path)
    assert files(run)[run / "results.json"] == before[run / "results.json"]
    called("fit", "--run", str(run), "--early_stopping.patience=30", "--trainer.max_epochs=61", cwd=tmp_path)
    assert results(run)["steps"] > steps


def test_run_is_trained_by_one_command_at_a_time(finished):
    folder, run, _ = finished
    with directory.lock(run):
        done = called("fit", "--run", str(run), "--trainer.max_epochs=9", cwd=folder, code=2)
    assert done.stderr.startswith("firstlight: another process is training")


def test_run_resumed_before_its_last_step_prints_the_repeated_steps(tmp_path):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=1", cwd=tmp_path)
    run = newest(tmp_path)
    called("fit", "--run", str(run), "--trainer.max_epochs=2", "--disable=last", cwd=tmp_path)
    done = called("fit", "--run", str(run), "--trainer.max_epochs=3", "--disable=[]", cwd=tmp_path)
    assert "at step 40; the logged steps up to 80 are repeated" in done.stdout
    done = called("fit", "--run", str(run), "--trainer.max_epochs=2", cwd=tmp_path, code=2)
    assert "the run has done 120 optimiser steps, but only 80 are planned now" in done.stderr


def test_refused_resume_leaves_the_run_unchanged(finished):
    folder, run, _ = finished
    before = {path: text for path, text in files(run).items() if "tfevents" not in path.name}
    changed = ["--model.network.hidden=[7]", "--trainer.max_epochs=5"]
    done = called("fit", "--run", str(run), *changed, cwd=folder, code=2)
    assert "holds the weights of another network" in done.stderr
    assert {path: text for path, text in files(run).items() if "tfevents" not in path.name} == before


def test_weight_decay_can_be_added_and_removed_in_a_resumed_run(tmp_path):
    adam = ["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01"]
    adam.append("--model.optimizer.weight_decay=0")
    called("fit", "--config", CONFIG, *adam, "--trainer.max_epochs=1", cwd=tmp_path)
    run, cut = newest(tmp_path), []
    for epochs, decay in enumerate((0, 0.1, 0), 1):
        if epochs > 1:
            more = [f"--trainer.max_epochs={epochs}", f"--model.optimizer.weight_decay={decay}"]
            called("fit", "--run", str(run), *more, cwd=tmp_path)
        found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        (optimizer,), (schedule,) = found["optimizer_states"], found["lr_schedulers"]
        cut.append([(len(group["params"]), group["weight_decay"]) for group in optimizer["param_groups"]])
        assert len(schedule["base_lrs"]) == len(optimizer["param_groups"]) and found["global_step"] == 40 * epochs
        assert {float(each["step"]) for each in optimizer["state"].values()} == {40.0 * epochs}
    assert cut == [[(6, 0)], [(3, 0.1), (3, 0)], [(6, 0)]]  # Without decay, one group holds all.


OPTIONS = {
    "in a file": ({"experiment": "mine", "runs": "elsewhere"}, [], "elsewhere/mine"),
    "on the command line": ({}, ["--experiment=mine", "--runs=elsewhere"], "elsewhere/mine"),
    "in both": ({"experiment": "theirs"}, ["--experiment=mine"], "runs/mine"),
    "in the home folder": ({"runs": "~/elsewhere"}, [], "home/elsewhere/options"),
    "in the home folder, unexpanded by the shell": ({}, ["--runs=~/elsewhere"], "home/elsewhere/options"),
}


@pytest.mark.parametrize("where", quick_or_slow(OPTIONS, {"in both", "in the home folder"}))
def test_experiment_and_runs_mean_the_same_folder_wherever_they_are_set(where, tmp_path, monkeypatch):
    written, typed, folder = OPTIONS[where]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "options.yaml").write_text(Path(CONFIG).read_text() + (yaml.safe_dump(written) if written else ""))
    for epochs in (1, 2):
        command = ["fit", "--config", "options.yaml", *typed, "--resume", f"--trainer.max_epochs={epochs}"]
        called(*command, cwd=tmp_path)
    (run,) = {path.parent for path in tmp_path.rglob("config.yaml")}
    assert run.parent == tmp_path / folder
    assert {path.parent for path in tmp_path.rglob("*.ckpt")} == {run / "checkpoints"}
    assert results(run)["steps"] == 80
    found = called("test", f"--run={run.parent}/latest", "--ckpt=last", cwd=tmp_path)
    assert "val" not in found.stderr and {path for path in tmp_path.iterdir() if path.name == "~"} == set()


def test_resume_in_a_file_resumes(tmp_path):
    (tmp_path / "mine.yaml").write_text(Path(CONFIG).read_text() + "resume: true\n")
    for epochs in (1, 2):
        called("fit", "--config", "mine.yaml", f"--trainer.max_epochs={epochs}", cwd=tmp_path)
    (run,) = tmp_path.glob("runs/mine/*/config.yaml")
    assert results(run.parent)["steps"] == 80


def test_best_of_another_loss_is_not_compared(tmp_path):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    before = results(run)["best"]
    command = ["fit", "--run", str(run), "--trainer.max_epochs=3"]
    changes = {
        "model.init_args.loss.init_args.label_smoothing": "--model.loss.label_smoothing=0.4",
        "trainer.limit_val_batches": "--trainer.limit_val_batches=1",
    }
    for option, change in changes.items():
        refused = called(*command, change, cwd=tmp_path, code=2)
        assert f"changing {option} changes what val/loss means" in refused.stderr and refused.stderr.count("\n") == 1
    done = called(*command, changes["model.init_args.loss.init_args.label_smoothing"], "--allow_inexact", cwd=tmp_path)
    assert "best   best checkpoint and early stopping start anew: changing model.init_args.loss" in done.stdout
    best = results(run)["best"]
    (*_, (_, last)) = logged(run, "val/loss")
    assert best["val/loss"] == pytest.approx(last) and last > before["val/loss"]


def test_loss_may_change_if_a_metric_decides_the_best(tmp_path):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=1", "--model.monitor=val/accuracy", cwd=tmp_path)
    change = ["--trainer.max_epochs=2", "--model.loss.label_smoothing=0.4"]
    done = called("fit", "--run", str(newest(tmp_path)), *change, cwd=tmp_path)
    assert "change model.init_args.loss.init_args.label_smoothing" in done.stdout and "anew" not in done.stdout


def test_limit_of_one_batch_differs_from_all_batches(tmp_path):
    limits = [f"--trainer.limit_{split}_batches=1" for split in ("train", "test")]
    called("run", "--config", CONFIG, "--trainer.max_epochs=1", *limits, cwd=tmp_path)
    run = newest(tmp_path)
    outputs = (run / "outputs" / "test.npz").read_bytes()
    called("test", "--run", str(run), "--trainer.limit_test_batches=1.0", cwd=tmp_path)
    assert (run / "outputs" / "test.npz").read_bytes() == outputs
    refused = called("fit", "--run", str(run), "--trainer.limit_train_batches=1.0", cwd=tmp_path, code=2)
    assert "changing trainer.limit_train_batches breaks exact resume" in refused.stderr
