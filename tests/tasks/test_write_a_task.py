"""The page docs/write_a_task.md, followed word for word."""

import csv
import re
import shlex
import sys
from contextlib import chdir

import numpy as np
import torch

import firstlight
from tests.helpers import ROOT, called, newest

PAGE = (ROOT / "docs" / "write_a_task.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def outline(text):
    """Return the lines of an output without its numbers, times and values of the learning rate."""
    lines = [re.sub(r"[\d.,e-]*\d[\d.,e_-]*", "#", line) for line in text.strip().splitlines()]
    return [line for line in lines if not line.startswith("the plan changes")]  # `logging` writes it.


def test_page_gives_a_task_that_trains_predicts_resumes_and_loads(tmp_path):
    (code,), (config,) = blocks("python"), blocks("yaml")
    (tmp_path / "my_project.py").write_text(code)
    (tmp_path / "vae.yaml").write_text(config)
    for commands, expected in zip(blocks("bash"), blocks("text"), strict=True):
        printed = ""
        for command in commands.strip().splitlines():
            program, *args = shlex.split(command)
            assert program == "firstlight"
            done = called(*args, cwd=tmp_path, code=2 if expected.startswith("firstlight:") else 0)
            printed += done.stdout + "".join(
                each for each in done.stderr.splitlines(True) if not each.startswith("epoch ")
            )
        assert outline(printed) == outline(expected)
    run = newest(tmp_path, "vae")
    with open(run / "metrics.csv", newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "reconstruction", "kl")} <= names
    with open(next(run.glob("evaluations/predict-*/predictions.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 270 and rows[0].keys() == {"index", "label", *(f"code/{i}" for i in range(4))}
    with chdir(tmp_path):
        sys.path.insert(0, str(tmp_path))
        try:
            from my_project import Autoencoding

            path = run / "checkpoints" / "best.ckpt"
            task = Autoencoding.load_from_checkpoint(path, trust=["my_project"], prepared_inputs=True)
            predicted = firstlight.load(path, trust=["my_project"]).predict(np.zeros((2, 1, 8, 8), np.uint8))
        finally:
            sys.path.remove(str(tmp_path))
            sys.modules.pop("my_project", None)
    assert task.monitor == "val/reconstruction" and task.mode == "min"
    assert task(torch.zeros(2, 1, 8, 8))[1].shape == (2, 1, 8, 8)
    assert [*predicted.columns] == [f"code/{i}" for i in range(4)]
