"""Loader processes end with the process that uses them, whatever starts them."""

import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, os, sys
from firstlight.data import Digits

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    multiprocessing.set_forkserver_preload(["firstlight.data"])
    data = Digits(num_workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    print(len(next(batches)[1]), flush=True)
    worker = multiprocessing.active_children()[0].pid
    os.system(f"kill -TERM {worker}; kill -INT {worker}")  # Not the signal of the main process.
    print(sum(len(targets) for _, targets in batches) if sys.argv[2] == "all" else "", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("method", "case", "code"), [("fork", "alive", 0), ("forkserver", "killed", -9), ("forkserver", "all", 0)]
)
def test_workers_obey_and_end_with_their_own_process_only(method, case, code, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # The worker holds the pipe of the output open, so a worker that remains is a timeout.
    done = subprocess.run(
        [sys.executable, "script.py", method, case], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == (["32", "1225"] if case == "all" else ["32"])
