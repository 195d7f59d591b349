"""The schedule ends where the run ends, also if callbacks change the steps, the rates or the parameter groups."""

from functools import partial
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch import nn

from firstlight.__main__ import main
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.optim import MuonAdamW
from firstlight.schedules import Cosine
from firstlight.tasks import Classification
from firstlight.tasks.optimization import planned_steps
from tests.helpers import CONFIG, DDP, Ranks
from tests.tasks.helpers import loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:When using `Trainer", "ignore:SWA"
)
SGD = partial(torch.optim.SGD, lr=0.1)


class Record(Callback):
    """Keep the rates of each optimiser step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def task(optimizer=SGD, network=None):
    torch.manual_seed(0)
    return Classification(network or MLP(6, [5], 3), nn.CrossEntropyLoss(), optimizer, Cosine(), classes=3)


def batches(count=10):
    torch.manual_seed(1)
    return loader(torch.randn(4 * count, 6), torch.randint(0, 3, (4 * count,)), batch_size=4)


def fit(tmp_path, *callbacks, data=None, model=None, ckpt_path=None, save=None, **options):
    """Return the recorded rates, the planned and the done steps, and the task."""
    record, model = Record(), model or task()
    fitting = trainer(tmp_path, callbacks=[*callbacks, record], **{"max_epochs": 4, **options})
    fitting.fit(model, data or batches(), ckpt_path=ckpt_path, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    return record.rates, model.total_steps, fitting.global_step, model


def cosine(total, lr=0.1):
    return [pytest.approx([lr * Cosine()(step, total)]) for step in range(total)]


def test_planned_steps_equal_a_count_of_all_batches():
    for batches_, epochs, windows in product(
        (1, 5, 7, 40), (1, 3), ([[0, 1]], [[0, 4]], [[0, 2], [1, 3]], [[0, 1], [2, 64]])
    ):
        steps = [
            (epoch, batch + 1)
            for epoch in range(epochs)
            for batch in range(batches_)
            for window in [[size for start, size in windows if start <= epoch][-1]]
            if (batch + 1) % window == 0 or batch + 1 == batches_
        ]
        for epoch, batch in product(range(epochs), range(batches_ + 1)):
            done = len([step for step in steps if step <= (epoch, batch)])
            assert planned_steps(done, epoch, batch, batches_, epochs, -1, windows) == len(steps)


def test_a_scheduled_accumulation_is_planned(tmp_path):
    rates, planned, done, _ = fit(tmp_path, GradientAccumulationScheduler({0: 1, 2: 4}), data=batches(40))
    assert planned == done == 100
    assert rates == cosine(100)


class Accumulate(Callback):
    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = 1 if trainer.current_epoch < 2 else 5


class Longer(Callback):
    def on_train_epoch_start(self, trainer, module):
        trainer.fit_loop.max_epochs = 5


@pytest.mark.parametrize(
    ("callback", "steps"),
    [(Accumulate(), 24), (Longer(), 50), (StochasticWeightAveraging(0.01), 40)],
    ids=["accumulates", "longer", "averages"],
)
def test_a_callback_that_changes_the_length_of_the_run_changes_the_plan(callback, steps, tmp_path):
    rates, planned, done, _ = fit(tmp_path, callback)
    assert planned == done == len(rates) == steps
    if not isinstance(callback, StochasticWeightAveraging):
        assert rates[-1][0] < 0.1 * 0.1


def test_a_loader_that_grows_changes_the_plan(tmp_path):
    model = task()
    model.train_dataloader = lambda: batches(5 + 5 * model.current_epoch)
    record = Record()
    fitting = trainer(tmp_path, callbacks=[record], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    fitting.fit(model)
    assert model.total_steps == fitting.global_step == 30
    assert record.rates[-1][0] < 0.1 * 0.01


def test_averaged_weights_with_batch_normalisation_are_the_average_at_the_end(tmp_path):
    averaging = StochasticWeightAveraging(0.01)
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    _, planned, _, model = fit(tmp_path, averaging, model=task(network=network))
    assert planned == 40
    for average, weight in zip(averaging._average_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, weight)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.network.hidden0)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network.hidden0, optimizer)


class PlainUnfreeze(Callback):
    """Does what `Unfreeze` does, and keeps nothing for a resumed run."""

    def setup(self, trainer, module, stage):
        module.network.hidden0.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            parameters = list(module.network.hidden0.requires_grad_().parameters())
            (optimizer,) = trainer.optimizers
            optimizer.add_param_group({"params": parameters, "lr": optimizer.param_groups[0]["lr"] / 10})


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.1), partial(MuonAdamW, lr=0.1)])
@pytest.mark.parametrize("kind", [Unfreeze, PlainUnfreeze])
def test_an_unfrozen_group_follows_the_schedule_and_resumes_with_the_same_bits(kind, optimizer, tmp_path):
    save = LambdaCallback(
        on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
    )
    rates, planned, done, whole = fit(tmp_path, kind(), save, model=task(optimizer))
    assert planned == done == 40
    assert [rate[:1] for rate in rates] == cosine(40)
    assert all(rate[-1] == pytest.approx(rate[0] / 10) for rate in rates[10:])
    again, _, done, resumed = fit(tmp_path, kind(), model=task(optimizer), ckpt_path=tmp_path / "2.ckpt")
    assert done == 40
    assert again == rates[30:]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    assert all(parameter.requires_grad for parameter in resumed.parameters())
    more, _, done, _ = fit(tmp_path, kind(), model=task(optimizer), ckpt_path=tmp_path / "3.ckpt", max_epochs=6)
    assert done == 60
    assert all(rate[-1] == pytest.approx(rate[0] / 10) for rate in more)


class RaiseDecay(Callback):
    """Raises the weight decay at the end of the second epoch."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            for group in trainer.optimizers[0].param_groups:
                group["weight_decay"] = 0.3


def test_options_of_the_optimiser_that_a_callback_changed_resume_with_the_same_bits(tmp_path):
    adam = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01)
    save = LambdaCallback(
        on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
    )
    *_, whole = fit(tmp_path, RaiseDecay(), save, model=task(adam))
    *_, resumed = fit(tmp_path, RaiseDecay(), model=task(adam), ckpt_path=tmp_path / "1.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    other = task(partial(torch.optim.AdamW, lr=0.1, weight_decay=0.02))
    fit(tmp_path, model=other, ckpt_path=tmp_path / "1.ckpt")
    # The group of biases is configured as before, so it keeps what the callback set.
    assert [group["weight_decay"] for group in other.trainer.optimizers[0].param_groups] == [0.02, 0.3]


class AddBias(Callback):
    """Adds a parameter that was frozen when training started."""

    def setup(self, trainer, module, stage):
        module.network.output.bias.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [module.network.output.bias.requires_grad_()]})


def test_parameters_whose_gradients_processes_would_not_share_are_refused(tmp_path):
    options = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", f"--trainer.callbacks+={__name__}.AddBias"]
    run = Ranks(main, ["fit", "--config", CONFIG, "--config", DDP, *options], cwd=tmp_path, ranks=2)
    assert run.wait() == [2, 2]
    assert "a callback added parameters to the optimiser" in run.stderr


def test_backbone_finetuning_trains(tmp_path):
    class Backbone(Classification):
        @property
        def backbone(self):
            return self.network.hidden0

    model = Backbone(MLP(6, [5], 3), nn.CrossEntropyLoss(), SGD, Cosine(), classes=3)
    _, planned, done, _ = fit(tmp_path, BackboneFinetuning(1), model=model)
    assert planned == done == 40


def test_the_rate_that_the_finder_found_is_the_peak(tmp_path):
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-3, max_lr=0.5)
    rates, planned, done, found = fit(tmp_path, finder)
    peak = finder.optimal_lr.suggestion()
    assert planned == done == 40
    assert rates == cosine(40, peak)
    _, _, _, given = fit(tmp_path, model=task(partial(torch.optim.SGD, lr=peak)))
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, given.state_dict()[name])


def test_lbfgs_trains_and_does_not_accumulate(tmp_path):
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
    _, planned, done, _ = fit(tmp_path, model=task(lbfgs))
    assert planned == done == 40
    with pytest.raises(UsageError, match="LBFGS evaluates batches several times"):
        fit(tmp_path, model=task(lbfgs), accumulate_grad_batches=2)


def test_a_task_with_its_own_optimizer_resumes(tmp_path):
    class Own(Classification):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(self.total_steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    def own():
        torch.manual_seed(0)
        return Own(MLP(6, [5], 3), nn.CrossEntropyLoss(), SGD, Cosine(), classes=3)

    _, planned, done, _ = fit(
        tmp_path, GradientAccumulationScheduler({0: 1, 2: 4}), model=own(), save=tmp_path / "a.ckpt"
    )
    assert planned == done == 26
    fit(tmp_path, model=own(), max_epochs=2, save=tmp_path / "b.ckpt")
    _, _, done, _ = fit(tmp_path, model=own(), max_epochs=2, ckpt_path=tmp_path / "b.ckpt")
    assert done == 20
