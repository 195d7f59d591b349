import sys
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from firstlight import callbacks
from firstlight.__main__ import main
from firstlight.callbacks.defaults import DEFAULTS
from firstlight.callbacks.gradient_norm import let_fused_optimisers_clip, norms
from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.loggers import MetricsCSV
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, Ranks, called, logged, newest


class Foreign(LightningModule):
    """A foreign module with two parameter groups that have different rates."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.head(self.body(inputs).tanh()), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(
            [{"params": self.body.parameters(), "lr": 0.1}, {"params": self.head.parameters()}], 0.01
        )


def loader(batch_size):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size)


def fit(module, tmp_path, *, batch_size=8, data=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, **options}
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, *([loader(batch_size)] if data is None else []), datamodule=data)
    return trainer


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradient_norm_is_that_of_the_accumulated_batch_before_clipping(accumulate, clip, tmp_path):
    torch.manual_seed(0)
    module = Foreign()
    inputs, targets = next(iter(loader(8 * accumulate)))
    nn.functional.mse_loss(module.head(module.body(inputs).tanh()), targets).backward()
    expected = {
        "body": torch.cat([p.grad.flatten() for p in module.body.parameters()]).norm().item(),
        "head": torch.cat([p.grad.flatten() for p in module.head.parameters()]).norm().item(),
        "total": torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item(),
    }
    module.zero_grad()
    fit(
        module,
        tmp_path,
        callbacks=[callbacks.GradientNorm()],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        max_steps=1,
    )
    for name, value in expected.items():
        assert logged(tmp_path, f"grad_norm/{name}") == [(0, pytest.approx(value, rel=1e-5))]


def test_gradient_norm_in_mixed_precision_is_close_to_that_in_full_precision(tmp_path):
    torch.manual_seed(0)
    module = Foreign()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    norms = []
    for number, precision in enumerate(("32-true", "bf16-mixed")):
        module.load_state_dict(state)
        fit(
            module,
            tmp_path / str(number),
            callbacks=[callbacks.GradientNorm(per_block=False)],
            precision=precision,
            max_steps=1,
        )
        norms += [value for _, value in logged(tmp_path / str(number), "grad_norm/total")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_gradient_norm_is_divided_by_the_scale_of_a_gradient_scaler(tmp_path):
    # Lightning turns 16-mixed on the CPU into bf16, so the test passes a scaler.
    torch.manual_seed(0)
    module = Foreign()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    norms = []
    for number, plugins in enumerate(
        ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))])
    ):
        module.load_state_dict(state)
        gradient_norm = callbacks.GradientNorm(per_block=False)
        fit(module, tmp_path / str(number), callbacks=[gradient_norm], plugins=plugins, max_steps=1)
        norms += [value for _, value in logged(tmp_path / str(number), "grad_norm/total")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradient_norm_of_two_processes_equals_that_of_one_with_the_same_batch(accumulate, tmp_path):
    # Batches are not shuffled: 32 samples on one process, 16 of them on each of two.
    options = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", f"--trainer.overfit_batches={accumulate}"]
    options.append(f"--trainer.accumulate_grad_batches={accumulate}")
    values = []
    for ranks, changes in ((1, ["--data.batch_size=32"]), (2, ["--data.batch_size=16", "--config", DDP])):
        args = ["fit", "--config", CONFIG, *options, "--model.network.dropout=0", *changes]
        Ranks(main, args, cwd=tmp_path, ranks=ranks).succeed()
        values += [value for _, value in logged(newest(tmp_path), "grad_norm/total")]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_gradient_norm_is_calculated_only_at_logged_steps(tmp_path, monkeypatch):
    calls = []
    original = nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda grads: calls.append(grads) or original(grads))
    module = Foreign()
    fit(module, tmp_path, batch_size=2, log_every_n_steps=4, callbacks=[callbacks.GradientNorm()])
    assert [step for step, _ in logged(tmp_path, "grad_norm/total")] == [3, 7, 11, 15]
    assert len(calls) == 4 * 2  # body and head


def test_gradient_norm_includes_parameters_that_are_added_during_the_fit(tmp_path):
    class Thawing(Foreign):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.optimizers().add_param_group({"params": self.body.parameters()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.01)

    fit(Thawing(), tmp_path, callbacks=[callbacks.GradientNorm()], max_steps=4)
    assert [step for step, _ in logged(tmp_path, "grad_norm/head")] == [0, 1, 2, 3]
    assert [step for step, _ in logged(tmp_path, "grad_norm/body")] == [2, 3]


def test_norms_are_right_for_half_precision_sparse_and_missing_gradients():
    half = torch.full((9,), 3e4, dtype=torch.float16)  # Its norm is too large for half precision.
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1, 2])).square().sum().backward()
    expected = table.weight.grad.to_dense().norm().item()
    assert norms({"half": [half]})["half"] == pytest.approx(9e4)
    assert norms({"sparse": [table.weight.grad]})["sparse"] == pytest.approx(expected)
    mixed = norms({"both": [half, torch.ones(9, dtype=torch.float64)], "none": []})
    assert mixed == {"total": mixed["both"], "both": pytest.approx((81e8 + 9) ** 0.5)}
    assert norms({"none": []}) == {"total": 0.0}


def test_different_learning_rates_have_one_curve_each(tmp_path):
    fit(Foreign(), tmp_path, callbacks=[callbacks.LearningRate()], max_steps=1)
    assert logged(tmp_path, "lr/0") == [(0, 0.1)]
    assert logged(tmp_path, "lr/1") == [(0, 0.01)]


def task():
    return Classification(
        MLP(64, [8], 10), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), Constant(), classes=10
    )


def test_defaults_follow_the_monitor_of_the_task(tmp_path):
    module = task()
    module.monitor, module.mode = "val/accuracy", "max"
    made = {type(callback): callback for callback in callbacks.defaults(module)}
    assert list(made) == list(DEFAULTS.values())
    assert (made[callbacks.EarlyStopping].monitor, made[callbacks.EarlyStopping].mode) == ("val/accuracy", "max")
    assert (made[callbacks.BestCheckpoint].monitor, made[callbacks.BestCheckpoint].mode) == ("val/accuracy", "max")


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_default_can_be_left_out(name):
    kinds = {type(callback) for callback in callbacks.defaults(task(), disable=[name])}
    gone = {DEFAULTS[name]} | ({callbacks.HParams} if name == "best" else set())
    assert kinds == set(DEFAULTS.values()) - gone


def test_an_unknown_default_callback_is_refused_with_a_suggestion():
    with pytest.raises(
        UsageError, match=r"^unknown default callback progres; available: early_stopping, .*; did you mean progress\?$"
    ):
        callbacks.defaults(task(), disable=["progres"])
    with pytest.raises(UsageError, match=r"; did you mean shutdown\?$"):
        callbacks.defaults(task(), shutdwn={"timeout": 9})


def test_default_callbacks_get_their_options(tmp_path):
    options = {"early_stopping": {"patience": 3}, "last": {"every_n_steps": 5}, "shutdown": {"timeout": 9}}
    made = {type(callback): callback for callback in callbacks.defaults(task(), tmp_path, **options)}
    assert made[callbacks.EarlyStopping].patience == 3
    assert made[callbacks.LastCheckpoint].every_n_steps == 5
    assert made[callbacks.GracefulShutdown].timeout == 9
    assert made[callbacks.HParams].best is made[callbacks.BestCheckpoint]
    assert {str(made[each].dirpath) for each in (callbacks.BestCheckpoint, callbacks.LastCheckpoint)} == {str(tmp_path)}


def test_lightning_calls_the_default_callbacks_in_the_order_of_the_registry(tmp_path):
    trainer = Trainer(logger=False, accelerator="cpu", callbacks=callbacks.defaults(task(), tmp_path))
    kinds = [type(each) for each in trainer.callbacks if type(each) in DEFAULTS.values()]
    checkpoints = [callbacks.BestCheckpoint, callbacks.LastCheckpoint, callbacks.GracefulShutdown]
    assert kinds == [kind for kind in DEFAULTS.values() if kind not in checkpoints] + checkpoints


def test_a_resumed_run_uses_its_present_patience():
    before, now = callbacks.EarlyStopping("val/loss", patience=2), callbacks.EarlyStopping("val/loss", patience=7)
    before.wait_count = 1
    now.load_state_dict(before.state_dict())
    assert (now.patience, now.wait_count) == (7, 1)


def test_a_fit_that_writes_no_checkpoint_warns(tmp_path):
    options = {"max_steps": 1, "logger": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), 4)
    with pytest.warns(UserWarning, match="this fit writes no checkpoint: add LastCheckpoint"):
        Trainer(callbacks=[callbacks.GracefulShutdown()], **options).fit(Foreign(), data)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this fit writes no checkpoint")
        Trainer(callbacks=[callbacks.LastCheckpoint(tmp_path), callbacks.GracefulShutdown()], **options).fit(
            Foreign(), data
        )


@pytest.mark.parametrize(("patience", "epochs"), [(0, 2), (1, 2), (2, 3)])
def test_a_run_stops_after_patience_validations_without_an_improvement(tmp_path, patience, epochs):
    class Constant(Foreign):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    stops = callbacks.EarlyStopping("val/loss", patience=patience)
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), 4)
    run = Trainer(max_epochs=9, logger=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[stops])
    run.fit(Constant(), data, data)
    assert run.current_epoch == epochs


def test_the_state_of_each_default_survives_a_round_trip(tmp_path):
    used = callbacks.defaults(task(), tmp_path)
    Trainer(max_epochs=2, logger=False, enable_model_summary=False, callbacks=used).fit(task(), Digits())
    moved = set()
    for seen, fresh in zip(used, callbacks.defaults(task(), tmp_path), strict=True):
        state = seen.state_dict()
        if state != fresh.state_dict():
            moved.add(type(seen).__name__)
        fresh.load_state_dict(state)
        state.pop("current_score", None)  # Lightning saves it and never reads it.
        assert fresh.state_dict() | state == fresh.state_dict()
    assert moved == {"EarlyStopping", "BestCheckpoint", "GradientNorm", "LearningRate", "Progress"}


def test_a_fit_in_a_program_writes_best_and_last(tmp_path):
    module = task()
    fit(
        module,
        tmp_path,
        data=Digits(),
        callbacks=callbacks.defaults(module, tmp_path, disable=["progress"]),
        max_epochs=2,
        enable_checkpointing=True,
    )
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


def fit_three_batches(bar, epochs):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        limit_train_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[bar],
    )
    trainer.fit(task(), datamodule=Digits())
    return trainer


def test_progress_counts_every_batch_and_shows_the_newest_validation(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit_three_batches(callbacks.Progress(redraw_every=0.0), epochs=2)
    printed = capsys.readouterr().err
    assert "100%" in printed
    assert "val/loss" in printed


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_disabled_progress_prints_nothing(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    bar = callbacks.Progress(redraw_every=0.0)
    bar.disable()
    fit_three_batches(bar, epochs=1)
    assert capsys.readouterr().err == ""


def test_a_batch_costs_progress_at_most_two_python_calls(monkeypatch):
    class Counts(callbacks.Progress):
        def on_train_batch_end(self, *args, **kwargs):
            names = []
            sys.setprofile(lambda frame, event, arg: names.append(frame.f_code.co_name) if event == "call" else None)
            super().on_train_batch_end(*args, **kwargs)
            sys.setprofile(None)
            calls.append(names)

    calls = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit_three_batches(Counts(redraw_every=1e9), epochs=2)
    assert calls == [["on_train_batch_end", "update"]] * 6


def test_a_shared_block_counts_once_in_the_total(tmp_path):
    class Tied(Foreign):
        def __init__(self):
            super().__init__()
            self.again = self.body

    torch.manual_seed(0)
    module = Tied()
    inputs, targets = next(iter(loader(8)))
    nn.functional.mse_loss(module.head(module.body(inputs).tanh()), targets).backward()
    expected = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
    module.zero_grad()
    # torch lists a shared child once; a wrapper around it is another child with the same parameters.
    module.again = nn.Sequential(module.body)
    fit(module, tmp_path, callbacks=[callbacks.GradientNorm()], max_steps=1)
    assert logged(tmp_path, "grad_norm/total") == [(0, pytest.approx(expected, rel=1e-5))]


def test_nothing_is_logged_with_log_every_n_steps_0(tmp_path):
    fit(task(), tmp_path, data=Digits(), callbacks=[callbacks.GradientNorm()], max_steps=2, log_every_n_steps=0)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("every", [0, 41])
def test_a_run_prints_that_it_logs_nothing_of_training(every, tmp_path):
    options = ["--trainer.max_epochs=1", f"--trainer.log_every_n_steps={every}"]
    printed = called("fit", "--config", CONFIG, *options, cwd=tmp_path).stdout
    assert f"log    no training metrics: --trainer.log_every_n_steps is {every}, the run has 40 steps\n" in printed


@pytest.mark.parametrize(("precision", "is_changed"), [("bf16-mixed", True), ("32-true", False)])
def test_only_mixed_precision_without_a_scaler_gets_the_plain_clipping(precision, is_changed):
    trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_progress_bar=False)
    plugin = let_fused_optimisers_clip(trainer).precision_plugin
    assert isinstance(plugin, MixedPrecision) == is_changed
    assert plugin.clip_gradients.__func__ is Precision.clip_gradients
