"""The disk fails at each write in turn: one line, what was computed is printed first, no temporary file stays."""

import errno
import os
import shutil
import sys

import pytest
import torch

from firstlight.__main__ import main
from firstlight.checkpoints.io import read
from firstlight.errors import UsageError
from firstlight.run import directory
from firstlight.run.export.formats import FORMATS
from tests.helpers import ROOT, newest

pytestmark = pytest.mark.faults
QUICK = ["--disable=progress", "--model.network.hidden=[4]", "--trainer.log_every_n_steps=40"]
EVENTS = {"open", "os.mkdir", "os.rename"}


class Disk:
    """Count the writes below a folder while it is active, and let one of them fail with "No space left on device"."""

    folder, count, failing, last = None, 0, None, ""

    def hook(self, event, args):
        if self.folder is None or event not in EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.abspath(args[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.failing:
                self.last = f"{event} {args[0]}"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))


DISK = Disk()
sys.addaudithook(DISK.hook)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield DISK
    DISK.folder = DISK.failing = None


def run(disk, folder, failing, *args):
    disk.folder, disk.count, disk.failing, disk.last = str(folder), 0, failing, ""
    try:
        return main([str(arg) for arg in args])
    finally:
        disk.folder = None


def leftovers(folder):
    """Return temporary files: all hidden files but the lock of a run."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def check(code, disk, folder, capsys):
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("firstlight: ")]
    assert code in (0, 2), disk.last
    assert len(lines) == (code == 2), (disk.last, err)
    assert "Traceback" not in err, (disk.last, err)
    assert not code or "No space left on device" in lines[0], (disk.last, lines)
    assert not leftovers(folder), (disk.last, leftovers(folder))
    for path in folder.rglob("*.ckpt"):
        read(path)
    return out


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_each_write_of_a_run_fails_in_turn(every, disk, tmp_path, capsys):
    args = ["run", "--config", ROOT / "configs/digits_mlp.yaml", "--trainer.max_epochs=1", *QUICK]
    folder = tmp_path / "runs"
    assert run(disk, folder, None, *args) == 0
    writes, codes = disk.count, []
    assert writes > 8
    for failing in range(1, writes + 1, every):
        shutil.rmtree(folder, ignore_errors=True)
        capsys.readouterr()
        codes.append(run(disk, folder, failing, *args))
        out = check(codes[-1], disk, tmp_path, capsys)
        if "results.json" in disk.last:
            assert "test   test/loss" in out or "fit    1 epoch" in out, (disk.last, out)
        if "fit    1 epoch" not in out and "checkpoints" not in disk.last and codes[-1]:
            assert not list(folder.rglob("config.yaml")), disk.last  # A run that never started leaves no directory.
    assert 0 in codes  # Logs may fail.
    assert 2 in codes


@pytest.mark.parametrize("verb", ["test", pytest.param("predict", marks=pytest.mark.slow)])
def test_each_write_of_an_evaluation_fails_in_turn(verb, disk, tmp_path, capsys):
    args = ["fit", "--config", ROOT / "configs/digits_mlp.yaml", "--trainer.max_epochs=1", *QUICK]
    assert run(disk, tmp_path, None, *args) == 0
    args = [verb, "--run", newest(tmp_path), "--disable=progress"]
    assert run(disk, tmp_path, None, *args) == 0
    writes = disk.count
    assert writes > 2
    for failing in range(1, writes + 1):
        for name in ("evaluations", "outputs"):
            shutil.rmtree(newest(tmp_path) / name, ignore_errors=True)
        capsys.readouterr()
        code = run(disk, tmp_path, failing, *args)
        out = check(code, disk, tmp_path, capsys)
        # Outputs are for later comparisons: a test without them is one.
        assert code == 2 or "samples are left out" in out, (disk.last, out)
        assert out.startswith({"test": "test     test/loss", "predict": "predict  270 samples"}[verb]), (disk.last, out)


@pytest.mark.parametrize("to", ["safetensors", "pt2", "onnx"])
def test_each_write_of_an_export_fails_in_turn(to, disk, tmp_path, capsys):
    pytest.importorskip({"safetensors": "safetensors", "pt2": "torch", "onnx": "onnxscript"}[to])
    args = ["fit", "--config", ROOT / "configs/digits_mlp.yaml", "--trainer.max_epochs=1", *QUICK]
    assert run(disk, tmp_path, None, *args) == 0
    args = ["export", "--run", newest(tmp_path), "--to", to]
    assert run(disk, tmp_path, None, *args) == 0
    writes = disk.count
    assert writes > 6
    for failing in range(1, writes + 1):
        shutil.rmtree(newest(tmp_path) / "exports", ignore_errors=True)
        capsys.readouterr()
        code = run(disk, tmp_path, failing, *args)
        check(code, disk, tmp_path, capsys)
        assert code == 2 and not list(newest(tmp_path).rglob("exports/*")), disk.last


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_that_does_not_fit_on_the_disk_is_refused_in_one_line(to, tmp_path):
    pytest.importorskip({"safetensors": "safetensors", "pt2": "torch", "onnx": "onnxscript"}[to])
    (tmp_path / f".model-{os.getpid()}").symlink_to("/dev/full")
    model = torch.nn.Linear(3, 300_000)
    with pytest.raises(UsageError, match=r"cannot write .*model: No space left on device"):
        with directory.atomic(tmp_path / "model", "wb") as file:
            FORMATS[to].write(model, torch.zeros(2, 3), {"outputs": ["outputs"]}, file)


@pytest.mark.slow
def test_a_resume_whose_writes_fail_leaves_a_run_that_resumes(disk, tmp_path, capsys):
    args = ["run", "--config", ROOT / "configs/digits_mlp.yaml", "--trainer.max_epochs=1", *QUICK]
    assert run(disk, tmp_path, None, *args) == 0
    trained = newest(tmp_path)
    shutil.copytree(trained, tmp_path / "copy")
    args = ["fit", "--run", trained, "--trainer.max_epochs=2", "--disable=progress"]
    assert run(disk, tmp_path, None, *args) == 0
    for failing in range(1, disk.count + 1):
        shutil.rmtree(trained)
        shutil.copytree(tmp_path / "copy", trained)
        capsys.readouterr()
        code = run(disk, tmp_path, failing, *args)
        check(code, disk, trained, capsys)
        assert (trained / "config.yaml").is_file() and (trained / "results.json").is_file(), disk.last
        assert read(trained / "checkpoints" / "last.ckpt")["global_step"] in (40, 80)


@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_a_file_that_cannot_be_written_again_keeps_its_content(name, tmp_path):
    path, link = tmp_path / name, tmp_path / f".{name}-{os.getpid()}"
    path.write_text("earlier")
    link.symlink_to("/dev/full")  # The temporary file opens, and its content does not fit.
    with pytest.raises(UsageError, match=rf"cannot write .*{name}: No space left on device"):
        directory._write_and_keep(path, "later")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {name: "earlier"}
