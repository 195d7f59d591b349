"""Nothing that a part or a command changes in the process outlives the call."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from firstlight import callbacks
from firstlight.__main__ import main
from firstlight.cli.side_effects import without_side_effects
from firstlight.data import Digits, Tensors
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, called, newest


def state():
    names = ("lightning", "lightning.pytorch", "lightning.fabric", "firstlight", "torch")
    return {
        "warning filters": list(warnings.filters),
        "excepthooks": (sys.excepthook, threading.excepthook),
        "log levels": {name: logging.getLogger(name).level for name in names},
        "environment": dict(os.environ),
        "path": list(sys.path),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "flags": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


FIT = ["fit", "--config", CONFIG, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


@pytest.mark.parametrize(
    "args",
    [
        [*FIT, "--trainer.deterministic=true"],
        ["check", *FIT[1:]],
        ["lr", *FIT[1:]],
        ["fit", "--config", CONFIG, "--data.batch_size=0"],
        ["fit", "--config", "missing.yaml"],
    ],
    ids=["fit", "check", "lr", "refused", "no file"],
)
def test_a_command_leaves_the_process_as_it_was(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Lightning 2.6.6 sets this variable when it is imported.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.set_start_method(None, force=True)
    before = state()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    main(args)
    assert state() == before
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))


def test_parts_change_nothing_when_they_are_built():
    before = state()
    task = Classification(
        MLP(4, [8], 2), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), Constant(), classes=2
    )
    callbacks.defaults(task)
    Digits()
    Tensors(np.ones((40, 4), np.float32), (torch.arange(40) % 2).numpy()).setup()
    assert state() == before


def test_default_root_dir_is_refused(tmp_path):
    done = called(*FIT, "--trainer.default_root_dir=elsewhere", cwd=tmp_path, code=2)
    assert "trainer.default_root_dir=elsewhere is not used: --runs DIR is the folder of all runs" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "line", "told"),
    [
        ("import torch\nimport pandas_not_there\n", 2, "ModuleNotFoundError: No module named 'pandas_not_there'"),
        ("import torch\n\n{}['key']\n", 3, "KeyError: 'key'"),
        ("from torch import NotThere\n", 1, "ImportError: cannot import name 'NotThere'"),
        ("def f(:\n", 1, "SyntaxError: invalid syntax"),
        ("import torch\ntorch.ones(2) @ torch.ones(3)\n", 2, "RuntimeError: inconsistent tensor size"),
    ],
)
@pytest.mark.parametrize("option", ["model", "data", "model.network", "model.loss"])
def test_an_error_in_a_user_module_keeps_its_message_and_line(option, source, line, told, tmp_path):
    (tmp_path / "bad_mod.py").write_text(source + "class Part:\n    pass\n")
    done = called("fit", "--config", CONFIG, f"--{option}=bad_mod.Part", cwd=tmp_path, code=2)
    assert done.stderr.startswith(f"firstlight: {option}: importing it failed in bad_mod.py, line {line}: {told}")
    assert done.stderr.count("\n") == 1


def test_known_warnings_are_silent_and_others_are_not():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_side_effects():
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
    assert [str(each.message) for each in shown] == ["another warning"]


OWN = """
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pathlib import Path
from mine import Plain


class Long(Plain):
    def training_step(self, batch, batch_idx):
        (Path("x" * 300)).read_text()


class Setup(Plain):
    def setup(self, stage):
        raise MisconfigurationException("my own rule")


class Restored(Plain):
    def on_load_checkpoint(self, checkpoint):
        torch.nn.functional.cross_entropy(torch.zeros(2), torch.zeros(3).long())
"""


@pytest.mark.parametrize(
    ("module", "verb", "kind", "line"),
    [("Long", "fit", OSError, 9), ("Setup", "fit", Exception, 14), ("Setup", "check", Exception, 14)],
)
def test_an_exception_of_the_users_code_keeps_its_traceback(module, verb, kind, line, tmp_path):
    shutil.copy(Path(__file__).parent / "run" / "foreign_modules.py", tmp_path / "mine.py")
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(kind) as raised:
        called(verb, "--model", f"own.{module}", "--data", "mine.Data", "--trainer.max_epochs=1", cwd=tmp_path)
    assert not isinstance(raised.value, UsageError)
    assert [each.lineno + 1 for each in raised.traceback if each.path.name == "own.py"] == [line]


def test_an_exception_while_the_users_code_restores_keeps_its_traceback(tmp_path):
    shutil.copy(Path(__file__).parent / "run" / "foreign_modules.py", tmp_path / "mine.py")
    (tmp_path / "own.py").write_text("import torch\n" + OWN)
    options = ["--model=own.Restored", "--data=mine.Data", "--trainer.max_epochs=1"]
    called("fit", *options, cwd=tmp_path)
    with pytest.raises(Exception, match="target") as raised:
        called("fit", "--run", str(newest(tmp_path, "unnamed")), "--trainer.max_epochs=2", cwd=tmp_path)
    assert [each.lineno + 1 for each in raised.traceback if each.path.name == "own.py"] == [20]


def test_a_name_that_is_too_long_for_a_file_of_a_command_is_one_line(tmp_path):
    done = called("fit", "--config", CONFIG, "--experiment", "x" * 300, cwd=tmp_path, code=2)
    assert "File name too long" in done.stderr and done.stderr.count("\n") == 1
