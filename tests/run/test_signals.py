"""Signals and failing processes: all processes of a run end together."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from firstlight.__main__ import main
from firstlight.callbacks import GracefulShutdown, LastCheckpoint
from firstlight.checkpoints.io import AtomicCheckpointIO
from firstlight.errors import UsageError
from tests.helpers import CONFIG, DDP, Ranks, newest, repeatable_lines, results

MINE = """
import os, signal, time
from lightning.pytorch import Callback


class SignalAtStep(Callback):
    def __init__(self, step: int, number: int = 15) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class SignalInValidation(Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 40 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class FaultEverywhere(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise ZeroDivisionError("the fault of this test")


class Fault(Callback):
    def __init__(self, rank: int, kind: str) -> None:
        self.rank, self.kind = rank, kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 50 and trainer.global_rank == self.rank:
            if self.kind == "raises":
                raise ZeroDivisionError("the fault of this test")
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "is killed" else signal.SIGSTOP)
"""
WATCHED = """
import sys
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from firstlight.__main__ import main

look = _ChildProcessObserver._run
_ChildProcessObserver._run = lambda self: bool(self._child_processes) and look(self)
_ChildProcessObserver.__init__.__defaults__ = (0.001,)
sys.exit(main())
"""
"""Lightning's observer of child processes, which also kills this process, looks every millisecond here."""
LONG = ["--trainer.max_epochs=2000", "--disable=early_stopping"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that returns an uninterrupted run of some options."""

    @cache
    def run(*args):
        cwd = tmp_path_factory.mktemp("whole")
        Ranks(main, args, cwd=cwd).succeed()
        return newest(cwd)

    return run


@pytest.mark.parametrize(
    ("options", "stop", "step"),
    [
        pytest.param([], "mine.SignalAtStep --step=0", 1, marks=pytest.mark.slow),
        ([], "mine.SignalAtStep --step=57", 58),
        pytest.param([], "mine.SignalAtStep --step=49", 50, id="a step that is logged", marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.max_steps=50"], "mine.SignalAtStep --step=49", 50, id="the last step", marks=pytest.mark.slow
        ),
        pytest.param([], "mine.SignalAtStep --step=39", 40, id="the last batch of an epoch", marks=pytest.mark.slow),
        pytest.param([], "mine.SignalInValidation", 40, id="during the validation"),
        pytest.param(
            ["--trainer.val_check_interval=20"],
            "mine.SignalAtStep --step=19",
            21,
            id="a validation within an epoch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interrupted_run_prints_how_to_resume_and_ends_with_the_same_bits(options, stop, step, uninterrupted, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    whole = ["fit", "--config", CONFIG, "--trainer.max_epochs=2", "--seed_everything=3", *options]
    expected = uninterrupted(*whole)
    name, *arguments = stop.split()
    more = [f"--trainer.callbacks+={name}", *(each.replace("--", "--trainer.callbacks.") for each in arguments)]
    stopped = Ranks(main, [*whole, *more], cwd=tmp_path)
    assert stopped.wait() == [143]
    run, printed = newest(tmp_path), stopped.stdout
    assert re.search(rf"interrupted at step {step}; resume with: firstlight fit --run \S*{run.name}\n", printed)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    found = results(run)
    assert found["error"] == "stopped by a signal, exit code 143" and found["facts"]["done_steps"] == step
    Ranks(main, ["fit", "--run", str(run), "--trainer.callbacks=[]"], cwd=tmp_path).succeed()
    assert same_end(expected, run)
    assert "error" not in results(run) and not list(run.glob("results-until*"))


def test_interrupted_run_without_checkpoints_says_that_none_is_left(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    stop = ["--trainer.callbacks+=mine.SignalAtStep", "--trainer.callbacks.step=3", "--disable=[best,last]"]
    run = Ranks(main, ["fit", "--config", CONFIG, "--trainer.max_epochs=2", *stop], cwd=tmp_path)
    assert run.wait() == [143]
    assert run.stdout.endswith("interrupted at step 4; checkpoints: none\n") and "Traceback" not in run.stderr
    assert not list(newest(tmp_path).glob("checkpoints/*"))


def same_end(one, other):
    """Return whether two runs ended with the same weights and logged the same lines."""
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    curves = [Counter(repeatable_lines(run)) for run in (one, other)]
    weights = [end["state_dict"] for end in ends]
    return curves[0] == curves[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def processes(folder):
    """Return the process IDs of the processes whose working directory is `folder`."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and os.readlink(path / "cwd") == str(folder):
                found.append(int(path.name))
        except OSError:
            continue  # It has ended.
    return found


def started(folder):
    """Start a fit of two processes as a user does, and wait until both train."""
    (folder / "watched.py").write_text(WATCHED)
    command = [sys.executable, "watched.py", "fit", "--config", CONFIG, "--config", DDP, *LONG]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.1)
    return run


@pytest.mark.faults
@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        pytest.param("0", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("1", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("01", signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("01", signal.SIGINT, 130),
    ],
)
def test_signal_to_one_of_two_processes_ends_both_with_a_checkpoint(whom, number, code, tmp_path, figure):
    run = started(tmp_path)
    (other,) = set(processes(tmp_path)) - {run.pid}
    for each in whom:
        os.kill([run.pid, other][int(each)], number)
    printed, errors = run.communicate(timeout=60)
    with figure("signal to a run of two processes that the command line started") as case:
        ended = "" if run.returncode == code else f"exit code {run.returncode}: {errors}"
        case.trial(ended or (f"left: {left}" if (left := processes(tmp_path)) else ""))
    step = int(re.findall(r"interrupted at step ([\d,]+); resume with", printed)[0].replace(",", ""))
    assert printed.count("interrupted") == 1
    assert torch.load(newest(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step


SLOW = """
import time, torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.randn(1, 8, 8), index

class Data(LightningDataModule):
    def __init__(self, num_workers: int):
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self):
        return DataLoader(Slow(), 1, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(Slow(), 8)
"""


@pytest.mark.parametrize("data", ["firstlight.data.Digits", pytest.param("slow.Data", marks=pytest.mark.slow)])
def test_signal_to_a_process_group_with_loader_workers_ends_the_run_cleanly(data, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    options = [*LONG, f"--data={data}", "--data.num_workers=1"]
    command = [sys.executable, "-m", "firstlight", "fit", "--config", CONFIG, *options]
    run = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    printed, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors
    others = [line for line in errors.splitlines() if "is undefined" not in line and not line.startswith("epoch ")]
    assert "interrupted at step" in printed and not others
    assert not processes(tmp_path)


@pytest.mark.slow
def test_torchrun_ends_all_processes_of_a_run(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "firstlight"]
    command = [*launch, "fit", "--config", CONFIG, "--config", DDP, *LONG]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    step = int(re.findall(r"interrupted at step ([\d,]+); resume with", printed)[0].replace(",", ""))
    assert torch.load(newest(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    assert not processes(tmp_path)


@pytest.mark.slow
def test_two_processes_with_nothing_to_do_end_without_an_error(tmp_path):
    whole = ["fit", "--config", CONFIG, "--config", DDP, "--trainer.max_epochs=1"]
    Ranks(main, whole, cwd=tmp_path, ranks=2).succeed()
    again = Ranks(main, ["fit", "--run", str(newest(tmp_path))], cwd=tmp_path, ranks=2).succeed()
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("whom", "trials"),
    [([1], 1), *(pytest.param(whom, 20, marks=pytest.mark.slow) for whom in ([0], [1], [0, 1]))],
    ids=["rank 1-1", "rank 0-20", "rank 1-20", "both ranks-20"],
)
def test_ranks_of_a_launcher_end_together_at_a_random_moment(whom, trials, tmp_path, figure):
    moments = random.Random(trials + len(whom) + whom[-1])
    with figure(f"SIGTERM to {' and '.join(f'rank {rank}' for rank in whom)} at a random moment", trials) as case:
        for trial in range(trials):
            folder = tmp_path / str(trial)
            folder.mkdir()
            run = Ranks(main, ["fit", "--config", CONFIG, "--config", DDP, *LONG], cwd=folder, ranks=2)
            assert run.wait_for("\nplan ")
            time.sleep(moments.random())
            for rank in whom:
                os.kill(run.processes[rank].pid, signal.SIGTERM)
            codes = run.wait(30)
            step = re.search(r"interrupted at step ([\d,]+)", run.stdout)
            kept = newest(folder) / "checkpoints" / "last.ckpt"
            if codes != [143, 143] or not step or not kept.is_file():
                run.kill()
                case.trial(f"{codes}: {run.stdout}{run.stderr}")
            else:
                at = torch.load(kept, weights_only=True)["global_step"]
                case.trial("" if at == int(step[1].replace(",", "")) else f"{kept} is of step {at}")


def test_two_interrupted_processes_resume_to_the_same_bits(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    whole = ["fit", "--config", CONFIG, "--config", DDP, "--trainer.max_epochs=3"]
    Ranks(main, whole, cwd=tmp_path, ranks=2).succeed()
    expected = newest(tmp_path)
    stop = [
        "--trainer.callbacks+=mine.SignalAtStep",
        "--trainer.callbacks.step=28",
    ]  # They stop after 30, which is logged.
    assert Ranks(main, [*whole, *stop], cwd=tmp_path, ranks=2).wait() == [143, 143]
    run = newest(tmp_path)
    Ranks(main, ["fit", "--run", str(run), "--trainer.callbacks=[]"], cwd=tmp_path, ranks=2).succeed()
    assert same_end(expected, run)


def told(rank, kind):
    """Return a pattern of what is printed when a rank fails."""
    return {
        "raises": "ZeroDivisionError: the fault of this test" if rank == 0 else r"process 1 \(.*\) failed: its error",
        "is killed": rf"process {rank} \(PID \d+ on \S+\) (was killed|is gone)",
        "is frozen": rf"process {rank} \(PID \d+ on \S+\) has not answered for 5 s",
    }[kind]


def failing(rank, kind):
    """Return the arguments of a fit of two processes in which a rank fails."""
    fault = ["--trainer.callbacks+=mine.Fault", f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.kind={kind}"]
    return ["fit", "--config", CONFIG, "--config", DDP, *LONG, *fault, "--shutdown.timeout=5"]


@pytest.mark.parametrize(("kind", "code"), [pytest.param("raises", 1, marks=pytest.mark.slow), ("is killed", -9)])
def test_failing_rank_of_a_launcher_ends_the_other_and_is_named(kind, code, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = Ranks(main, failing(1, kind), cwd=tmp_path, ranks=2)
    assert run.wait(60) == [1, code]
    assert re.search(told(1, kind), run.stderr), run.stderr


def test_last_words_of_processes_that_all_raise_are_the_fault(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    options = ["--config", CONFIG, "--config", DDP, "--trainer.callbacks+=mine.FaultEverywhere"]
    run = Ranks(main, ["fit", *options], cwd=tmp_path, ranks=2)
    assert run.wait(60) == [1, 1]
    assert run.stderr.rstrip().endswith("ZeroDivisionError: the fault of this test"), run.stderr
    assert "interrupted" not in run.stdout


@pytest.mark.faults
@pytest.mark.parametrize(
    ("rank", "kind"),
    [
        pytest.param(0, "raises", marks=pytest.mark.slow),
        pytest.param(0, "is killed", marks=pytest.mark.slow),
        (0, "is frozen"),
        pytest.param(1, "raises", marks=pytest.mark.slow),
        pytest.param(1, "is killed", marks=pytest.mark.slow),
        pytest.param(1, "is frozen", marks=pytest.mark.slow),
    ],
)
def test_failing_process_ends_the_other_and_is_named(rank, kind, tmp_path, figure):
    (tmp_path / "mine.py").write_text(MINE)
    run = subprocess.Popen(
        [sys.executable, "-m", "firstlight", *failing(rank, kind)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = run.communicate(timeout=120)
    deadline = time.monotonic() + 30
    while (left := processes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    with figure(f"one of two processes {kind}: both end, and it is named") as case:
        code = -9 if rank == 0 and kind != "raises" else 1
        fault = "" if run.returncode == code else f"exit code {run.returncode}"
        is_named = re.search(told(rank, kind), errors)
        case.trial(fault or (f"left: {left}" if left else "") or ("" if is_named else errors))
    assert "Traceback" not in errors or kind == "raises"


@pytest.mark.parametrize(("accumulated", "step"), [(1, 6), (4, 2)])
def test_signal_stops_a_foreign_module_after_a_step_and_handlers_are_restored(accumulated, step, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    class Told(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(
        max_epochs=2, logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        plugins=[AtomicCheckpointIO()], callbacks=[LastCheckpoint(tmp_path), GracefulShutdown()],
        default_root_dir=tmp_path, accumulate_grad_batches=accumulated,
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(Told())
    assert stopped.value.code == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_warning_of_a_slurm_job_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # what Lightning takes for an interactive job, without srun
    stop = [
        "--trainer.callbacks+=mine.SignalAtStep",
        "--trainer.callbacks.step=3",
        "--trainer.callbacks.number=10",  # SIGUSR1
    ]
    run = Ranks(main, ["fit", "--config", CONFIG, *stop], cwd=tmp_path)
    assert run.wait() == [143]
    assert "interrupted at step 4; resume with" in run.stdout


def test_timeout_too_short_for_a_slow_machine_is_refused():
    with pytest.raises(UsageError, match=r"timeout=1: it must be at least 5$"):
        GracefulShutdown(timeout=1)
