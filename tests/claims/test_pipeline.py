"""Chapter 7: the best checkpoint."""

import torch

from firstlight.callbacks import BestCheckpoint, LastCheckpoint
from firstlight.checkpoints.io import read_checkpoint_metrics
from firstlight.data import Digits
from firstlight.networks import MLP
from firstlight.schedules import Constant
from tests.claims.training import SMALL, fit, loss


def test_best_checkpoint_beats_the_last_one_when_the_run_overfits(tmp_path):
    data = Digits(**SMALL)
    callbacks = [BestCheckpoint("val/loss", "min", tmp_path), LastCheckpoint(tmp_path)]
    task = fit(lambda: MLP(64, [256, 128], 10), data, seed=0, epochs=60, schedule=Constant(), callbacks=callbacks)
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    assert read_checkpoint_metrics(best)["epoch"] < read_checkpoint_metrics(last)["epoch"] == 60
    # Measured over six seeds, best divided by last: 0.62 to 0.75 for validation, 0.66 to 0.80 for test.
    assert read_checkpoint_metrics(best)["val/loss"] < 0.85 * read_checkpoint_metrics(last)["val/loss"]
    test_losses = []
    for path in (best, last):
        task.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        test_losses.append(loss(task, data, "test"))
    assert test_losses[0] < 0.9 * test_losses[1]
