import math
import os
import re
import shutil
from pathlib import Path

import pytest
import sklearn.datasets
from torch import nn

from firstlight.__main__ import main
from firstlight.preflight.report import CHECKS, readable
from tests.helpers import CONFIG, ROOT, newest

FASHION = Path("/usr/share/datasets/fashion-mnist")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = {"digits_supcon", "diabetes", "corpus_lm", "digits_mlp_batchnorm"}


class Linear(nn.Module):
    """A network without a fault; each of its subclasses has one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.last(inputs.flatten(1))


class Unused(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(3, 3)


class Leaking(Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs).softmax(0)


class Noisy(Linear):
    """Dropout is not a fault."""

    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.1, self.training)


class Detached(Linear):
    def forward(self, inputs):
        return super().forward(inputs).detach()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(capsys, *args, code=0):
    """Return the lines of the table by check, and the error at the end."""
    assert main(["check", "--config", CONFIG, *args]) == code
    printed = capsys.readouterr()
    return {line.split()[0]: line for line in printed.out.splitlines()}, printed.err


def network(kind):
    return f"--model.network=tests.preflight.test_check.{kind.__name__}"


def test_good_experiment_passes_without_a_warning_and_leaves_no_files(capsys, caplog):
    table, error = checked(capsys)
    assert tuple(table) == CHECKS
    assert all(line.split()[1] == "ok" for line in table.values()), table
    assert error == "" and caplog.text == ""
    assert not os.listdir()


def figures(line):
    return [int(number.replace(",", "")) for number in re.findall(r"\b[\d,]+\b", line)]


def test_figures_of_the_table_are_those_of_the_run(capsys):
    table, _ = checked(capsys)
    samples = figures(table["data"])
    assert sum(samples) == len(sklearn.datasets.load_digits().target)
    batches = [math.ceil(size / 32) for size in samples[:2]]
    assert figures(table["batches"]) == batches
    needed, free = re.search(r"need about ([\d.]+) MB, (.*) free$", table["output"]).groups()
    assert free.split()[1] == readable(shutil.disk_usage(".").free).split()[1]
    assert main(["fit", "--config", CONFIG, "--trainer.max_epochs=1", "--disable=progress"]) == 0
    printed = capsys.readouterr().out
    assert f"{samples[0]:,} train, {samples[1]:,} val, {samples[2]:,} test samples" in printed
    assert f", {batches[0]} optimiser steps" in printed
    written = newest(".") / "checkpoints" / "last.ckpt"
    assert 1e6 * float(needed) == pytest.approx(3 * written.stat().st_size, rel=0.1)


def test_parameter_without_a_gradient_is_named(capsys):
    table, error = checked(capsys, network(Unused), code=2)
    assert "FAIL" in table["gradients"]
    assert "network.forgotten.weight, network.forgotten.bias" in table["gradients"]
    assert "network.last" not in table["gradients"]
    assert error == "firstlight: 1 of 10 checks failed: gradients\n"


def test_leak_between_samples_is_found(capsys):
    table, _ = checked(capsys, network(Leaking), code=2)
    assert "FAIL" in table["leak"]
    assert "Leaking mixes the samples" in table["leak"]
    assert re.search(r"replacing one of 8 samples changes the outputs of the others by [\d.]+% ", table["leak"])


def test_dropout_is_not_a_leak(capsys):
    table, _ = checked(capsys, network(Noisy))
    assert " ok " in table["leak"]


def test_batch_normalisation_skips_the_leak_check(capsys):
    table, _ = checked(capsys, "--model.network.norm=batch")
    assert "skipped  batch normalisation" in table["leak"]


@pytest.mark.parametrize("fault", [network(Detached), "--model.optimizer.lr=0"])
def test_task_that_cannot_overfit_a_batch_fails(fault, capsys):
    table, error = checked(capsys, fault, code=2)
    assert "FAIL" in table["overfit"]
    assert "falls by less than 10 %" in table["overfit"]
    assert "overfit" in error


def test_exploding_loss_fails(capsys):
    options = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    assert "FAIL" in checked(capsys, *options, code=2)[0]["overfit"]


def test_wrong_labels_end_the_check_before_the_dry_run(capsys):
    table, error = checked(capsys, "--model.classes=5", code=2)
    assert "FAIL" in table["data"]
    assert "classes=5" in table["data"]
    assert error == "firstlight: 1 of 3 checks failed: data; 7 more checks not tried\n"
    assert "overfit" not in table


@pytest.mark.parametrize("split", ["train", "val"])
def test_limit_that_leaves_no_batch_fails_in_check_and_fit(split, capsys):
    option = f"--trainer.limit_{split}_batches=0.001"
    assert "FAIL" in checked(capsys, option, code=2)[0]["start"]
    assert main(["fit", "--config", CONFIG, option]) == 2
    assert f"limit_{split}_batches" in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
@pytest.mark.parametrize(("split", "check"), [("training", "start"), ("validation", "batches")])
def test_split_without_a_batch_is_refused(split, check, capsys, monkeypatch):
    empty = split == "training"
    monkeypatch.setattr(
        "firstlight.data.loader.ResumableDistributedSampler.__len__", lambda self: 0 if self.shuffle is empty else 2
    )
    constant = "--model.schedule=firstlight.schedules.Constant"
    table = checked(capsys, constant, code=2)[0]
    assert "FAIL" in table[check]
    assert f"the {split} data has no batch" in table[check]
    assert main(["fit", "--config", CONFIG, constant]) == 2
    assert f"the {split} data has no batch" in capsys.readouterr().err
    assert not os.listdir()


def test_monitor_that_validation_does_not_log_is_refused(capsys):
    options = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/acuracy",
    ]
    table, _ = checked(capsys, *options, code=2)
    assert "val/acuracy" in table["monitors"]
    assert "did you mean val/accuracy?" in table["monitors"]
    assert main(["fit", "--config", CONFIG, *options]) == 2
    assert "ModelCheckpoint monitors val/acuracy" in capsys.readouterr().err
    assert not os.listdir()


def test_disk_without_room_is_refused(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    table, _ = checked(capsys, code=2)
    assert "FAIL     runs/digits_mlp has no room" in table["output"]
    assert main(["fit", "--config", CONFIG]) == 2
    assert "1,000 are free" in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.parametrize(
    "config",
    [config if config.stem in QUICK else pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS],
    ids=lambda path: path.stem,
)
def test_every_config_passes(config, tmp_path, monkeypatch, capsys):
    if str(FASHION) in config.read_text() and not FASHION.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    monkeypatch.chdir(ROOT)  # Paths in the files start there.
    code = main(["check", "--config", str(config), "--runs", str(tmp_path / "runs")])
    assert code == 0, capsys.readouterr()
    assert not os.listdir(tmp_path)
