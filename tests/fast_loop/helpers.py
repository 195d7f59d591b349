"""Fits with the fast loop and with Lightning's, of modules and callbacks that record what is called."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger

from firstlight.fast_loop import fast_loop

HOOKS = [name for name in dir(Callback) if name.startswith("on_") and "checkpoint" not in name]


class Recording(Callback):
    """Records each hook, the name under which the module would log in it, and its arguments."""

    def __init__(self):
        self.seen = []


def recording(name):
    def hook(self, trainer, pl_module, *args, **kwargs):
        given = [(type(each).__name__, each if isinstance(each, int) else None) for each in args]
        self.seen.append((name, pl_module._current_fx_name, given, sorted(kwargs)))

    return hook


for each in HOOKS:
    setattr(Recording, each, recording(each))


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
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.seen.append(("zero", self._current_fx_name, type(optimizer).__name__))

    def on_after_backward(self):
        self.log("after", 1.0)


class Rows(Logger):
    """Keeps every row that is logged, with its step."""

    name, version = "rows", 0

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def fitted(tmp_path, is_fast, kind=Busy, *more, reason=None, ckpt_path=None, **options):
    """Fit a module; return it, what was recorded, and the trainer. `reason` is why the fast loop is not used."""
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
        **{"limit_val_batches": 2, "logger": [Rows(), Rows()], "enable_checkpointing": False, **options},
    )
    if is_fast:
        with fast_loop(trainer) as active:
            trainer.fit(module, ckpt_path=ckpt_path)
        assert active.reason == reason, active.reason
    else:
        trainer.fit(module, ckpt_path=ckpt_path)
    return module, recording, trainer


def same(one, other):
    """Compare nested values, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(fast, plain):
    """Compare two fits: hooks, weights, optimizer, counters, and all that was logged."""
    (module, recording, trainer), (was, before, by_lightning) = fast, plain
    assert recording.seen == before.seen and module.seen == was.seen
    assert same(module.state_dict(), was.state_dict())
    assert same(trainer.optimizers[0].state_dict(), by_lightning.optimizers[0].state_dict())
    assert trainer.fit_loop.state_dict() == by_lightning.fit_loop.state_dict()
    for metrics in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert same(getattr(trainer, metrics), getattr(by_lightning, metrics)), metrics
    rows = [each.rows for each in trainer.loggers if isinstance(each, Rows)]
    assert same(rows, [each.rows for each in by_lightning.loggers if isinstance(each, Rows)])


class Scheduled(Busy):
    """Steps its schedule with its optimiser, and logs in validation, on step and epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)["x"]
        if batch_idx:
            self.log("val", loss, on_step=True, on_epoch=True, prog_bar=True)

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(("validated", self._current_fx_name, batch_idx, self.lr_schedulers().get_last_lr()))
