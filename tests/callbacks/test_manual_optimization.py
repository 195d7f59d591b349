"""With manual optimisation, values that callbacks log are drawn at the index of the batch, where `train/*` is."""

import math
from contextlib import suppress

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from firstlight import callbacks
from firstlight.checkpoints.io import first_index
from firstlight.loggers import MetricsCSV
from tests.helpers import logged

BATCHES = 32


class Manual(LightningModule):
    """Two optimisers: `plan(batch_idx)` returns which of them step in a batch, in order."""

    def __init__(self, plan):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)
        self.plan = plan
        self.norms = {}

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        loss = (self.first(batch[0]) + self.second(batch[0])).square().mean()
        self.manual_backward(loss)
        self.log("train/loss", loss)
        for place, index in enumerate(self.plan(batch_idx)):
            if place:
                self.manual_backward((self.first(batch[0]) + self.second(batch[0])).square().mean())
            grads = [p.grad for group in optimizers[index].param_groups for p in group["params"]]
            norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
            self.norms.setdefault((index, batch_idx + BATCHES * self.current_epoch), norm)
            optimizers[index].step()
            optimizers[index].zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.first, self.second)]


def fit(module, folder, *more, every=1, epochs=1, ckpt=None, **options):
    inputs = torch.randn(2 * BATCHES, 3, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        max_epochs=epochs,
        log_every_n_steps=every,
        accelerator="cpu",
        logger=MetricsCSV(folder / "metrics.csv"),
        callbacks=[callbacks.GradientNorm(per_block=False), callbacks.LearningRate(), *more],
        enable_checkpointing=bool(more),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs), 2), ckpt_path=ckpt, weights_only=True)


def steps(folder, name):
    return [step for step, _ in logged(folder, name)]


PLANS = {
    "own accumulation of 4": lambda i: [0, 1] if i % 4 == 3 else [],
    "two steps of a critic a batch": lambda i: [0, 0, 1],
    "a generator in every fifth batch": lambda i: [0, 1] if i % 5 == 4 else [0],
    "the first optimiser in every fifth batch": lambda i: [0, 1] if i % 5 == 4 else [1],
    "in turn": lambda i: [i % 2],
}


@pytest.mark.parametrize("plan", PLANS)
def test_each_logged_norm_is_that_of_the_first_step_in_its_batch(plan, tmp_path):
    module = Manual(PLANS[plan])
    fit(module, tmp_path)
    assert steps(tmp_path, "train/loss") == list(range(BATCHES))
    for index in (0, 1):
        expected = [(batch, pytest.approx(norm)) for (own, batch), norm in module.norms.items() if own == index]
        assert logged(tmp_path, f"grad_norm/{index}/total") == expected
    assert steps(tmp_path, "lr") == [batch for batch in range(BATCHES) if PLANS[plan](batch)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("every", [3, 7])
def test_each_logged_index_has_one_norm_at_the_first_step_from_then_on(every, plan, tmp_path):
    fit(Manual(PLANS[plan]), tmp_path, every=every, epochs=2)
    due = list(range(every - 1, 2 * BATCHES, every))
    assert steps(tmp_path, "train/loss") == due
    for index in (0, 1):
        stepped = [batch for batch in range(2 * BATCHES) if index in PLANS[plan](batch % BATCHES)]
        later = [next((batch for batch in stepped if batch >= each), None) for each in due]
        assert steps(tmp_path, f"grad_norm/{index}/total") == [
            each for each in dict.fromkeys(later) if each is not None
        ]


@pytest.mark.parametrize("plan", PLANS)
def test_last_checkpoint_is_written_at_the_first_step_from_each_nth_batch_on(plan, tmp_path):
    class Last(callbacks.LastCheckpoint):
        def write(self, trainer):
            written.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1)
            super().write(trainer)

    written = []
    fit(Manual(PLANS[plan]), tmp_path, Last(tmp_path, every_n_steps=7, every_seconds=0))
    due = [next(batch for batch in range(BATCHES) if batch >= each and PLANS[plan](batch)) for each in (6, 13, 20, 27)]
    # The last one is written when the epoch ends.
    assert written == [*due, BATCHES - 1]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("batches", [12, BATCHES])
def test_a_resumed_run_logs_at_the_same_batches(batches, tmp_path):
    class Until(callbacks.LastCheckpoint):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            if batch_idx + 1 == batches < BATCHES:
                raise KeyboardInterrupt

    plan = PLANS["own accumulation of 4"]
    fit(Manual(plan), tmp_path / "whole", every=5, epochs=2)
    with suppress(SystemExit):
        fit(Manual(plan), tmp_path / "parts", Until(tmp_path / "ckpt", every_n_steps=batches), every=5)
    path = tmp_path / "ckpt" / "last.ckpt"
    assert first_index(path) == batches
    fit(Manual(plan), tmp_path / "parts", every=5, epochs=2, ckpt=path)
    for name in ("grad_norm/0/total", "lr"):
        assert steps(tmp_path / "parts", name) == steps(tmp_path / "whole", name)
