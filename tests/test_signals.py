import re

import pytest
import torch

from tests.helpers import CONFIG, called, firstlight, newest

STOP = """
import os, signal
from lightning.pytorch import Callback


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 57])
def test_a_run_that_was_told_to_end_says_how_to_go_on_and_does_with_the_same_bits(step, tmp_path):
    (tmp_path / "mine.py").write_text(STOP)
    options = ["--trainer.max_epochs=2", "--seed_everything=3"]
    whole = ["fit", "--config", CONFIG, *options]
    called(*whole, cwd=tmp_path)
    expected = torch.load(newest(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    stop = ["--trainer.callbacks+=mine.Stop", f"--trainer.callbacks.step={step}"]
    done = firstlight(*whole, *stop, cwd=tmp_path, code=143)
    run = newest(tmp_path)
    assert re.search(rf"interrupted at step {step + 1}; go on with: firstlight fit --run \S*{run.name}\n", done.stdout)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step + 1
    called("fit", "--run", str(run), "--trainer.callbacks=[]", cwd=tmp_path)
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
