import csv
import io
import json
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from firstlight.__main__ import main

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits_mlp.yaml")
DDP = str(ROOT / "configs" / "overlays" / "ddp.yaml")


def firstlight(*args, cwd, code=0):
    """Run the command line in a new process, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "firstlight", *args], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def called(*args, cwd, code=0):
    """Run the command line in this process, where another one would show nothing more: its start costs seconds.

    Warnings are ignored, and what goes through `logging` is pytest's: neither is in `stderr`. Modules in `cwd` are
    forgotten afterwards.
    """
    path, out, err = sys.path[:], io.StringIO(), io.StringIO()
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = main(list(args))
    except SystemExit as stopped:
        found = stopped.code or 0
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(cwd)):
                del sys.modules[name]
    assert found == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def newest(cwd, experiment="digits_mlp"):
    folder = Path(cwd) / "runs" / experiment
    return folder / (folder / "latest").read_text().strip()


def logged(run, name):
    """Return the pairs (step, value) of a name in metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "evaluations" not in path.parts}
