import csv
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from firstlight.__main__ import main

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits_mlp.yaml")
DDP = str(ROOT / "configs" / "overlays" / "ddp.yaml")

# A process forked from one that has imported everything starts in a tenth of the time.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["firstlight.cli.verbs", "firstlight.networks", "torch.utils.tensorboard"])

QUICK_CONFIGS = {
    ROOT / "configs" / f"{name}.yaml" for name in ("corpus_lm", "diabetes", "digits_mlp_batchnorm", "digits_supcon")
}
"""Configurations of four tasks. Tests of all configurations mark the others as slow."""


def quick_or_slow(values, quick):
    """Return the values as parameters of a test; those that are not in `quick` are marked as slow."""
    return [each if each in quick else pytest.param(each, marks=pytest.mark.slow) for each in values]


def firstlight(*args, cwd, code=0):
    """Run the command line in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "firstlight", *args], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def called(*args, cwd, code=0):
    """Run the command line in this process, which saves the seconds that a new process takes to start.

    Warnings are ignored and pytest captures `logging`, so `stderr` has neither. Modules in `cwd` are unloaded at the
    end.
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


def repeatable_lines(run):
    """Return the lines of metrics.csv without times, which no two runs share."""
    return [line for line in (run / "metrics.csv").read_text().splitlines() if ",seconds/" not in line]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "evaluations" not in path.parts}


class Ranks:
    """Run a function in one new process per rank, as a launcher such as torchrun does.

    Args:
        function: Called with `args` in each process; must be importable. Its return value is the exit code.
        cwd: Working directory of the processes. Rank 0 writes its output to the files `printed` and `errors` there,
            another rank to `printed-RANK` and `errors-RANK`.
        ranks: Number of processes.
    """

    def __init__(self, function, *args, cwd, ranks=1):
        self.cwd = Path(cwd)
        for path in (*self.cwd.glob("printed*"), *self.cwd.glob("errors*")):
            path.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            _processes.Process(target=_rank, args=(function, args, str(cwd), rank, ranks, port, dict(os.environ)))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def _read(self, name):
        return "".join(path.read_text() for path in sorted(self.cwd.glob(f"{name}*")))

    @property
    def stdout(self):
        """What all ranks printed, rank 0 first."""
        return self._read("printed")

    @property
    def stderr(self):
        return self._read("errors")

    def wait_for(self, text):
        """Wait until a rank has printed a text or rank 0 has ended; return whether rank 0 still runs."""
        deadline = time.monotonic() + 300
        while text not in self.stdout:
            if self.processes[0].exitcode is not None:
                return False
            assert time.monotonic() < deadline, f"the run never printed {text!r}"
            time.sleep(0.002)
        return True

    def kill(self):
        """Kill all processes; return whether all of them were still running."""
        for process in self.processes:
            process.kill()
        return all(code == -9 for code in self.wait())

    def wait(self, seconds=300):
        """Wait up to `seconds` for each process; return the exit codes, `None` for those that still run."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def succeed(self):
        """Wait until all processes have ended, check their exit codes, and return this object."""
        assert set(self.wait()) == {0}, self.stdout + self.stderr
        return self


def _rank(function, args, cwd, rank, ranks, port, environment):
    os.environ |= environment  # The process that forks this one has an older environment.
    multiprocessing.set_start_method("fork", force=True)  # Not "forkserver", which is inherited.
    os.chdir(cwd)
    for descriptor, name in ((1, "printed"), (2, "errors")):
        name += f"-{rank}" if rank else ""
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if ranks > 1:
        from lightning.pytorch.utilities import rank_zero_only

        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank  # Lightning was imported before the rank was set.
    sys.exit(function(*args))
