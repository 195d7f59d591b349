"""What the bar and the lines of a fit show, compared with what was logged."""

import re
from math import inf

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from firstlight.callbacks import BestCheckpoint, Progress
from firstlight.errors import printing
from firstlight.loggers import History

VALUES = [0.5, 0.25, 0.75, 0.125, 0.375, 0.625]


class Told(LightningModule):
    """A module whose losses are numbers that a test knows."""

    monitor, mode = "val/loss", "min"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.validations = 0

    def training_step(self, batch, batch_idx):
        self.log("train/loss", float(self.global_step))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", VALUES[self.validations % len(VALUES)])

    def on_validation_epoch_end(self):
        self.validations += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, bar, others=(), **options):
    options = {"max_epochs": 3, "log_every_n_steps": 2, "num_sanity_val_steps": 0, "logger": History(), **options}
    data = DataLoader(TensorDataset(torch.zeros(4, 1)), 1)
    best = BestCheckpoint("val/loss", "min", tmp_path / "checkpoints")
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[bar, *others, best], **options)
    trainer.fit(Told(), data, data)


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if re.match("epoch|valid", line)]


def test_a_file_gets_one_line_for_each_epoch(tmp_path, capsys):
    fit(tmp_path, Progress())
    found = lines(capsys)
    assert [re.sub(r"\d\d:\d\d", "TIME", line) for line in found] == [
        "epoch  1/3, step 4, train/loss 3, val/loss 0.5, best val/loss 0.5, TIME left",
        "epoch  2/3, step 8, train/loss 7, val/loss 0.25, best val/loss 0.25, TIME left",
        "epoch  3/3, step 12, train/loss 11, val/loss 0.75, best val/loss 0.25, TIME left",
    ]


def test_a_dumb_terminal_gets_lines_and_another_terminal_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    fit(tmp_path, Progress(redraw_every=0.0))
    assert len(lines(capsys)) == 3
    monkeypatch.setenv("TERM", "xterm")
    fit(tmp_path / "bar", Progress(redraw_every=0.0))
    printed = capsys.readouterr().err
    assert "\r" in printed and "epoch  " not in printed
    last = printed.split("\r")[-3]  # Then the bar is removed.
    assert re.search(r"100%\|.*\| 00:00 left, epoch 3/3, train/loss 10, val/loss 0.25, best 0.25", last), last


def test_a_line_leaves_out_metrics_of_earlier_epochs(tmp_path, capsys):
    fit(tmp_path, Progress(), max_epochs=4, check_val_every_n_epoch=2, log_every_n_steps=8)
    shown = [re.findall(r"(?:^|, )((?:train|val)/loss [\d.]+)", line) for line in lines(capsys)]
    assert shown == [[], ["train/loss 7", "val/loss 0.5"], [], ["train/loss 15", "val/loss 0.25"]]


def test_a_validation_within_an_epoch_has_a_line_of_its_own(tmp_path, capsys):
    fit(tmp_path, Progress(), max_epochs=2, val_check_interval=2)
    found = lines(capsys)
    assert [line.split(",")[0] for line in found] == ["valid  1/2", "epoch  1/2", "valid  2/2", "epoch  2/2"]
    assert [re.search(", val/loss ([\\d.]+), best val/loss ([\\d.]+)", line).groups() for line in found] == [
        ("0.5", "0.5"), ("0.25", "0.25"), ("0.75", "0.25"), ("0.125", "0.125"),
    ]  # fmt: skip


def test_a_nan_is_never_the_best_so_far(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(globals(), "VALUES", [float("nan"), 0.5, float("nan")])
    fit(tmp_path, Progress())
    assert [re.search("val/loss nan|val/loss [\\d.]+", line)[0] for line in lines(capsys)] == [
        "val/loss nan", "val/loss 0.5", "val/loss nan",
    ]  # fmt: skip


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_shows_neither_bar_nor_line(is_terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with printing("quiet"):
        fit(tmp_path, Progress(redraw_every=0.0))
    printed = capsys.readouterr().err
    assert "left" not in printed and "epoch" not in printed


@pytest.mark.parametrize(("last_step", "times"), [(inf, ["02:00", "01:00", "00:00"]), (8, ["01:00", "00:00"])])
def test_the_time_left_is_that_of_the_steps_that_are_left(last_step, times, tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("firstlight.callbacks.progress.time.monotonic", lambda: clock[0])

    class Tick(Callback):
        def on_train_batch_end(self, trainer, *args):
            clock[0] += 15.0
            trainer.should_stop = trainer.global_step >= last_step

    bar = Progress()
    bar.last_step = last_step
    fit(tmp_path, bar, others=[Tick()])
    found = lines(capsys)
    assert [re.search(r"(\d\d:\d\d) left", line)[1] for line in found] == times
    assert all(f"/{len(times)}, step" in line for line in found)
