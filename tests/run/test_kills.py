"""Runs that are killed with `kill -9` and resumed end with the bits of an uninterrupted run."""

import csv
import json
import random
import time
import zlib

import pytest
import torch

from firstlight.__main__ import main
from firstlight.data import Digits
from tests.helpers import CONFIG, DDP, Ranks, newest, repeatable_lines

MODES = {
    "one process": ([], 1),
    "2 workers": (["--data.num_workers=2", "--trainer.max_epochs=4"], 1),  # The workers start again in each epoch.
    "2 processes": (["--config", DDP], 2),
}
OPTIONS = [
    "--trainer.max_epochs=9",
    "--last.every_n_steps=7",
    "--data.val_fraction=0.03",
    "--model.optimizer.lr=0.01",
    "--model.monitor=val/accuracy",  # It soon is 1, so the best checkpoint is an early one and patience runs out.
    "--early_stopping.patience=5",
]


def start(mode, cwd, *more):
    """Start a fit of digits with shuffling and dropout."""
    options, ranks = MODES[mode]
    cwd.mkdir(exist_ok=True)
    args = ["fit", "--config", CONFIG, *OPTIONS, *options, *more]
    return Ranks(main, args, cwd=cwd, ranks=ranks)


def resume(mode, cwd, callbacks=()):
    """Resume a run that has a checkpoint, or start again without one."""
    if not list(cwd.glob("runs/digits_mlp/*/checkpoints/last.ckpt")):
        return start(mode, cwd, "--resume")
    args = ["fit", "--run", str(newest(cwd)), f"--trainer.callbacks={json.dumps(list(callbacks))}"]
    return Ranks(main, args, cwd=cwd, ranks=MODES[mode][1])


def killed_after(run, seconds):
    """Kill a run `seconds` after its training started; return whether it was still running."""
    has_started = run.wait_for("\nplan ")
    time.sleep(seconds)
    return run.kill() and has_started


def leaves(value, folder, path=""):
    """Yield path and value of each leaf of a checkpoint, without the name of its folder."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, folder, f"{path}.{key}".replace(folder, ""))
    else:
        yield path, value.replace(folder, "") if isinstance(value, str) else value


def same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def differences(whole, killed):
    """Return the differences between an uninterrupted run and a killed one, as text."""
    found = [path.name for path in (killed / "checkpoints").iterdir() if path.suffix != ".ckpt"]
    for name in ("last", "best"):
        files = {run: torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (whole, killed)}
        ends = [dict(leaves(file, str(run))) for run, file in files.items()]
        paths = dict.fromkeys([*ends[0], *ends[1]])
        differing = [path for path in paths if not same(ends[0].get(path), ends[1].get(path))]
        found += [f"{name}{path}" for path in differing if "callback mine." not in path]  # Of the killed run only.
    curves = [points(run) for run in (whole, killed)]
    assert {"train/loss", "val/loss", "grad_norm/total", "lr", "epoch"} <= {name for name, _ in curves[0]}
    keys = {**curves[0], **curves[1]}
    found += [f"{name} at step {step}" for name, step in keys if len({each.get((name, step)) for each in curves}) > 1]
    return ", ".join(found)


def points(run):
    """Return the logged values by name and step, without times; of a repeated step, the last value."""
    return {(row["name"], row["step"]): row["value"] for row in csv.DictReader(repeatable_lines(run))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that returns, by mode, an uninterrupted run and the seconds that it trained."""
    made = {}

    def get(mode):
        if mode not in made:
            cwd = tmp_path_factory.mktemp("whole")
            run = start(mode, cwd)
            run.wait_for("\nplan ")
            began = time.monotonic()
            run.succeed()
            made[mode] = newest(cwd), time.monotonic() - began
        return made[mode]

    return get


@pytest.mark.parametrize(
    ("mode", "kills"), [("one process", 1), *(pytest.param(mode, 20, marks=pytest.mark.slow) for mode in MODES)]
)
def test_run_killed_at_a_random_moment_ends_with_the_bits_of_an_uninterrupted_one(
    kills, mode, uninterrupted, figure, tmp_path
):
    whole, seconds = uninterrupted(mode)
    draw = random.Random(mode)
    with figure(f"kill -9 at random moments, shuffle and dropout, {mode}: the same bits", kills) as count:
        for number in range(3 * kills):
            after = draw.uniform(0, seconds)
            cwd = tmp_path / str(number)
            if not killed_after(start(mode, cwd), after):
                continue
            resume(mode, cwd).succeed()
            wrong = differences(whole, newest(cwd))
            print(f"killed {after:.3f} s of {seconds:.3f} after training began: {wrong or 'the same bits'}")
            count.trial(wrong and f"killed {after:.3f} s after training began: {wrong}")
            if count.reached + len(count.faults) == kills:
                break


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_run_killed_several_times_ends_with_the_bits_of_an_uninterrupted_one(mode, uninterrupted, figure, tmp_path):
    whole, seconds = uninterrupted(mode)
    draw = random.Random(mode)
    with figure(f"kill -9 two to four times in one run, {mode}: the same bits", 3) as count:
        for number in range(9):
            cwd, kills = tmp_path / str(number), 0
            run = start(mode, cwd)
            for _ in range(4):
                kills += killed_after(run, draw.uniform(0, seconds / 3))
                run = resume(mode, cwd)
            run.succeed()
            if kills > 1:
                count.trial(differences(whole, newest(cwd)))
            if count.reached + len(count.faults) == 3:
                break


OWN = """
import os, signal, zlib
from lightning.pytorch import Callback


class Kill(Callback):
    def __init__(self, step: int, validating: bool) -> None:
        self.is_time = lambda now, validates: now >= step and validates == validating  # Checkpoints hold plain values.

    def kill(self, trainer, validating):
        if self.is_time(trainer.global_step, validating):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, *_):
        self.kill(trainer, False)

    def on_validation_batch_end(self, trainer, *_):
        self.kill(trainer, True)


class Seen(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        samples = [zlib.crc32(sample.numpy().tobytes()) for sample in batch[0]]
        with open(f"seen-{trainer.global_rank}", "a") as file:
            print(trainer.current_epoch, batch_idx, *samples, file=file)
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mode", "validating"),
    [
        ("one process", False),
        ("2 processes", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("2 workers", False), ("2 processes", False))),
        pytest.param("one process", True, marks=pytest.mark.slow),
    ],
)
def test_run_killed_within_an_epoch_or_a_validation_uses_each_sample_once_per_epoch(
    mode, validating, uninterrupted, figure, tmp_path
):
    whole, _ = uninterrupted(mode)
    (tmp_path / "mine.py").write_text(OWN)
    callbacks = [
        {"class_path": "mine.Seen"},
        {"class_path": "mine.Kill", "init_args": {"step": 53, "validating": validating}},
    ]
    with figure("kill -9 within an epoch and within a validation: the same bits, each sample once an epoch") as count:
        codes = start(mode, tmp_path, f"--trainer.callbacks={json.dumps(callbacks)}").wait()
        assert set(codes) == {-9}
        resume(mode, tmp_path, callbacks[:1]).succeed()
        taken = {}
        for path in tmp_path.glob("seen-*"):
            for line in path.read_text().splitlines():
                epoch, batch, *samples = map(int, line.split())
                taken[epoch, batch, path.name] = samples  # A repeated batch counts once.
        inputs, _ = Digits(val_fraction=0.03).tensors("train")
        expected = sorted(zlib.crc32(sample.numpy().tobytes()) for sample in inputs)
        epochs = {key[0] for key in taken}
        wrong = [
            epoch
            for epoch in epochs
            if sorted(sample for key, batch in taken.items() if key[0] == epoch for sample in batch) != expected
        ]
        assert len(epochs) > 2
        count.trial(differences(whole, newest(tmp_path)) or (wrong and f"other samples in epochs {wrong}"))
