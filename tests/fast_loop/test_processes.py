"""The fast loop on two processes does what Lightning's own does."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from firstlight.fast_loop import fast_loop
from tests.fast_loop.helpers import Recording, Scheduled
from tests.helpers import Ranks, quick_or_slow


def fit(is_fast, handles_signals):
    torch.manual_seed(0)
    module, recording, asked, reason = Scheduled(), Recording(), [], None
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), max_epochs=2, limit_train_batches=8, limit_val_batches=2,
        accumulate_grad_batches=3, gradient_clip_val=0.1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recording],
    )  # fmt: skip
    loop = trainer.fit_loop.epoch_loop
    broadcast = loop._broadcast_sigterm_tensor
    loop._broadcast_sigterm_tensor = lambda: asked.append(1) or broadcast()
    if is_fast:
        with fast_loop(trainer, handles_signals) as active:
            trainer.fit(module)
        reason = active.reason
    else:
        trainer.fit(module)
    found = {
        "seen": recording.seen,
        "weights": [value.tolist() for value in module.parameters()],
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "asked": len(asked),
        "reason": reason,
    }
    Path(str(trainer.global_rank)).write_text(json.dumps(found))


class LeavesOut(Scheduled):
    def training_step(self, batch, batch_idx):
        return None if self.trainer.global_rank == 0 and batch_idx == 2 else super().training_step(batch, batch_idx)


def leave_out():
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with (
        fast_loop(trainer, handles_signals=True),
        pytest.raises(RuntimeError, match=r"returned None|gloo|[Cc]onnection"),
    ):
        trainer.fit(LeavesOut())


def test_of_two_processes_none_leaves_out_a_step(tmp_path):
    Ranks(leave_out, cwd=tmp_path, ranks=2).succeed()


@pytest.mark.parametrize("handles_signals", quick_or_slow([True, False], [True]))
def test_two_processes_call_the_same_hooks_and_end_with_the_same_weights(handles_signals, tmp_path):
    found = {}
    for is_fast in (True, False):
        folder = tmp_path / str(is_fast)
        folder.mkdir()
        Ranks(fit, is_fast, handles_signals, cwd=folder, ranks=2).succeed()
        found[is_fast] = [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
    for fast, plain in zip(found[True], found[False], strict=True):
        assert fast["reason"] is None
        for name in ("seen", "weights", "logged"):
            assert fast[name] == plain[name]
        assert plain["asked"] == 14 and fast["asked"] == (0 if handles_signals else 14)
