"""A fit with a time limit ends with its schedule, when its time is over, at whatever speed."""

import math
import random
from functools import partial
from itertools import pairwise

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import distributed, nn

from firstlight.callbacks import EarlyStopping, TimeLimit
from firstlight.callbacks.time_limit import parse_time, steps_that_fit
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.schedules import Constant, Cosine, WarmupCosine
from firstlight.tasks import Classification
from firstlight.tasks.timed_schedule import TimedSchedule
from tests.helpers import CONFIG, Ranks, called, logged, newest, results
from tests.tasks.helpers import loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*does not have many workers")


class Machine(Callback):
    """A clock that only batches and validations move, and a record of the learning rates.

    Args:
        step: Returns the seconds of the optimiser step with this index.
        validation: Seconds of a batch of validation.
    """

    def __init__(self, step=lambda step: 0.05, validation=0.05, start=100.0):
        self.now, self.step, self.validation = start, step, validation
        self.rates, self.done_at = [], 0

    def __call__(self):
        return self.now

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now += self.step(trainer.global_step) / trainer.accumulate_grad_batches

    def on_validation_batch_start(self, *args):
        self.now += self.validation

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(tmp_path, machine, seconds, *callbacks, schedule=None, ckpt_path=None, save=None, tests=False, **options):
    """Fit for `seconds` of the machine's clock, and return the task, the trainer and the limit."""
    torch.manual_seed(0)
    batches = loader(torch.randn(40, 6), torch.randint(0, 3, (40,)), batch_size=4)
    sgd = partial(torch.optim.SGD, lr=1.0)
    task = Classification(MLP(6, [], 3), nn.CrossEntropyLoss(), sgd, schedule or WarmupCosine(), classes=3)
    limit = TimeLimit(seconds, machine.now, tests, machine)
    options = {"max_epochs": -1, "num_sanity_val_steps": 0, **options}
    fitting = trainer(tmp_path, callbacks=[limit, machine, *callbacks], **options)
    val = loader(torch.randn(8, 6), torch.randint(0, 3, (8,)), batch_size=4)
    fitting.fit(task, batches, val, ckpt_path=ckpt_path, weights_only=True)
    if save:
        fitting.save_checkpoint(save)
    return task, fitting, limit


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_a_time_is_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "10x", "m", "30m1h", "-5s", "1 h", "0s", "nan"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="time"):
        parse_time(text)


def test_steps_that_fit_equal_a_count_of_steps_and_pauses():
    draw = random.Random(0)
    for _ in range(500):
        seconds, step, pause = draw.uniform(-1, 50), draw.uniform(0.1, 2), draw.uniform(0, 5)
        per_pause = draw.randint(1, 9)
        until_pause = draw.randint(1, per_pause)
        used, count = 0.0, 0
        while used + step <= seconds:
            used, count = used + step, count + 1
            if count >= until_pause and (count - until_pause) % per_pause == 0:
                used += pause
        assert steps_that_fit(seconds, step, pause, until_pause, per_pause) == count
    assert steps_that_fit(10, 1, 0, 1, math.inf) == 10


@pytest.mark.parametrize("schedule", [Cosine(), WarmupCosine(), WarmupCosine(warmup_steps=30), Constant()])
def test_a_new_plan_keeps_the_factor_and_ends_at_the_end_of_the_schedule(schedule):
    draw = random.Random(1)
    for _ in range(50):
        timed, step = TimedSchedule(schedule), 2
        timed.plan(step, 1000)
        for left in (draw.randint(500, 5000) for _ in range(5)):
            step += draw.randint(1, 200)
            before = timed.factor(step)
            timed.plan(step, left)
            assert timed.factor(step) == pytest.approx(before, abs=0.03)  # Warm-up steps are whole.
            assert timed.end == step + left
        assert timed.factor(step + left) == pytest.approx(schedule(1000, 1000), abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [(WarmupCosine(), 100), (WarmupCosine(warmup_steps=30), 30)], ids=["share", "steps"]
)
def test_the_warm_up_keeps_its_share_or_its_steps_if_the_first_plan_is_wrong(schedule, warmup):
    timed = TimedSchedule(schedule)
    timed.plan(2, 400)  # In truth there are 2,000.
    for step in (4, 8, 16):
        timed.plan(step, 2000 - step)
    peak = max(range(2000), key=timed.factor)
    assert abs(peak - warmup) <= 0.1 * warmup


SPEEDS = {
    "slow first step": lambda step: 5.0 if step == 0 else 0.05,
    "slower and slower": lambda step: 0.05 * (1 + step / 200),
    "noisy": lambda step: 0.15 if step % 7 == 0 else 0.035,
    "stops at the end": lambda step: 1.5 if step == 290 else 0.05,
    "slower from a step on": lambda step: 0.05 if step < 100 else 0.12,
}


OPTIONS = [
    {"accumulate_grad_batches": 3},
    {"val_check_interval": 0.5},
    {"limit_train_batches": 7, "check_val_every_n_epoch": 3},
]


@pytest.mark.parametrize(
    ("speed", "options"), [*((speed, {}) for speed in SPEEDS), *(("noisy", each) for each in OPTIONS)], ids=str
)
def test_the_fit_ends_with_its_time_and_its_schedule_at_any_speed(speed, options, tmp_path):
    machine = Machine(SPEEDS[speed])
    task, fitting, limit = fit(tmp_path, machine, 20, **options)
    assert machine.now - 100 == pytest.approx(20, abs=1.6 if speed == "stops at the end" else 0.6)
    assert fitting.global_step == task.total_steps == len(machine.rates)
    assert limit.is_over
    assert machine.rates[-1] < 1e-3
    assert max(machine.rates) > 0.9
    warmup = machine.rates.index(max(machine.rates))
    assert max(abs(after - before) for before, after in pairwise(machine.rates[warmup:])) < 0.03
    assert machine.rates[: warmup + 1] == sorted(machine.rates[: warmup + 1])


def test_a_second_fit_has_the_whole_time_again(tmp_path):
    machine = Machine()
    limit = TimeLimit(10, clock=machine)
    steps = []
    for name in ("first", "second"):
        batches = loader(torch.randn(40, 6), torch.randint(0, 3, (40,)), batch_size=4)
        sgd = partial(torch.optim.SGD, lr=1.0)
        task = Classification(MLP(6, [], 3), nn.CrossEntropyLoss(), sgd, WarmupCosine(), classes=3)
        fitting = trainer(tmp_path / name, callbacks=[limit, machine], max_epochs=-1, num_sanity_val_steps=0)
        fitting.fit(task, batches, batches)
        steps.append(fitting.global_step)
    assert steps[0] == steps[1] > 50


def test_time_is_left_for_the_test_at_the_end(tmp_path):
    machine = Machine(validation=0.5)  # A validation takes a second, and an epoch half a second more.
    fit(tmp_path, machine, 20, tests=True)
    assert 17.5 < machine.now - 100 <= 19.1


def test_a_resumed_fit_trains_for_the_rest_of_its_time_and_continues_its_schedule(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 100

    first = Machine()
    fit(tmp_path, first, 20, Stop(), save=tmp_path / "a.ckpt")
    second = Machine(lambda step: 0.1)  # Another machine, half as fast.
    task, fitting, _ = fit(tmp_path, second, 20, ckpt_path=tmp_path / "a.ckpt")
    assert first.now - 100 + second.now - 100 == pytest.approx(20, rel=0.03)
    assert fitting.global_step == task.total_steps == 100 + len(second.rates)
    rates = first.rates + second.rates
    assert max(abs(after - before) for before, after in pairwise(rates[20:])) < 0.03
    assert rates[-1] < 1e-3


def test_a_finished_fit_resumes_only_with_more_time(tmp_path):
    _, fitting, _ = fit(tmp_path, Machine(), 20, save=tmp_path / "a.ckpt")
    _, again, limit = fit(tmp_path, Machine(), 20, ckpt_path=tmp_path / "a.ckpt")
    assert limit.is_over
    assert again.global_step == fitting.global_step
    machine = Machine()
    _, longer, _ = fit(tmp_path, machine, 30, ckpt_path=tmp_path / "a.ckpt")
    assert machine.now - 100 == pytest.approx(10, rel=0.05)
    assert longer.global_step > 1.3 * fitting.global_step
    assert machine.rates[0] > 0.1
    assert machine.rates[-1] < 1e-3


@pytest.mark.parametrize("options", [{"max_steps": 60}, {"max_epochs": 8}], ids=str)
def test_an_earlier_limit_ends_the_fit_and_its_schedule(options, tmp_path):
    machine = Machine()
    task, fitting, limit = fit(tmp_path, machine, 20, **options)
    assert fitting.global_step == task.total_steps == options.get("max_steps", 80)
    assert not limit.is_over
    assert machine.rates[-1] < 1e-3


def test_early_stopping_may_end_the_fit_before_its_time(tmp_path):
    machine = Machine()
    _, fitting, limit = fit(tmp_path, machine, 20, EarlyStopping("val/loss", patience=2, mode="min", min_delta=100))
    assert fitting.global_step == 30
    assert not limit.is_over


def test_a_warm_up_longer_than_the_time_is_refused(tmp_path):
    with pytest.raises(UsageError, match="warmup_steps=5000, but the whole run is"):
        fit(tmp_path, Machine(), 20, schedule=WarmupCosine(warmup_steps=5000))


def test_plans_are_few(tmp_path, monkeypatch):
    plans = []
    left = TimeLimit._left
    monkeypatch.setattr(TimeLimit, "_left", lambda self, trainer: plans.append(1) or left(self, trainer))
    _, fitting, _ = fit(tmp_path, Machine(), 60)
    assert fitting.global_step > 900
    assert len(plans) < 150


@pytest.mark.parametrize(
    "change", [{"used": math.nan}, {"used": -1.0}, {"step_seconds": "x"}, {"is_over": 1}, {"longest_pause": None}]
)
def test_a_damaged_state_is_refused(change):
    state = {"used": 1.0, "seconds": 2.0, "step_seconds": 0.1, "pause_seconds": 0.1, "longest_pause": 0.1}
    with pytest.raises(UsageError, match="the checkpoint is damaged"):
        TimeLimit(10).load_state_dict({**state, "is_over": False, **change})


@pytest.mark.parametrize(
    "change", [{"total": math.nan}, {"position": 11.0}, {"step": 1.5}, {"step": -1}, {"schedule": 1}, {"total": "x"}]
)
def test_a_damaged_plan_is_refused(change):
    with pytest.raises(UsageError, match="the checkpoint is damaged"):
        TimedSchedule.check_state({"total": 10.0, "step": 3, "position": 3.0, **change})


def two_clocks():
    rank = int(__import__("os").environ["LOCAL_RANK"])
    machine = Machine(lambda step: 0.05 * (1 + 4 * rank))  # The second process has a clock that is far too fast.
    _, fitting, _ = fit(".", machine, 10, devices=2, strategy="ddp")
    steps = [None, None]
    distributed.all_gather_object(steps, (fitting.global_step, machine.rates))
    assert steps[0] == steps[1]
    if rank == 0:
        assert abs(machine.now - 110) < 0.5


def test_two_processes_follow_the_plan_of_the_first(tmp_path):
    Ranks(two_clocks, cwd=tmp_path, ranks=2).succeed()


SMALL = ["--config", CONFIG, "--model.network.hidden=[8]", "--trainer.log_every_n_steps=1"]


def test_a_run_with_a_time_ends_with_the_learning_rate_at_its_end(tmp_path):
    printed = called(
        "run", *SMALL, "--time", "4s", "--disable", "early_stopping", "--report=false", cwd=tmp_path
    ).stdout
    assert "as many steps as fit into 4s; the clock decides, so a resumed run is not exact" in printed
    run = newest(tmp_path)
    rates = logged(run, "lr")
    assert rates[-1][1] < 0.003 * 0.05  # Other programs may take the time of the last steps.
    assert rates[-1][0] + 1 == results(run)["steps"]
    assert logged(run, "val/loss")[-1][0] == rates[-1][0]  # The last step was validated,
    assert results(run)["metrics"]["test/accuracy"]  # and the best checkpoint tested.
    again = called("run", "--run", str(run), cwd=tmp_path).stdout
    assert "nothing to do: stopped by --time after" in again
    assert "increase --time" in again


def test_a_time_replaces_the_limits_of_a_file_but_not_those_beside_it(tmp_path):
    printed = called("fit", *SMALL, "--time", "1h", "--trainer.max_epochs=2", cwd=tmp_path).stdout
    assert "as many steps as fit into 1h, at most 80;" in printed
    run = newest(tmp_path)
    assert results(run)["steps"] == 80
    assert logged(run, "lr")[-1][1] < 0.003 * 0.001
    printed = called("fit", *SMALL, "--time", "1h", "--print_config", cwd=tmp_path).stdout
    assert "max_epochs: -1" in printed


@pytest.mark.parametrize(
    ("files", "options", "limits"),
    [
        (["time: 1h"], [], (-1, -1)),
        (["time: 1h\ntrainer: {max_epochs: 3, max_steps: 9}"], [], (-1, -1)),
        (["time: 1h", "trainer: {max_epochs: 3}"], [], (3, -1)),
        (["time: 1h"], ["--trainer.max_epochs=3"], (3, -1)),
        (["time: 1h"], ["--time", "null"], (60, -1)),
        (["time: 1h", "time: null"], [], (60, -1)),
        (["time: null"], ["--time=1h"], (-1, -1)),
    ],
)
def test_a_time_in_a_file_replaces_limits_as_the_option_does(files, options, limits, tmp_path):
    for index, text in enumerate(files):
        (tmp_path / f"{index}.yaml").write_text(text)
        options = [*options[:index], f"--config={tmp_path / str(index)}.yaml", *options[index:]]
    printed = called("fit", *SMALL, *options, "--print_config", cwd=tmp_path).stdout
    trainer = yaml.safe_load(printed)["trainer"]
    assert (trainer["max_epochs"], trainer["max_steps"]) == limits


def test_a_resumed_run_keeps_a_limit_beside_its_time(tmp_path):
    called("fit", *SMALL, "--time", "1h", "--trainer.max_epochs=1", cwd=tmp_path)
    run = newest(tmp_path)
    assert results(run)["steps"] == 40
    printed = called("fit", "--run", str(run), "--print_config", cwd=tmp_path).stdout
    assert yaml.safe_load(printed)["trainer"]["max_epochs"] == 1


def test_a_run_without_a_limit_is_resumed_with_one(tmp_path):
    called("fit", *SMALL, "--trainer.max_epochs=2", cwd=tmp_path)
    run = newest(tmp_path)
    called("fit", "--run", str(run), "--time", "4s", "--disable", "early_stopping", cwd=tmp_path)
    assert results(run)["steps"] > 80
    assert logged(run, "lr")[-1][1] < 0.003 * 0.001
    called(
        "fit", "--run", str(run), "--time", "null", "--trainer.max_steps", str(results(run)["steps"] + 5), cwd=tmp_path
    )


MODULE = """
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class Own(BoringModel):
    pass
"""


def test_a_module_with_a_schedule_of_its_own_is_stopped_and_the_run_says_so(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    args = ["fit", "--model", "mine.Own", "--data", "mine.BoringDataModule", "--time", "3s"]
    printed = called(*args, cwd=tmp_path).stdout
    assert "time   Own has a schedule of its own: the time stops the run, and plans no schedule" in printed
    assert "steps" in printed.partition("fit    ")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "10x"], "'10x' is not a time"),
        (["--time", "10m", "--trainer.min_epochs=3"], "trainer.min_epochs=3 both decide"),
        (["--time", "10m", "--trainer.max_time=00:00:01:00"], "trainer.max_time="),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "check"])
def test_a_time_that_cannot_be_is_refused(verb, options, message, tmp_path):
    assert message in called(verb, *SMALL, *options, cwd=tmp_path, code=2).stderr
    assert not (tmp_path / "runs").exists()
