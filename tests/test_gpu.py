"""What holds on a GPU; these tests want one: `CUDA_VISIBLE_DEVICES=0 pytest tests/test_gpu.py`."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from firstlight.callbacks.gradient_norm import norms
from firstlight.data import Digits
from firstlight.loggers import History
from tests.helpers import CONFIG, called, logged, newest, results
from tests.tasks.test_train_log import Saves, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
FUSED = "--model.optimizer.fused=true"
COMPILED = ["--trainer.callbacks+=firstlight.callbacks.Compile", "--trainer.callbacks.mode=reduce-overhead"]


def weights(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True, map_location="cpu")["state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batches(epochs=2, **options):
    """Return the batches of some epochs as `Loader` gives them on a GPU, and as the module gets them."""
    torch.manual_seed(0)
    data = Digits(batch_size=100, **options)
    data.trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    data.setup("fit")
    loader = data.train_dataloader()
    return [batch for _ in range(epochs) for batch in loader]


def test_samples_lie_on_the_device_as_they_were_loaded_and_come_in_the_same_order():
    there, here = batches(), batches(on_device=False)
    assert len(there) == len(here) == 26
    for one, other in zip(there, here, strict=True):
        assert one[0].is_cuda and one[1].is_cuda and not other[0].is_cuda
        assert one[0].dtype == other[0].dtype
        assert torch.equal(one[0].cpu(), other[0]) and torch.equal(one[1].cpu(), other[1])


class Unsynchronised(Callback):
    """Fails when anything waits for the device between two loggings."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        due = trainer.global_step % trainer.log_every_n_steps
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step and 0 < due < 9 else "default")
        self.steps += 0 < due < 9

    def on_validation_start(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")

    def on_train_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [[], ["--trainer.precision=bf16-mixed"], COMPILED], ids=["32", "bf16", "graphs"])
def test_nothing_waits_for_the_device_between_two_loggings(tmp_path, monkeypatch, options):
    seen = []
    init = Unsynchronised.__init__
    monkeypatch.setattr(Unsynchronised, "__init__", lambda self: seen.append(self) or init(self))
    watched = ["--trainer.callbacks+=tests.test_gpu.Unsynchronised", "--trainer.log_every_n_steps=10"]
    epochs = ["--trainer.max_epochs=3", FUSED]
    try:
        called("fit", "--config", CONFIG, *GPU, *epochs, *options, *watched, cwd=tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen[0].steps > 50


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fast_loop_gives_the_same_bits_as_lightning(tmp_path, monkeypatch, precision):
    options = [*GPU, "--trainer.max_epochs=2", "--trainer.deterministic=true", f"--trainer.precision={precision}"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    called("fit", "--config", CONFIG, *options, "--experiment=fast", cwd=tmp_path)
    monkeypatch.setattr("firstlight.fast_loop.find_change", lambda: "a test")
    called("fit", "--config", CONFIG, *options, "--experiment=plain", cwd=tmp_path)
    one, other = newest(tmp_path, "fast"), newest(tmp_path, "plain")
    assert same(weights(one), weights(other))
    for name in ("train/loss", "val/loss", "val/accuracy", "grad_norm/total"):
        assert logged(one, name) == logged(other, name) != []


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = [*GPU, "--trainer.deterministic=true", FUSED]
    more = "--trainer.max_epochs=4"
    called("fit", "--config", CONFIG, *options, more, "--experiment=whole", cwd=tmp_path)
    stopping = ["--trainer.callbacks+=tests.test_gpu.StopsAt", "--experiment=parts"]
    called("fit", "--config", CONFIG, *options, more, *stopping, cwd=tmp_path, code=143)
    run = newest(tmp_path, "parts")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 50
    called("fit", "--run", str(run), "--trainer.callbacks=null", cwd=tmp_path)
    assert same(weights(newest(tmp_path, "whole")), weights(run))


class StopsAt(Callback):
    """Ends a run within its second epoch, as SIGTERM does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 50:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("options", [[], COMPILED[:1], COMPILED], ids=["eager", "compiled", "graphs"])
def test_a_run_learns_is_tested_and_predicts(tmp_path, options):
    done = called("run", "--config", CONFIG, *GPU, FUSED, *options, cwd=tmp_path)
    run = newest(tmp_path)
    assert results(run)["metrics"]["test/accuracy"] > 0.96, done.stdout
    called("test", "--run", str(run), "--ckpt", "best", "--trainer.accelerator=cpu", cwd=tmp_path)
    (scored,) = (run / "evaluations").glob("test-*")
    assert abs(results(scored)["metrics"]["test/loss"] - results(run)["metrics"]["test/loss"]) < 1e-3
    called("predict", "--run", str(run), *GPU, cwd=tmp_path)


@pytest.mark.parametrize("options", [[], COMPILED], ids=["eager", "graphs"])
def test_a_step_that_is_not_finite_stops_the_run_and_its_layer_is_named(tmp_path, options):
    spoilt = ["--trainer.callbacks+=tests.test_gpu.Spoils", "--trainer.max_epochs=2", FUSED]
    failed = called("fit", "--config", CONFIG, *GPU, *spoilt, *options, cwd=tmp_path, code=1)
    assert "step 45 (epoch 2, batch_idx 5): the gradient is not finite" in failed.stderr
    assert "the first layer whose output is not finite: network" in failed.stderr


class Spoils(Callback):
    """Makes one weight infinite before a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 45:
            next(pl_module.network.parameters()).data[0] = float("inf")


def test_a_fit_is_checked(tmp_path):
    found = called("check", "--config", CONFIG, *GPU, cwd=tmp_path)
    assert "FAIL" not in found.stdout and "overfit" in found.stdout


def test_norms_wait_for_the_device_once():
    gradients = {name: [torch.randn(3, 4), torch.randn(5)] for name in ("body", "head")}
    on_device = {name: [gradient.cuda() for gradient in grads] for name, grads in gradients.items()}
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = norms(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found == pytest.approx(norms(gradients), rel=1e-5)
    assert len([each for each in waits if "called a synchronizing CUDA operation" in str(each.message)]) == 1


def test_a_fit_goes_on_with_what_was_not_logged(tmp_path):
    def fit(*callbacks, ckpt=None):
        history = History()
        options = {"logger": history, "log_every_n_steps": 15, "max_epochs": 2, "enable_checkpointing": False}
        fitted = Trainer(accelerator="gpu", devices=1, default_root_dir=tmp_path, callbacks=list(callbacks), **options)
        fitted.fit(make(), datamodule=Digits(batch_size=32), ckpt_path=ckpt)
        return dict(zip(*history["train/loss"], strict=True))

    for step in (7, 30):
        saves = Saves(tmp_path / f"{step}.ckpt", step)
        whole, rest = fit(saves), fit(ckpt=saves.path)
        assert rest == pytest.approx({at: loss for at, loss in whole.items() if at >= step - 1}, rel=1e-5)
