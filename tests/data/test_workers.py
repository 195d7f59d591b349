"""Loader processes end with the process that uses them, whatever starts them."""

import subprocess
import sys

import pytest
import torch

from tests.helpers import CONFIG, called, newest

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
    ("method", "case", "code"),
    [
        ("forkserver", "killed", -9),
        pytest.param("fork", "alive", 0, marks=pytest.mark.slow),
        pytest.param("forkserver", "all", 0, marks=pytest.mark.slow),
    ],
)
def test_workers_obey_and_end_with_their_own_process_only(method, case, code, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # The worker holds the pipe of the output open, so a worker that remains is a timeout.
    done = subprocess.run(
        [sys.executable, "script.py", method, case], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == (["32", "1225"] if case == "all" else ["32"])


MINE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Data(LightningDataModule):
    def __init__(self, method: str):
        super().__init__()
        self.method = method

    def train_dataloader(self):
        rows = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
        rows.change = lambda sample: sample
        return DataLoader(rows, 4, num_workers=1, multiprocessing_context=self.method)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8)), 4)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_data_that_cannot_be_sent_to_a_worker_is_refused_in_one_line(method, tmp_path):
    (tmp_path / "unsendable.py").write_text(MINE)
    options = ["--config", CONFIG, "--data=unsendable.Data", f"--data.method={method}", "--trainer.max_epochs=1"]
    told = called("fit", *options, cwd=tmp_path, code=2).stderr
    assert "firstlight: num_workers needs data that Python can send to a new process" in told
    assert "lambda" in told and "use num_workers=0" in told


RUN = """
import multiprocessing, sys
from firstlight.__main__ import main

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow  # Each worker imports torch.
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_each_start_method_train_to_the_same_bits(method, tmp_path):
    (tmp_path / "script.py").write_text(RUN)
    common = ["fit", "--config", CONFIG, "--trainer.max_epochs=1", "--disable=progress"]
    command = [sys.executable, "script.py", method, *common, "--data.num_workers=1", "--experiment=workers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    called(*common, "--experiment=alone", cwd=tmp_path)
    ends = [
        torch.load(newest(tmp_path, name) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("workers", "alone")
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
