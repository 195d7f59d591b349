"""Fits with and without `lean`, of modules and callbacks that remember what is done with them."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from firstlight.lean import lean

HOOKS = [name for name in dir(Callback) if name.startswith("on_") and "checkpoint" not in name]


class Recording(Callback):
    """Remembers each hook with the name under which the module would log in it, and what it was given."""

    def __init__(self):
        self.seen = []


def remembering(name):
    def hook(self, trainer, pl_module, *args, **kwargs):
        given = [(type(each).__name__, each if isinstance(each, int) else None) for each in args]
        self.seen.append((name, pl_module._current_fx_name, given, sorted(kwargs)))

    return hook


for each in HOOKS:
    setattr(Recording, each, remembering(each))


class Busy(BoringModel):
    """Overrides hooks of a step, and logs in some of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(("start", self._current_fx_name, batch_idx))
        return -1 if batch_idx == 6 else None  # which ends the epoch

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.seen.append(("zero", self._current_fx_name, type(optimizer).__name__))

    def on_after_backward(self):
        self.log("after", 1.0)


def fitted(tmp_path, is_lean, kind=Busy, *more, **options):
    torch.manual_seed(0)
    module, recording, silent = kind(), Recording(), Callback()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=8,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[silent, recording, *more],
        **{"limit_val_batches": 2, "logger": False, "enable_checkpointing": False, **options},
    )
    if is_lean:
        with lean(trainer) as on:
            assert on, "Lightning's functions are others than those that `lean` was written for"
            trainer.fit(module)
    else:
        trainer.fit(module)
    return module, recording, trainer


class Scheduled(Busy):
    """Steps its schedule with its optimiser, and logs in validation, on step and epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)["x"]
        if batch_idx:
            self.log("val", loss, on_step=True, on_epoch=True)

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(("validated", self._current_fx_name, batch_idx, self.lr_schedulers().get_last_lr()))
