import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from firstlight import callbacks
from firstlight.__main__ import main
from firstlight.callbacks import nonfinite
from firstlight.callbacks.nonfinite import NonFinite, verdict
from firstlight.data import Digits
from firstlight.errors import TrainingError, UsageError
from firstlight.loggers import MetricsCSV
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, Ranks, logged, newest, quick_or_slow

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1)
ADAGRAD = partial(torch.optim.Adagrad, lr=0.01, weight_decay=0.1)


class Net(LightningModule):
    """A foreign module with a running mean."""

    def __init__(self, optimizer=ADAMW):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 1)
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.head(self.norm(self.body(inputs)).tanh()), targets)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


class Snapshots(Callback):
    """Weights, buffers and the optimiser's state before and after each batch."""

    def __init__(self):
        self.before, self.after = [], []

    def copy(self, module):
        return copy.deepcopy([module.state_dict(), *(each.state_dict() for each in module.trainer.optimizers)])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append(self.copy(module))

    def on_train_batch_end(self, trainer, module, *args):
        self.after.append(self.copy(module))


def loader(bad=3, batches=6):
    inputs = torch.randn(8 * batches, 4, generator=torch.Generator().manual_seed(0))
    targets = inputs.sum(1, keepdim=True)
    if bad is not None:
        inputs[8 * bad + 2, 1] = math.nan
    return DataLoader(TensorDataset(inputs, targets), 8)


def fit(module, tmp_path, *each, data=None, **options):
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(each),
        **{"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": False, **options},
    )
    loaders = {"train_dataloaders": loader() if data is None else data}
    trainer.fit(module, **({"datamodule": data} if isinstance(data, Digits) else loaders))
    return trainer


def scaling(init_scale, growth_interval=2000):
    # Lightning turns 16-mixed on the CPU into bf16, so the test passes a scaler.
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def flattened(states):
    return [
        value
        for state in states
        for value in torch.utils._pytree.tree_leaves(dict(state))
        if isinstance(value, torch.Tensor | float | int)
    ]


def assert_same_bits(one, other):
    pairs = list(zip(flattened(one), flattened(other), strict=True))
    assert pairs
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.fixture(params=["cpu", "device", "fast device"])
def where(request, monkeypatch):
    """Run on the CPU, or as on a device whose flags arrive late, or at once."""
    if request.param != "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    if request.param == "device":
        monkeypatch.setattr(nonfinite._Step, "arrived", lambda self: False)
    return request.param


@pytest.mark.parametrize("clip", [None, ("norm", 0.1), ("value", 0.1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_with_nan_stops_the_run_before_its_update_and_is_named(accumulate, clip, tmp_path):
    options = {"accumulate_grad_batches": accumulate}
    if clip:
        options |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    module, sound = Net(), Net()
    with pytest.raises(TrainingError) as raised:
        fit(module, tmp_path / "bad", NonFinite(), **options)
    message = str(raised.value)
    assert f"step {3 // accumulate} (epoch 1, batch_idx 3)" in message
    assert "the batch itself is not finite" in message
    assert "the first layer whose output is not finite: body (Linear)" in message
    assert len(message.splitlines()) <= 5
    fit(sound, tmp_path / "good", NonFinite(), data=loader(None), max_steps=3 // accumulate, **options)
    assert_same_bits([dict(module.named_parameters())], [dict(sound.named_parameters())])


@pytest.mark.parametrize("make", [ADAMW, SGD, ADAGRAD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_does_not_change_weights_moments_and_running_means(fused, make, where, tmp_path):
    seen = Snapshots()
    guard = NonFinite("skip")
    trainer = fit(Net(partial(make, fused=fused)), tmp_path, guard, seen)
    assert_same_bits(seen.before[3], seen.after[3])
    for sound in (2, 4):
        weights = [states[sound][0]["body.weight"] for states in (seen.before, seen.after)]
        assert not torch.equal(*weights)
    assert (guard.skipped, trainer.global_step) == (1, 6)
    assert {(step, 1.0) for step in (4, 5)} <= set(logged(tmp_path, "nonfinite/skipped"))


@pytest.mark.parametrize("make", [ADAMW, SGD, ADAGRAD])
@pytest.mark.parametrize("fused", [True, False])
def test_a_first_step_that_is_skipped_leaves_no_trace(fused, make, where, tmp_path):
    module, sound = Net(partial(make, fused=fused)), Net(partial(make, fused=fused))
    fit(module, tmp_path / "bad", NonFinite("skip"), data=loader(0))
    later = DataLoader(Subset(loader(None).dataset, range(8, 48)), 8)
    fit(sound, tmp_path / "good", NonFinite("skip"), data=later)
    assert_same_bits([module.state_dict()], [sound.state_dict()])


def test_on_a_device_the_run_stops_at_the_next_logged_step_with_unchanged_weights(where, tmp_path):
    module, sound = Net(partial(ADAMW, fused=True)), Net(partial(ADAMW, fused=True))
    with pytest.raises(TrainingError, match=r"step 3 \(epoch 1, batch_idx 3\).*\n.*body \(Linear\)"):
        fit(module, tmp_path / "bad", NonFinite(), log_every_n_steps=5)
    fit(sound, tmp_path / "good", NonFinite(), data=loader(None), max_steps=3)
    assert_same_bits([dict(module.named_parameters())], [dict(sound.named_parameters())])


@pytest.mark.parametrize("options", [{}, {"log_every_n_steps": 0}])
def test_a_fault_in_the_last_step_stops_the_run_without_a_logged_step(options, where, tmp_path):
    with pytest.raises(TrainingError, match="batch_idx 5"):
        fit(Net(partial(ADAMW, fused=True)), tmp_path, NonFinite(), data=loader(5), **options)


def test_a_guarded_run_ends_with_the_same_bits(where, tmp_path):
    for fused in (True, False):
        ends = []
        for number, guards in enumerate(([], [NonFinite()], [NonFinite("skip")])):
            module = Net(partial(ADAMW, fused=fused))
            fit(module, tmp_path / f"{fused}{number}", *guards, data=loader(None))
            ends.append(module.state_dict())
        assert_same_bits([ends[0]], [ends[1]])
        assert_same_bits([ends[0]], [ends[2]])


def test_a_gradient_that_is_not_finite_names_its_parameter(tmp_path):
    class Root(Net):
        def training_step(self, batch, batch_idx):
            middle = self.body(batch[0])
            return self.head((middle - middle.detach()).square().sum(1, keepdim=True).sqrt().expand(-1, 8)).mean()

    with pytest.raises(TrainingError, match=r"first parameter whose gradient is not finite, .*: body\."):
        fit(Root(), tmp_path, NonFinite(), data=loader(None))


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_an_infinite_loss_with_a_zero_gradient_is_found(action, where, tmp_path):
    class Constant(Net):
        def training_step(self, batch, batch_idx):
            loss = (self.head(self.norm(self.body(batch[0]))) - (100 if batch_idx == 2 else 0)).relu().mean()
            return loss + math.inf if batch_idx == 2 else loss

    guard, seen = NonFinite(action), Snapshots()
    if action == "stop":
        with pytest.raises(TrainingError, match=r"batch_idx 2.*\nthe loss is inf"):
            fit(Constant(), tmp_path, guard, data=loader(None))
    else:
        fit(Constant(), tmp_path, guard, seen, data=loader(None))
        assert guard.skipped == 1
        assert_same_bits(seen.before[2], seen.after[2])


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_scaler_skips_to_find_its_scale_are_counted(fused, where, tmp_path):
    guard, seen = NonFinite(), Snapshots()
    module = Net(partial(ADAMW, fused=fused))
    trainer = fit(module, tmp_path, guard, seen, data=loader(None), **scaling(2.0**30))
    assert guard.skipped >= 1
    assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (30 - guard.skipped)
    assert_same_bits(seen.before[0][:1], seen.after[0][:1])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_with_a_scaler_a_loss_that_is_not_finite_is_acted_on(action, fused, where, tmp_path):
    guard, seen = NonFinite(action), Snapshots()
    module = Net(partial(ADAMW, fused=fused))
    if action == "stop":
        with pytest.raises(TrainingError, match="batch_idx 3"):
            fit(module, tmp_path, guard, seen, **scaling(1024.0))
    else:
        fit(module, tmp_path, guard, seen, **scaling(1024.0))
        assert guard.skipped == 1
        assert_same_bits(seen.before[3], seen.after[3])


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tmp_path):
    class Root(Net):
        def training_step(self, batch, batch_idx):
            return (self.head(self.norm(self.body(batch[0]))) * 0).sum().sqrt()

    with pytest.raises(TrainingError, match=r"step 4 .*\n.*gradient is not finite, in backward order: head\."):
        fit(Root(), tmp_path, NonFinite(), data=loader(None), **scaling(8.0))


def test_with_several_optimisers_the_one_with_the_fault_does_not_step(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            first, second = self.optimizers()
            for optimizer, loss in (
                (first, self.body(targets.expand(-1, 4)).square().mean()),
                (second, self.head(inputs.repeat(1, 2)).square().mean()),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return ADAMW(self.body.parameters()), SGD(self.head.parameters())

    with pytest.raises(TrainingError, match=r"step 3 .*batch_idx 3.*\n.*head \(Linear\)"):
        fit(Two(), tmp_path / "stop", NonFinite())
    module, guard, seen = Two(), NonFinite("skip"), Snapshots()
    fit(module, tmp_path / "skip", guard, seen)
    assert guard.skipped == 1
    assert torch.equal(seen.before[3][0]["head.weight"], seen.after[3][0]["head.weight"])
    assert not torch.equal(seen.before[3][0]["body.weight"], seen.after[3][0]["body.weight"])


def test_a_demo_module_of_lightning_is_guarded(tmp_path):
    class Bad(BoringModel):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return {"loss": output["loss"] * (math.nan if batch_idx == 1 else 1)}

    module = Bad()
    data = module.train_dataloader()
    with pytest.raises(TrainingError, match=r"batch_idx 1.*\nthe loss is nan, and the output of every layer is finite"):
        fit(module, tmp_path, NonFinite(), data=data)


def task(lr=0.1):
    return Classification(
        MLP(64, [8], 10), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=lr), Constant(), classes=10
    )


def test_an_exploding_learning_rate_stops_the_run_and_names_the_layer(tmp_path):
    module, data = task(lr=1e30), Digits()
    with pytest.raises(
        TrainingError, match=r"step 1 .*\nthe first layer whose output is not finite: network\S+ \(Linear\)"
    ):
        fit(module, tmp_path, NonFinite(), data=data)


@pytest.mark.parametrize("disable", [[], ["best", "early_stopping"]])
@pytest.mark.parametrize("steps", [1, 2])
def test_neither_best_nor_last_is_written_from_weights_or_losses_that_are_not_finite(steps, disable, tmp_path):
    # After one step the weights are not finite, and no gradient has been calculated with them.
    module = task(lr=math.inf)
    every = callbacks.defaults(module, tmp_path, disable=["progress", *disable])
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=every,
    )
    with pytest.raises(
        TrainingError,
        match="not finite" if steps == 2 else r"network\.\S+ is not finite after 1 steps, although the gradients are",
    ):
        trainer.fit(module, datamodule=Digits())
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_monitored_metric_that_is_not_finite_stops_the_run(action, tmp_path):
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(math.nan if self.current_epoch else 1.0))

    best = callbacks.BestCheckpoint("val/loss", "min", tmp_path)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best, NonFinite(action)],
    )
    with pytest.raises(
        TrainingError,
        match=r"^val/loss is nan after step 11 \(epoch 2\), with finite weights: look at the validation data",
    ):
        trainer.fit(Validated(), loader(None), loader(None))
    assert best.best_model_score == 1.0
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.faults
@pytest.mark.parametrize("ranks", quick_or_slow([1, 2], [1]))
def test_the_command_line_exits_with_1_and_names_the_layer_in_five_lines(ranks, tmp_path, figure):
    options = ["--config", CONFIG, *(["--config", DDP] if ranks == 2 else []), "--trainer.max_epochs=2"]
    run = Ranks(main, ["fit", *options, "--model.optimizer.init_args.lr=1e37"], cwd=tmp_path, ranks=ranks)
    assert set(run.wait()) == {1}
    said = run.stderr[run.stderr.index("firstlight: ") :].splitlines()
    assert run.stderr.count("firstlight: ") == 1
    assert len(said) <= 5
    assert "Traceback" not in run.stderr
    assert "layer whose output is not finite: network." in run.stderr
    with figure("a loss that is not finite: exit code 1, the layer is named, no checkpoint") as case:
        case.trial(list(newest(tmp_path).glob("checkpoints/*.ckpt")))


def test_the_traceback_of_a_stopped_run_is_shown_on_request(monkeypatch, capsys):
    def stop(args):
        raise TrainingError("step 3")

    monkeypatch.setattr("firstlight.cli.verbs.fit", stop)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err == "firstlight: step 3\n"
    monkeypatch.setenv("FIRSTLIGHT_TRACEBACK", "1")
    assert main(["fit"]) == 1
    assert "Traceback" in capsys.readouterr().err


class OnOne(Net):
    """On the second process, the loss of the third batch is infinite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + math.inf if self.global_rank == 1 and batch_idx == 2 else loss


def decide(action, accumulate):
    guard, module = NonFinite(action), OnOne()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[guard],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    try:
        trainer.fit(module, loader(None, 8))
    except TrainingError as error:
        Path(str(trainer.global_rank)).write_text(str(error))
        return 1
    sums = [parameter.double().sum().item() for parameter in module.parameters()]
    Path(str(trainer.global_rank)).write_text(f"skipped {guard.skipped}, {sums}")
    return 0


@pytest.mark.parametrize(
    ("action", "accumulate"),
    [
        ("stop", 1),
        ("skip", 2),
        pytest.param("stop", 2, marks=pytest.mark.slow),
        pytest.param("skip", 1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_decide_alike_when_one_has_an_infinite_loss(action, accumulate, tmp_path):
    codes = Ranks(decide, action, accumulate, cwd=tmp_path, ranks=2).wait()
    said = [(tmp_path / rank).read_text() for rank in "01"]
    assert said[0] == said[1]
    if action == "stop":
        assert 0 not in codes  # gloo's threads abort the interpreter's exit now and then
        assert f"step {2 // accumulate} (epoch 1, batch_idx 2 of process 1)" in said[0]
    else:
        assert codes == [0, 0]
        assert said[0].startswith("skipped 1, ")


def test_a_second_fit_counts_its_own_skipped_steps(tmp_path):
    guard = NonFinite("skip")
    fit(Net(), tmp_path / "first", guard)
    assert guard.skipped == 1
    fit(Net(), tmp_path / "second", guard, data=loader(bad=None))
    assert guard.skipped == 0


def test_a_resumed_run_continues_the_count_of_skipped_steps():
    before, now = NonFinite("skip"), NonFinite("stop")
    before.skipped = 3
    now.load_state_dict(before.state_dict())
    assert (now.skipped, now.action) == (3, "stop")


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_the_verdict_is_the_action_unless_a_scaler_overflowed(action):
    assert verdict(action, None, True) == action
    assert verdict(action, 2.0, True) == "skip"
    assert verdict(action, 0.5, True) == action
    assert verdict(action, 2.0, False) == action


def test_an_unknown_action_is_refused():
    with pytest.raises(UsageError, match=r"^NonFinite was given action=ignore: it must be stop or skip$"):
        NonFinite("ignore")


def test_the_optimiser_keeps_no_flag_after_the_fit(where, tmp_path):
    trainer = fit(Net(partial(ADAMW, fused=True)), tmp_path, NonFinite(), data=loader(None))
    assert not hasattr(trainer.optimizers[0], "found_inf")


class Complex(BoringModel):
    """A foreign module with a complex parameter."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"] + (self.phase.abs() ** 2).sum()


def test_complex_parameters_are_trained(tmp_path):
    module = Complex()
    trainer = Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[NonFinite()], default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module)
    assert not torch.equal(module.phase.detach(), torch.ones(2, dtype=torch.complex64))


def test_the_replay_names_the_layer_of_a_module_that_toggles_its_optimisers(tmp_path):
    class Toggles(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            first, second = self.optimizers()
            for optimizer, layer, values in (
                (first, self.head, targets.expand(-1, 8)),
                (second, self.body, inputs),
            ):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(layer(values).square().mean())
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return ADAMW(self.head.parameters()), SGD(self.body.parameters())

    with pytest.raises(TrainingError, match=r"step 3 .*batch_idx 3.*\n.*body \(Linear\)"):
        fit(Toggles(), tmp_path, NonFinite())
