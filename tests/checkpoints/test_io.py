import fcntl
import multiprocessing
import os
import random
import re
import resource
import subprocess
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn

from firstlight.__main__ import main
from firstlight.callbacks import BestCheckpoint, LastCheckpoint
from firstlight.callbacks.finite import not_finite
from firstlight.checkpoints.io import AtomicCheckpointIO, find_corruption, newest_resumable, remove_leftovers
from firstlight.cli import parser as cli
from firstlight.errors import UsageError
from firstlight.run import directory
from tests.helpers import CONFIG, DDP, Ranks, called, firstlight, newest

IO = AtomicCheckpointIO()
WIDE = ["--model.network.hidden=[1024,512]", "--disable=[early_stopping]"]  # 7 MB a checkpoint, with AdamW's moments


def content(number=0, size=1000):
    return {"state_dict": {"weight": torch.full((size,), float(number))}, "optimizer_states": [], "global_step": number}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def fit(tmp_path, *callbacks, module=None, **options):
    options = {"max_epochs": 1, "limit_train_batches": 8, "limit_val_batches": 1, **options}
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        plugins=[IO],
        **options,
    )
    trainer.fit(module or BoringModel())
    return trainer


def write_on_and_on(path, elsewhere, done, io):
    os.environ["TMPDIR"], tempfile.tempdir = elsewhere, None
    number = 0
    while True:
        number += 1
        io.save_checkpoint(content(number, 1_000_000), path)
        done.value = number


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_in_a_write_leaves_a_complete_checkpoint_and_the_next_start_removes_leftovers(kills, figure, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs another file system at /dev/shm")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["firstlight.checkpoints.io"])
    path, rng, inside = tmp_path / "last.ckpt", random.Random(0), 0
    case = (
        "kill -9 inside writes, TMPDIR on another file system: the file loads, no temporary file after the next start"
    )
    with tempfile.TemporaryDirectory(dir=other) as elsewhere, figure(case, kills) as count:
        while inside < kills:
            path.unlink(missing_ok=True)
            done = context.Value("i", 0)
            writer = context.Process(target=write_on_and_on, args=(path, elsewhere, done, IO))
            writer.start()
            deadline = time.monotonic() + 120
            while not done.value:
                assert writer.is_alive() and time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            while not any(tmp_path.glob(".*")):  # Until a write starts.
                assert writer.is_alive() and time.monotonic() < deadline
            time.sleep(rng.uniform(0, 0.005))
            writer.kill()
            writer.join()
            loaded = IO.load_checkpoint(path)
            assert loaded["global_step"] in (done.value, done.value + 1)
            assert same(loaded, content(loaded["global_step"], 1_000_000))
            was_inside = any(tmp_path.glob(".*"))  # Other kills came just after the write.
            remove_leftovers(tmp_path)
            assert os.listdir(tmp_path) == ["last.ckpt"] and not os.listdir(elsewhere)
            if was_inside:
                inside += 1
                count.trial()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes and the content of a checkpoint of a foreign module."""
    folder = tmp_path_factory.mktemp("written")
    fit(folder, LastCheckpoint(folder))
    return (folder / "last.ckpt").read_bytes(), IO.load_checkpoint(folder / "last.ckpt")


@pytest.mark.parametrize("flips", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_no_flipped_bit_loads_as_another_checkpoint(flips, written, figure, tmp_path):
    whole, expected = written
    path, rng, refused = tmp_path / "last.ckpt", random.Random(1), 0
    with figure("flipped bits: refused by name, or loads the same", flips) as count:
        for _ in range(flips):
            position = rng.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            try:
                silent = not same(IO.load_checkpoint(path), expected)
                count.trial(f"bit {position} of {len(whole)} bytes loads as another" if silent else "")
            except UsageError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
                count.trial()
    assert refused > flips / 4


def test_flipped_bit_that_makes_torch_read_no_weights_is_found(written, tmp_path):
    # zipfile.testzip ignores it, and torch.load returns uninitialised memory.
    whole, _ = written
    path = tmp_path / "last.ckpt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        start, names = archive.start_dir, archive.namelist()
    for number, name in enumerate(names):
        place = start
        for _ in range(number):
            place = whole.index(b"PK\1\2", place + 4)
        flipped = bytearray(whole)
        flipped[place + 38] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match=f"is damaged: {name} is marked as a folder"):
            IO.load_checkpoint(path)


@pytest.mark.faults
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.6, 0.99, 1])
def test_truncated_checkpoint_is_refused_with_its_name(part, written, figure, tmp_path):
    whole, _ = written
    path = tmp_path / "last.ckpt"
    path.write_bytes(whole[: min(int(part * len(whole)), len(whole) - 1)])
    with figure("truncations: refused by name") as count:
        with pytest.raises(UsageError, match=rf"{path} is damaged: it is not a complete zip file"):
            IO.load_checkpoint(path)
        count.trial()


def test_checksums_are_written_whatever_the_setting_of_torch(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        IO.save_checkpoint(content(1), tmp_path / "with.ckpt")
        assert not torch.serialization.get_crc32_options()
        torch.save(content(1), tmp_path / "without.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert find_corruption(tmp_path / "with.ckpt") is None
    assert find_corruption(tmp_path / "without.ckpt").startswith("it has no CRC-32s")


def test_file_is_flushed_before_the_move_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("move"), replace(*paths)))
    IO.save_checkpoint(content(), tmp_path / "last.ckpt")
    assert events == [str(tmp_path / f".last.ckpt.{os.getpid()}.partial"), "move", str(tmp_path)]


def test_temporary_file_of_a_live_writer_and_other_files_stay(tmp_path):
    partial = tmp_path / ".last.ckpt.123.partial"
    others = {tmp_path / name for name in (".mine.partial", "last.ckpt", ".last.ckpt.123", "a.1.partial")}
    for path in (partial, *others):
        path.write_bytes(b"")
    with partial.open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert partial.exists()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == others


def test_failed_write_leaves_the_earlier_file_and_no_other(tmp_path):
    IO.save_checkpoint(content(1), tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="the checkpoint holds made of, a function: store plain values"):
        IO.save_checkpoint({"made of": lambda: None}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert same(IO.load_checkpoint(tmp_path / "last.ckpt"), content(1))


def mounted(folder):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("needs root, to mount a small disk")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    disk = tmp_path / "disk"
    mounted(disk)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


FULL = "full disk of 20 MB, RLIMIT_FSIZE: nothing is lost, at most 5 lines are printed"


@contextmanager
def files_of_at_most(size):
    """Limit the size of files that this process and its children write; Python gets an error, not a signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limited(size, args):
    """Run the command line with a limit on the size of files."""
    with files_of_at_most(size):
        return main(args)


def refused_for_room(folder, match):
    kept = IO.load_checkpoint(folder / "last.ckpt")
    with pytest.raises(UsageError, match=match) as refused:
        IO.save_checkpoint(content(2, 4_000_000), folder / "last.ckpt")
    assert "\n" not in str(refused.value)
    assert os.listdir(folder) == ["last.ckpt"]
    assert same(IO.load_checkpoint(folder / "last.ckpt"), kept)


@pytest.mark.faults
def test_full_disk_is_reported_in_bytes_and_keeps_the_earlier_file(small_disk, figure):
    IO.save_checkpoint(content(1, 2_000_000), small_disk / "last.ckpt")
    with figure(FULL) as count:
        refused_for_room(
            small_disk, r"last\.ckpt: No space left on device \(it needs 16,00\d,\d+ bytes, 12,\d+,\d+ are free"
        )
        count.trial()


@pytest.mark.faults
def test_file_size_limit_is_reported_in_bytes_and_keeps_the_earlier_file(tmp_path, figure):
    IO.save_checkpoint(content(1, 1000), tmp_path / "last.ckpt")
    with figure(FULL) as count, files_of_at_most(10_000_000):
        refused_for_room(tmp_path, r"last\.ckpt: File too large \(it needs 16,00\d,\d+ bytes, [\d,]+ are free\)")
        count.trial()


def whole_after_no_room(done, run):
    assert len([line for line in done.stderr.splitlines() if not line.startswith("epoch ")]) <= 5, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("firstlight: cannot write ")]
    assert len(said) == 1 and re.search(r"it needs [\d,]+ bytes, [\d,]+ are free", said[0]), done.stderr
    files = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"last.ckpt"} <= files <= {"last.ckpt", "best.ckpt"}
    for name in files:
        IO.load_checkpoint(run / "checkpoints" / name)


FILLS = """
import shutil
from lightning.pytorch import Callback


class Fills(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and trainer.is_global_zero:
            with open("of_someone_else", "wb") as file:
                file.write(bytes(shutil.disk_usage(".").free - 2_000_000))
"""


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_on_a_disk_that_becomes_full_keeps_its_checkpoints(processes, small_disk, figure):
    (small_disk / "mine.py").write_text(FILLS)
    options = ["--trainer.max_epochs=5", "--model.network.hidden=[512,512]", "--trainer.callbacks+=mine.Fills"]
    options += ["--config", DDP] if processes == 2 else []
    with figure(FULL) as count:
        done = firstlight("fit", "--config", CONFIG, *options, cwd=small_disk, code=2)
        whole_after_no_room(done, newest(small_disk))
        assert directory.find(newest(small_disk))
        count.trial()


def test_run_without_room_for_its_checkpoints_is_refused_before_it_starts(small_disk):
    done = called("fit", "--config", CONFIG, *WIDE, cwd=small_disk, code=2)
    assert re.search(r"has no room for the checkpoints: they need about [\d,]+ bytes, [\d,]+ are free", done.stderr)
    assert not (small_disk / "runs").exists()


@pytest.mark.faults
def test_run_with_a_file_size_limit_keeps_its_checkpoints(tmp_path, figure):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=1", *WIDE, cwd=tmp_path)
    run = newest(tmp_path)
    kept = (run / "checkpoints" / "last.ckpt").read_bytes()
    with figure(FULL) as count:
        done = Ranks(limited, 4_000_000, ["fit", "--run", str(run), "--trainer.max_epochs=2"], cwd=tmp_path)
        assert done.wait() == [2]
        whole_after_no_room(done, run)
        assert (run / "checkpoints" / "last.ckpt").read_bytes() == kept
        count.trial()


def spoil(path):
    """Flip a bit of the largest record."""
    bad = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    bad[largest.header_offset + largest.file_size // 2 + 100] ^= 1
    path.write_bytes(bad)


def test_run_resumes_from_the_newest_undamaged_checkpoint_and_a_damaged_one_is_not_evaluated(tmp_path):
    called("fit", "--config", CONFIG, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    last, best = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt"
    leftover = run / "checkpoints" / ".last.ckpt.1.partial"
    leftover.write_bytes(b"half")
    spoil(last)
    done = called("test", "--run", str(run), "--ckpt=last", cwd=tmp_path, code=2)
    assert done.stderr.startswith(f"firstlight: {last} is damaged: the CRC-32 of archive/data/")
    assert len(done.stderr.splitlines()) == 1
    done = called("fit", "--run", str(run), "--trainer.max_epochs=3", cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "damaged" in line]
    assert line.startswith(f"resume {last} is damaged: the CRC-32 of ")
    assert line.endswith(f"using {best}, the newest undamaged checkpoint")
    assert IO.load_checkpoint(last)["global_step"] == 120
    assert not leftover.exists()
    for path in (last, best):
        path.write_bytes(path.read_bytes()[:-30])
    done = called("fit", "--run", str(run), "--trainer.max_epochs=4", cwd=tmp_path, code=2)
    assert f"{last} is damaged" in done.stderr and f"{best} is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_newest_other_checkpoint_with_optimizer_states_is_used(tmp_path, capsys):
    for age, name in enumerate(("last", "light", "damaged", "new", "old")):
        path = tmp_path / f"{name}.ckpt"
        IO.save_checkpoint({"state_dict": {}} if name == "light" else content(age), path)
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_resumable(tmp_path / "last.ckpt") == tmp_path / "last.ckpt"
    assert capsys.readouterr().out == ""
    for name in ("last", "damaged"):
        spoil(tmp_path / f"{name}.ckpt")
    assert newest_resumable(tmp_path / "last.ckpt") == tmp_path / "new.ckpt"
    printed = capsys.readouterr().out
    assert "light.ckpt holds weights only" in printed and printed.count("\n") == 1


def test_checkpoint_with_code_is_refused_and_the_code_is_not_run(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": Crafted()}, tmp_path / "crafted.ckpt")
    with pytest.raises(UsageError, match=r"crafted\.ckpt holds a posix\.mkdir, which could run code"):
        IO.load_checkpoint(tmp_path / "crafted.ckpt")
    with pytest.raises(UsageError, match="weights_only=False would run code"):
        IO.load_checkpoint(tmp_path / "crafted.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("act", [IO.load_checkpoint, lambda path: IO.save_checkpoint({}, path)])
def test_url_is_refused(act, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"s3://bucket/last\.ckpt is a URL"):
        act("s3://bucket/last.ckpt")
    assert not os.listdir(tmp_path)


def test_checkpoint_plugin_of_the_user_replaces_the_default(monkeypatch, tmp_path):
    def made(*options):
        return cli.CLI("fit", ["--config", CONFIG, *options]).experiment.trainer().strategy.checkpoint_io

    assert type(made()) is AtomicCheckpointIO
    assert type(made("--trainer.plugins=lightning.pytorch.plugins.TorchCheckpointIO")) is TorchCheckpointIO


class Steps(Callback):
    """Record the steps after which the file is new."""

    def __init__(self, path):
        self.path, self.steps = path, []

    def look(self, trainer, *_):
        step = torch.load(self.path, weights_only=True)["global_step"] if self.path.is_file() else 0
        if step and step not in self.steps:
            self.steps.append(step)

    on_train_batch_start = on_train_end = look


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [8, 16]),
        ({"every_n_epochs": 2}, [16]),
        ({"every_n_epochs": 2, "every_n_steps": 3}, [3, 6, 9, 12, 15, 16]),
        ({"every_n_steps": 4}, [4, 8, 12, 16]),
        ({"every_seconds": 1e-9}, list(range(1, 17))),
    ],
)
def test_last_is_written_when_it_is_due(options, steps, tmp_path):
    seen = Steps(tmp_path / "last.ckpt")
    fit(tmp_path, LastCheckpoint(tmp_path, **options), seen, max_epochs=2)
    assert seen.steps == steps


def test_accumulated_batches_are_not_steps(tmp_path):
    seen = Steps(tmp_path / "last.ckpt")
    fit(tmp_path, LastCheckpoint(tmp_path, every_n_steps=1), seen, accumulate_grad_batches=3)
    assert seen.steps == [1, 2, 3]


def test_steps_of_manual_optimisation_count(tmp_path):
    seen = Steps(tmp_path / "last.ckpt")
    fit(tmp_path, LastCheckpoint(tmp_path, every_n_steps=3), seen, module=ManualOptimBoringModel())
    assert seen.steps == [3, 6, 8]


def test_checkpoint_at_the_end_of_an_epoch_is_written_once(tmp_path, monkeypatch):
    written = []
    save = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *args, **_: (written.append(1), save(*args)))
    fit(tmp_path, LastCheckpoint(tmp_path, every_n_steps=4))
    assert len(written) == 2


@pytest.mark.parametrize("wrong", [{"every_n_steps": -1}, {"every_seconds": float("nan")}, {"every_n_epochs": 0}])
def test_interval_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=f"LastCheckpoint was given {next(iter(wrong))}="):
        LastCheckpoint(**wrong)


class Spoiled(BoringModel):
    """A module whose weights are not finite from step 5 on."""

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 4:
            self.layer.bias.data[1] = float("inf")

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0 / self.trainer.global_step if self.trainer.global_step else 9.0)


@pytest.mark.parametrize(
    ("make", "name", "step", "kept"),
    [
        (lambda path: LastCheckpoint(path, every_n_steps=2), "last", 5, 3),
        (lambda path: BestCheckpoint("val/loss", "min", path, save_weights_only=True), "best", 4, 2),
    ],
)
def test_weights_that_are_not_finite_are_not_written(make, name, step, kept, tmp_path):
    with pytest.raises(UsageError, match=rf"{name}\.ckpt is not written at step {step}: layer\.\w+ is not finite"):
        fit(tmp_path, make(tmp_path), module=Spoiled(), val_check_interval=2)
    assert IO.load_checkpoint(tmp_path / f"{name}.ckpt")["global_step"] == kept


def test_running_statistics_are_checked_and_masks_are_not():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("mask", torch.tensor([0, -float("inf")]))
    assert not_finite(module) is None
    module[1].running_var[0] = float("nan")
    assert not_finite(module) == "1.running_var"
    assert not_finite(nn.Module()) is None


def test_foreign_module_resumes_from_a_checkpoint_written_by_a_thread(tmp_path):
    folder = tmp_path / "first"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"limit_train_batches": 4, "limit_val_batches": 1, "plugins": [AsyncCheckpointIO(AtomicCheckpointIO())]}
    for epochs, last in enumerate(("first", "second"), 1):
        trainer = Trainer(max_epochs=epochs, callbacks=[LastCheckpoint(tmp_path / last)], **quiet)
        if epochs == 1:
            trainer.fit(BoringModel())
            assert os.listdir(folder) == ["last.ckpt"]
    trainer.fit(BoringModel(), ckpt_path=folder / "last.ckpt", weights_only=True)
    assert trainer.global_step == 8
