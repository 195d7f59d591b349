import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from firstlight.__main__ import main
from firstlight.errors import UsageError
from firstlight.preflight.rules import checkpoint_bytes, refuse_fewer_samples
from tests.helpers import CONFIG, ROOT

FASHION = Path("/usr/share/datasets/fashion-mnist")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = {"digits_supcon", "diabetes", "corpus_lm", "digits_mlp_batchnorm"}


class Linear(nn.Module):
    """The digits' base: each of the networks below has one fault."""

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
        return super().forward(inputs).softmax(0)


class Noisy(Linear):
    """Nothing is wrong with dropout."""

    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.1, self.training)


class Detached(Linear):
    def forward(self, inputs):
        return super().forward(inputs).detach()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(capsys, *args, code=0):
    """Return the lines of the table by check, and what was said at the end."""
    assert main(["check", "--config", CONFIG, *args]) == code
    printed = capsys.readouterr()
    return {line.split()[0]: line for line in printed.out.splitlines()}, printed.err


def network(kind):
    return f"--model.network=tests.preflight.test_check.{kind.__name__}"


def test_a_good_experiment_passes_and_leaves_nothing_behind(capsys):
    table, said = checked(capsys)
    assert list(table) == "options output data start monitors batches gradients leak overfit".split()
    assert all(line.split()[1] == "ok" for line in table.values()), table
    assert said == ""
    assert not os.listdir()


def test_a_parameter_without_a_gradient_is_named(capsys):
    table, said = checked(capsys, network(Unused), code=2)
    assert "FAIL" in table["gradients"]
    assert "network.forgotten.weight, network.forgotten.bias" in table["gradients"]
    assert "network.last" not in table["gradients"]
    assert said == "firstlight: 1 of 9 checks failed: gradients\n"


def test_a_leak_across_the_batch_is_found(capsys):
    table, _ = checked(capsys, network(Leaking), code=2)
    assert "FAIL" in table["leak"]
    assert "Leaking mixes the samples" in table["leak"]


def test_dropout_is_no_leak(capsys):
    table, _ = checked(capsys, network(Noisy))
    assert " ok " in table["leak"]


def test_batch_normalisation_skips_the_leak_and_says_so(capsys):
    table, _ = checked(capsys, "--model.network.norm=batch")
    assert "skipped  batch normalisation" in table["leak"]


@pytest.mark.parametrize("fault", [network(Detached), "--model.optimizer.lr=0"])
def test_a_batch_that_cannot_be_learned_fails(fault, capsys):
    table, said = checked(capsys, fault, code=2)
    assert "FAIL" in table["overfit"]
    assert "does not fall" in table["overfit"]
    assert "overfit" in said


def test_a_loss_that_explodes_fails(capsys):
    options = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30"]
    assert "FAIL" in checked(capsys, *options, code=2)[0]["overfit"]


def test_the_data_is_checked_first(capsys):
    table, _ = checked(capsys, "--model.classes=5", code=2)
    assert "FAIL" in table["data"]
    assert "classes=5" in table["data"]
    assert "overfit" not in table


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_limit_that_leaves_no_batch_fails_in_check_and_fit_alike(split, capsys):
    option = f"--trainer.limit_{split}_batches=0.001"
    assert "FAIL" in checked(capsys, option, code=2)[0]["start"]
    assert main(["fit", "--config", CONFIG, option]) == 2
    assert f"limit_{split}_batches" in capsys.readouterr().err
    assert not os.listdir()


def test_fewer_samples_than_processes_are_refused():
    refuse_fewer_samples({"train": 20, "val": 2}, 2)
    with pytest.raises(UsageError, match="the val split has 1 samples, so some of 2 processes have no batch"):
        refuse_fewer_samples({"train": 20, "val": 1}, 2)


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
@pytest.mark.parametrize(("split", "check"), [("training", "start"), ("validation", "batches")])
def test_a_split_without_a_batch_is_refused(split, check, capsys, monkeypatch):
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


def test_a_monitor_that_validation_does_not_log_is_refused(capsys):
    options = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/acuracy",
    ]
    table, _ = checked(capsys, *options, code=2)
    assert "val/acuracy" in table["monitors"]
    assert "did you mean val/accuracy?" in table["monitors"]
    assert main(["fit", "--config", CONFIG, *options]) == 2
    assert "ModelCheckpoint watches val/acuracy" in capsys.readouterr().err
    assert not os.listdir()


def test_a_disk_without_room_is_refused_with_path_and_bytes(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    table, _ = checked(capsys, code=2)
    assert "FAIL     runs/digits_mlp has no room" in table["output"]
    assert main(["fit", "--config", CONFIG]) == 2
    assert "1,000 are free" in capsys.readouterr().err
    assert not os.listdir()


def test_the_bytes_of_a_checkpoint_are_those_that_torch_writes(tmp_path):
    module = nn.Linear(300, 300)
    for kind, options in [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]:
        optimizer = kind(module.parameters(), lr=0.1, **options)
        module(torch.ones(1, 300)).sum().backward()
        estimated = checkpoint_bytes(module, lambda given, kind=kind, options=options: kind(given, lr=0.1, **options))
        optimizer.step()
        torch.save([module.state_dict(), optimizer.state_dict()], tmp_path / "file")
        assert estimated == pytest.approx((tmp_path / "file").stat().st_size, rel=0.05)


def test_a_read_only_folder_is_refused():
    Path("closed").mkdir()
    Path("closed").chmod(0o555)
    libc = ctypes.CDLL(None)
    command = [sys.executable, "-m", "firstlight", "fit", "--config", CONFIG, "--runs", "closed"]
    # root may write everywhere unless it gives CAP_DAC_OVERRIDE up: prctl(PR_CAPBSET_DROP, 1). Others may not anyway.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, preexec_fn=lambda: libc.prctl(24, 1, 0, 0, 0)
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "firstlight: cannot make the folder closed/digits_mlp: Permission denied\n"


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
