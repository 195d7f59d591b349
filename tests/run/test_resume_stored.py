"""Data that stays on disk trains to the bits of data in memory, and resumes with them within an epoch."""

import numpy as np
import pytest
import torch

from firstlight.__main__ import main
from tests.data.helpers import write_arrays, write_images, write_text
from tests.helpers import DDP, Ranks, called, newest

CLASSIFIER = [
    *("--model.class_path=firstlight.tasks.Classification", "--model.network=ConvNet", "--model.network.widths=[4]"),
    *("--model.loss=torch.nn.CrossEntropyLoss", "--model.optimizer=torch.optim.Adam", "--model.schedule=Constant"),
]
LANGUAGE = [
    *("--model.class_path=firstlight.tasks.LanguageModel", "--model.network=TransformerLM"),
    *("--model.network.width=8", "--model.network.layers=1", "--model.network.heads=2"),
    *("--model.loss=torch.nn.CrossEntropyLoss", "--model.loss.ignore_index=0"),
    *("--model.optimizer=torch.optim.Adam", "--model.schedule=Constant"),
]
STOP = """
import os, signal
from lightning.pytorch import Callback

class Stop(Callback):
    def __init__(self, step: int):
        self.step = step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def images(folder):
    return [*CLASSIFIER, "--data=ImageFolder", f"--data.path={write_images(folder / 'images', images=40)}"]


def arrays(folder):
    generator = np.random.default_rng(0)
    path = write_arrays(folder, X=generator.integers(0, 256, (120, 1, 8, 8), np.uint8), y=np.arange(120) % 3)
    return [*CLASSIFIER, "--data=Arrays", f"--data.path={path}"]


def text(folder):
    return [*LANGUAGE, "--data=Corpus", f"--data.path={write_text(folder)}", "--data.length=128", "--data.context=8"]


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("kind", "workers"), [(images, 1), (arrays, 0), (text, 1)])
def test_run_on_disk_stopped_within_an_epoch_ends_with_the_bits_of_one_in_memory(kind, workers, tmp_path):
    (tmp_path / "mine.py").write_text(STOP)
    options = ["fit", *kind(tmp_path), "--data.batch_size=16", "--trainer.max_epochs=2", "--last.min_seconds=0"]
    called(*options, "--data.in_memory=true", "--experiment=memory", cwd=tmp_path)
    disk = ["--data.in_memory=false", f"--data.num_workers={workers}", "--experiment=disk"]
    called(*options, *disk, "--trainer.callbacks+=mine.Stop", "--trainer.callbacks.step=3", cwd=tmp_path, code=143)
    stopped = newest(tmp_path, "disk")
    called("fit", "--run", str(stopped), "--trainer.callbacks=null", cwd=tmp_path)
    assert_equal(weights(stopped), weights(newest(tmp_path, "memory")))


@pytest.mark.slow  # Each starts six runs.
@pytest.mark.parametrize("kind", [text, images, arrays])
def test_two_processes_on_disk_resume_with_the_bits_of_two_in_memory(kind, tmp_path):
    (tmp_path / "mine.py").write_text(STOP)
    options = ["fit", *kind(tmp_path), "--data.batch_size=8", "--trainer.max_epochs=2", "--last.min_seconds=0"]
    options += ["--config", DDP]
    Ranks(main, [*options, "--data.in_memory=true", "--experiment=memory"], cwd=tmp_path, ranks=2).succeed()
    disk = ["--data.in_memory=false", "--data.num_workers=1", "--experiment=disk"]
    stop = ["--trainer.callbacks+=mine.Stop", "--trainer.callbacks.step=3"]
    assert Ranks(main, [*options, *disk, *stop], cwd=tmp_path, ranks=2).wait() == [143, 143]
    stopped = newest(tmp_path, "disk")
    Ranks(main, ["fit", "--run", str(stopped), "--trainer.callbacks=null"], cwd=tmp_path, ranks=2).succeed()
    assert_equal(weights(stopped), weights(newest(tmp_path, "memory")))
