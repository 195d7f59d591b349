"""The sdist and the wheel hold what they promise, and the wheel runs where nothing of the repository is."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers import ROOT, newest

pytestmark = pytest.mark.slow


def execute(*args, cwd):
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the sdist, and the wheel that is made of it."""
    pytest.importorskip("build")
    pytest.importorskip("twine")
    folder = tmp_path_factory.mktemp("dist")
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return the firstlight of a new environment that holds the wheel, and sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    execute(folder / "bin" / "pip", "install", "--quiet", "--no-deps", built[1], cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Dependencies take gigabytes. What is installed as editable is not seen: `.pth` files there are not read.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), *(each for each in sys.path if "site-packages" in each)])
    (packages / "dependencies.pth").write_text("\n".join(paths))
    return folder / "bin" / "firstlight"


def test_sdist_and_wheel_pass_twine_check(built):
    assert "PASSED" in execute(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=ROOT)


def test_the_wheel_lists_and_runs_its_configurations(installed, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = execute(installed.parent / "python", "-c", "import firstlight; print(firstlight.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    names = [line.split()[0] for line in execute(installed, "configs", cwd=tmp_path).splitlines()[2:]]
    assert {"digits_mlp", "wine", "overlays/debug"} <= set(names)
    execute(installed, "run", "--config", "firstlight:digits_mlp", "--trainer.max_epochs", "1", cwd=tmp_path)
    assert (newest(tmp_path) / "results.json").is_file()
    for name in ("wine", "corpus_lm", "image_folder"):  # They name a small file or folder.
        debug = ("--config", f"firstlight:{name}", "--config", "firstlight:overlays/debug")
        execute(installed, "fit", *debug, cwd=tmp_path)
        assert (newest(tmp_path, name) / "results.json").is_file()
