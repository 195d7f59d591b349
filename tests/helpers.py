import csv
import json
import subprocess
import sys
from pathlib import Path

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
