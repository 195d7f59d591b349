"""Two processes step without Lightning's overhead as they do with it."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from firstlight.lean import batches, lean
from tests.fast_loop.helpers import Recording, Scheduled
from tests.helpers import Ranks


def fit(is_lean, heeds_signals):
    torch.manual_seed(0)
    module, recording, asked, plain = Scheduled(), Recording(), [], []
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), max_epochs=2, limit_train_batches=8, limit_val_batches=2,
        accumulate_grad_batches=3, gradient_clip_val=0.1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recording],
    )  # fmt: skip
    loop = trainer.fit_loop.epoch_loop
    broadcast = loop._broadcast_sigterm_tensor
    loop._broadcast_sigterm_tensor = lambda: asked.append(1) or broadcast()
    is_plain = batches.is_plain
    batches.is_plain = lambda *given: plain.append(is_plain(*given)) or plain[-1]
    if is_lean:
        with lean(trainer, heeds_signals) as on:
            assert on
            trainer.fit(module)
    else:
        trainer.fit(module)
    found = {
        "seen": recording.seen,
        "weights": [value.tolist() for value in module.parameters()],
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "asked": len(asked),
        "plain": plain,
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
    with lean(trainer, heeds_signals=True), pytest.raises(RuntimeError, match=r"returned None|gloo|[Cc]onnection"):
        trainer.fit(LeavesOut())


def test_of_two_processes_none_leaves_out_a_step(tmp_path):
    Ranks(leave_out, cwd=tmp_path, ranks=2).succeed()


@pytest.mark.parametrize("heeds_signals", [True, False])
def test_two_processes_call_the_same_hooks_and_end_with_the_same_weights(heeds_signals, tmp_path):
    found = {}
    for is_lean in (True, False):
        folder = tmp_path / str(is_lean)
        folder.mkdir()
        Ranks(fit, is_lean, heeds_signals, cwd=folder, ranks=2).succeed()
        found[is_lean] = [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
    for lean_one, plain_one in zip(found[True], found[False], strict=True):
        assert lean_one["plain"] == [True, True] and plain_one["plain"] == []
        for name in ("seen", "weights", "logged"):
            assert lean_one[name] == plain_one[name]
        assert plain_one["asked"] == 14 and lean_one["asked"] == (0 if heeds_signals else 14)
