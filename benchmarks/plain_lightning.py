"""Run the cases of docs/reliability.md with plain Lightning, used as its documentation shows.

    python benchmarks/plain_lightning.py [--trials 20] [--flips 300] [--kills 50]

Each case runs in its own processes and its own folder. The result is printed as a table. A small network with dropout
is trained on scikit-learn's digits with shuffling and `ModelCheckpoint(save_last=True)`. It is resumed with
`ckpt_path="last"`.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

processes = multiprocessing.get_context("fork")
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Net(LightningModule):
    """A classifier of digits, as in Lightning's introduction."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
        self.fault = fault

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss. `fault` makes it NaN at step 20, or sends SIGTERM there."""
        if self.global_step == 20 and self.fault == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * torch.nan if self.global_step == 20 and self.fault == "nan" else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy, and count the samples over all processes."""
        SAMPLES.value += len(batch[0])
        self.log("test_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Data(LightningDataModule):
    """The digits, with seven test samples."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
        bounds = (slice(0, 1280), slice(1280, 1600), slice(1600, 1607))
        self.train, self.val, self.test = (TensorDataset(inputs[part], targets[part]) for part in bounds)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches in order."""
        return DataLoader(self.val, batch_size=32)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches in order."""
        return DataLoader(self.test, batch_size=32)


SAMPLES = processes.Value("i", 0, lock=True)


def fit(fault: str = "") -> None:
    """Train, from the last checkpoint if there is one."""
    seed_everything(0)
    checkpoint = ModelCheckpoint("checkpoints", monitor="val_loss", save_last=True)
    trainer = Trainer(max_epochs=8, callbacks=[checkpoint], logger=False, **QUIET)
    trainer.fit(Net(fault), datamodule=Data(), ckpt_path="last")


def begin(function: Callable[..., None], folder: Path, *args: Any) -> BaseProcess:
    """Start a function in a new process in a folder, without output."""

    def called() -> None:
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
        warnings.simplefilter("ignore")
        function(*args)

    process = processes.Process(target=called)
    process.start()
    return process


def code_of(function: Callable[..., None], folder: Path, *args: Any) -> int | None:
    """Run a function in a new process and return its exit code."""
    process = begin(function, folder, *args)
    process.join(300)
    return process.exitcode


def weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint."""
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two sets of weights have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kill_and_resume(folder: Path, trials: int) -> str:
    """Kill runs at random moments, resume them, and compare the final weights with those of an uninterrupted run."""
    (folder / "whole").mkdir()
    began = time.monotonic()
    code_of(fit, folder / "whole")
    seconds, draw, same, killed = time.monotonic() - began, random.Random(0), 0, 0
    while killed < trials:
        each = Path(tempfile.mkdtemp(dir=folder))
        process = begin(fit, each)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            continue
        killed += 1
        code_of(fit, each)
        ends = [weights(run / "checkpoints" / "last.ckpt") for run in (folder / "whole", each)]
        same += equal(*ends)
    return f"{same}/{killed}"


def kill_while_writing(folder: Path, kills: int) -> str:
    """Kill a process while it writes checkpoints, with TMPDIR on another file system, and load the file."""
    path, draw, whole = folder / "last.ckpt", random.Random(0), 0
    elsewhere = tempfile.mkdtemp(dir="/dev/shm")

    def write() -> None:
        os.environ["TMPDIR"], tempfile.tempdir = elsewhere, None
        while True:
            TorchCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(1_000_000)}}, path)

    for _ in range(kills):
        process = begin(write, folder)
        while not path.is_file():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        with contextlib.suppress(Exception):
            whole += equal(weights(path), {"weight": torch.ones(1_000_000)})
        path.unlink()
    return f"{whole}/{kills} load"


def flip_bits(folder: Path, flips: int) -> str:
    """Flip one bit of a checkpoint and load it, many times."""
    code_of(fit, folder)
    path = folder / "checkpoints" / "last.ckpt"
    content, expected, draw, silent = path.read_bytes(), weights(path), random.Random(1), 0
    for _ in range(flips):
        position = draw.randrange(8 * len(content))
        bad = bytearray(content)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with contextlib.suppress(Exception):
            silent += not equal(weights(path), expected)
    return f"{silent}/{flips} load with other weights and no error"


def train_with_nan(folder: Path) -> str:
    """Train with a loss that is NaN once."""
    code = code_of(fit, folder, "nan")
    spoiled = any(not value.isfinite().all() for value in weights(folder / "checkpoints" / "last.ckpt").values())
    return f"exit code {code}, last.ckpt {'holds' if spoiled else 'has no'} NaN"


def send_sigterm(folder: Path) -> str:
    """Send SIGTERM in the first epoch."""
    code = code_of(fit, folder, "sigterm")
    return f"exit code {code}, {len(list(folder.rglob('*.ckpt')))} checkpoints"


def score_random_weights(folder: Path) -> str:
    """Test without a checkpoint, from the command line."""

    def test() -> None:
        LightningCLI(Net, Data, args=["test", "--trainer.logger=false"], save_config_callback=None)

    before = SAMPLES.value
    code = code_of(test, folder)
    return f"exit code {code}, {SAMPLES.value - before} samples scored with random weights"


def score_on_two_processes(folder: Path) -> str:
    """Test seven samples on two processes."""

    def test() -> None:
        Trainer(devices=2, strategy="ddp_fork", logger=False, **QUIET).test(Net(), datamodule=Data())

    before = SAMPLES.value
    code = code_of(test, folder)
    return f"exit code {code}, 7 samples count as {SAMPLES.value - before}"


def start_together(folder: Path) -> str:
    """Start 20 trainers at the same time and count their log directories."""
    barrier = processes.Barrier(20)

    def make() -> None:
        trainer = Trainer(default_root_dir=folder, **QUIET)
        barrier.wait()
        assert trainer.logger is not None
        trainer.logger.log_metrics({"loss": 0.0}, step=0)
        trainer.logger.save()

    for process in [begin(make, folder) for _ in range(20)]:
        process.join()
    return f"{len(list((folder / 'lightning_logs').iterdir()))} directories"


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser()
    for name, many in (("trials", 20), ("flips", 300), ("kills", 50)):
        parser.add_argument(f"--{name}", type=int, default=many)
    args = parser.parse_args()
    cases: dict[str, Callable[[Path], str]] = {
        "kill -9 at random moments: the same bits": lambda folder: kill_and_resume(folder, args.trials),
        "kill -9 while writing, other TMPDIR": lambda folder: kill_while_writing(folder, args.kills),
        "flipped bits": lambda folder: flip_bits(folder, args.flips),
        "a loss that is NaN": train_with_nan,
        "SIGTERM in the first epoch": send_sigterm,
        "test without a checkpoint": score_random_weights,
        "7 test samples on 2 processes": score_on_two_processes,
        "20 runs started at once": start_together,
    }
    print(f"| case | Lightning {lightning.__version__}, torch {torch.__version__} |\n|---|---|")
    for case, measure in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {case} | {measure(Path(folder))} |", flush=True)


if __name__ == "__main__":
    main()
