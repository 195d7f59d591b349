import copy
import os
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from firstlight.cli.parser import CLI
from firstlight.data import DataModule
from firstlight.errors import UsageError
from firstlight.fast_loop import fast_loop
from firstlight.preflight import rate_sweep
from firstlight.preflight.draw import range_as_text
from firstlight.preflight.lr_range import LOWEST, has_diverged, mean_curve, smoothed, spaced, suggest
from firstlight.preflight.rate_sweep import run_sweep
from tests.helpers import ROOT

WINE = str(ROOT / "configs" / "wine.yaml")
MODULE = ["--model=tests.preflight.test_lr_range.Quadratic", "--data=tests.preflight.test_lr_range.Ones"]


class Quadratic(LightningModule):
    """The loss `sum(curvature * weight ** 2) / 2`, with an optimiser and a fault that are its arguments."""

    def __init__(self, curvature: float = 1.3, fault: str = "", lr: float = 0.1, ratio: float = 0.5) -> None:
        super().__init__()
        self.curvature, self.fault, self.lr, self.ratio = curvature, fault, lr, ratio
        self.first, self.second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.automatic_optimization = fault != "manual"
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].flatten().tolist())
        if self.fault == "raises" and not torch.isfinite(self.first):
            raise RuntimeError("all elements of input should be between 0 and 1")
        if self.fault == "bug" and batch_idx:
            raise RuntimeError("a bug")
        loss = self.curvature * (self.first**2 + self.second**2) / 2
        return loss + torch.nan if self.fault == "nan" else loss * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("a range test does not validate")

    def configure_optimizers(self):
        groups = [{"params": [self.first]}, {"params": [self.second], "lr": self.lr * self.ratio}]
        optimizer = torch.optim.SGD(groups, self.lr)
        if self.fault == "no rate":
            for group in optimizer.param_groups:
                del group["lr"]
            return optimizer
        if self.fault == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


class Ones(LightningDataModule):
    """Eight samples of one number, in an order that a generator of the module draws."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(7)

    def train_dataloader(self):
        samples = TensorDataset(torch.ones(8, 1))
        return DataLoader(samples, self.batch_size, shuffle=True, generator=self.generator)

    def val_dataloader(self):
        return self.train_dataloader()


def experiment(*options):
    config = [] if options and options[0].startswith("--model=") else ["--config", WINE]
    return CLI("lr", [*config, *options]).experiment


def swept(*options, steps=60):
    return run_sweep(experiment(*MODULE, *options), fast_loop, spaced(steps), has_diverged, 0)


def recurrence(curvature, ratio, steps):
    """Return the losses of the quadratic by its closed recurrence, one for each rate."""
    rates = np.logspace(-7, 1, steps)
    first, second = (np.cumprod([1, *(1 - rates[:-1] * scale * curvature)]) for scale in (1, ratio))
    return rates, curvature * (np.clip(first, -1e9, 1e9) ** 2 + np.clip(second, -1e9, 1e9) ** 2) / 2


@pytest.mark.parametrize("curvature", [0.2, 1.0, 50.0])
@pytest.mark.parametrize("options", [[], ["--trainer.accumulate_grad_batches=2"]], ids=["each batch", "accumulated"])
def test_sweep_has_the_losses_of_the_recurrence_of_a_quadratic(curvature, options):
    sweep = swept(f"--model.curvature={curvature}", *options).sweep
    rates, losses = recurrence(curvature, 0.5, 60)
    assert sweep.rates == pytest.approx(rates[: len(sweep.rates)])
    assert sweep.losses == pytest.approx(losses[: len(sweep.losses)], rel=1e-4, abs=1e-12)
    assert 40 < len(sweep.losses)


def test_sweep_keeps_the_ratio_of_parameter_groups():
    losses = swept("--model.ratio=0.01").sweep.losses
    assert losses == pytest.approx(recurrence(1.3, 0.01, 60)[1][: len(losses)], rel=1e-4)


def test_sweep_of_a_task_has_the_losses_of_a_plain_loop_without_the_warm_up():
    options = [
        "--model.schedule=WarmupCosine",
        "--model.network.dropout=0",
        "--model.l1=0.01",
        "--trainer.max_epochs=2",
    ]
    rates = spaced(40)
    found = run_sweep(experiment(*options), fast_loop, rates, lambda _: False, 3).sweep
    task, data = (other := experiment(*options)).task, other.datamodule
    data.setup("fit")
    order = [len(data.rows("train"))]
    optimizer, losses = torch.optim.Adam(task.parameters(), 0.1), []
    loader = data.train_dataloader()
    loader.sampler.seed = 3
    batches = [batch for _ in range(len(rates)) for batch in loader][: len(rates)]
    for rate, (inputs, targets) in zip(rates, batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.cross_entropy(task.network(inputs.float()), targets)
        loss = loss + 0.01 * sum(weight.abs().sum() for name, weight in task.named_parameters() if weight.ndim > 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert order[0] < 40 * 16  # The sweep needs several epochs.
    assert found.losses == pytest.approx(losses, rel=1e-4)


def test_suggestion_follows_the_curvature_of_a_quadratic():
    curvatures = (1.3, 13.0, 130.0, 1300.0)  # 1 would end at exactly 0.
    found = [suggest([recurrence(each, 1.0, 201)] * 3, 0.1).rate for each in curvatures]  # 25 steps a decade.
    assert all(0.02 < rate * curvature < 1 for rate, curvature in zip(found, curvatures, strict=True))
    assert np.diff(np.log10(found)) == pytest.approx([-1, -1, -1], abs=0.05)


def test_sweep_with_half_the_steps_gives_a_similar_suggestion():
    # The loss falls by the sum of the rates until it is lowest, and rises at a rate for which noise is too large.
    rates = {steps: np.array(spaced(steps)) for steps in (100, 200)}
    fall = {steps: np.exp(-300 * np.cumsum(each)) for steps, each in rates.items()}
    found = {steps: suggest([(each, fall[steps] + 3000 * each**2)] * 3, 0.1).rate for steps, each in rates.items()}
    assert 0.5 < found[100] / found[200] < 2


def test_suggestion_is_the_median_of_the_orders_and_its_interval_their_range():
    sweeps = [recurrence(curvature, 1.0, 200) for curvature in (1.0, 20.0, 3.0)]
    single = [suggest([sweep] * 3, 0.1).rate for sweep in sweeps]
    found = suggest(sweeps, 0.1)
    assert (found.low, found.rate, found.high) == (single[1], single[2], single[0])


def test_noise_alone_is_a_fall_in_about_five_percent_of_range_tests():
    draw, rates = np.random.default_rng(0), spaced(200)
    falls = [mean_curve([smoothed(rates, draw.normal(2, 0.1, 200)) for _ in range(3)]).falls for _ in range(300)]
    assert 0.02 < np.mean(falls) < 0.08


def test_suggestion_does_not_depend_on_the_unit_of_the_loss():
    rates, losses = recurrence(1.0, 1.0, 200)
    assert suggest([(rates, losses)] * 3, 0.1).rate == suggest([(rates, 1e6 * losses)] * 3, 0.1).rate


def test_smoothed_losses_end_where_the_loss_explodes():
    rates, losses = np.array(spaced(200)), np.full(200, 2.0)
    losses[120:150], losses[150:] = 1.0, 1e30
    curve = smoothed(rates, losses)
    assert max(curve.losses) <= 4.0 and rates[110] < curve.lowest < rates[150]
    assert curve.rates[-1] < rates[160]


def test_second_valley_behind_a_clear_rise_does_not_count():
    rates, losses = np.array(spaced(200)), np.full(200, 4.0)
    losses[100:130], losses[130:160], losses[160:] = 2.0, 3.0, 1.5
    assert rates[100] < smoothed(rates, losses).lowest < rates[130]


def test_loss_that_does_not_fall_is_refused():
    draws = np.random.default_rng(0).normal(1, 0.3, (3, 200))
    with pytest.raises(UsageError, match=r"the loss falls at no learning rate from 1e-07 to 10, in 200 steps"):
        suggest([(spaced(200), each) for each in draws], 0.1)


def test_loss_that_is_lowest_at_the_highest_rate_says_nothing():
    rates = spaced(200)
    losses = [1 - 0.5 * place / 200 for place in range(200)]
    found = suggest([(rates, losses)] * 3, 0.02)
    assert found.rate == 0.02 and "lowest at the highest rate, 10" in found.problem


def test_range_test_leaves_the_module_its_data_and_the_process_as_they_were(monkeypatch):
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)  # Lightning sets it when it is imported.
    for options in ([], MODULE):
        fit = experiment(*options)
        if not options:
            fit.datamodule.setup("fit")
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        weights, environment = copy.deepcopy(fit.task.state_dict()), dict(os.environ)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        generator = getattr(fit.datamodule, "generator", torch.Generator()).get_state().tolist()
        fit.test_rates()
        assert all(torch.equal(value, fit.task.state_dict()[name]) for name, value in weights.items())
        assert all(parameter.grad is None for parameter in fit.task.parameters())
        assert fit.task.training and fit.task._trainer is None
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert generator == getattr(fit.datamodule, "generator", torch.Generator()).get_state().tolist()
        assert dict(os.environ) == environment


@pytest.mark.parametrize("verb", ["test_rates", "check"])
def test_copy_of_the_module_does_not_copy_the_data(verb, monkeypatch):
    fit = experiment()
    monkeypatch.setattr(DataModule, "__deepcopy__", lambda *_: pytest.fail("the data are copied"), raising=False)
    getattr(fit, verb)()


def test_fit_after_a_range_test_has_the_bits_of_one_without(tmp_path):
    ended = []
    for is_tested in (False, True):
        fit = experiment("--trainer.max_epochs=2", f"--runs={tmp_path}", "--disable=progress")
        if is_tested:
            fit.test_rates()
        fit.fit()
        ended.append(fit.task.state_dict())
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


def test_range_test_shuffles_in_three_orders_and_finds_the_same_again():
    found, again = experiment().test_rates(), experiment().test_rates()
    assert found.suggestion == again.suggestion and found.batch_size == 16
    assert len({tuple(each.losses[:8]) for each in found.sweeps}) == 3
    first = [each.losses[0] for each in found.sweeps]
    assert len({*first}) == 3 and max(first) < 2 * min(first)  # The same weights on other batches.


def test_slow_steps_give_shorter_sweeps_by_the_fastest_of_some(monkeypatch):
    seconds = iter([0.0, 9.0, 9.8, 19.0, 30.0, 33.0, *[40.0] * 1000])
    monkeypatch.setattr(rate_sweep.time, "perf_counter", lambda: next(seconds))
    with pytest.raises(UsageError, match="in 75 steps"):
        rate_sweep.range_test(experiment(*MODULE, "--model.curvature=0"), fast_loop)


def test_batch_size_counts_what_a_step_accumulates():
    assert experiment("--trainer.accumulate_grad_batches=2").test_rates().batch_size == 32


def test_larger_batches_do_not_make_the_suggestion_smaller():
    small, large = (experiment(f"--data.batch_size={size}").test_rates().suggestion.rate for size in (4, 64))
    assert small < large


@pytest.mark.parametrize("fault", ["", "raises", "plateau"])
def test_sweep_ends_without_an_error_when_the_loss_is_not_finite(fault):
    rates = [*spaced(30)[:20], *[1e30] * 10]
    found = run_sweep(experiment(*MODULE, f"--model.fault={fault}"), fast_loop, rates, lambda _: False, 0).sweep
    assert 20 <= len(found.losses) <= 30


def test_error_of_a_module_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        swept("--model.fault=bug")


@pytest.mark.parametrize(
    ("fault", "message"),
    {
        "manual": "lr sets the learning rate of each step, but Quadratic optimises by hand",
        "no rate": "SGD has no learning rate: no `lr` in its parameter groups",
        "nan": "the loss is nan before the first step: firstlight check looks for the cause",
    }.items(),
)
def test_module_that_cannot_be_tested_is_refused(fault, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        experiment(*MODULE, f"--model.fault={fault}").test_rates()


def test_lowest_rate_changes_nothing():
    sweep = swept().sweep
    assert sweep.rates[0] == LOWEST and sweep.losses[1] == pytest.approx(sweep.losses[0], rel=1e-6)


def test_plot_shows_a_small_fall_before_a_large_rise():
    losses = [0.65] * 4 + [0.643] * 2 + [1.94]
    lines = range_as_text(spaced(7), losses, 1e-2, 1e-3)
    places = {next(row for row, line in enumerate(lines) if line.ljust(72)[column] == "*") for column in (12, 55, 71)}
    assert len(places) == 3 and lines[0].split()[0] == "0.657"
