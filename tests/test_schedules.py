import inspect
import math
from itertools import pairwise

import pytest
import torch

from firstlight.errors import UsageError
from firstlight.schedules import Constant, Cosine, Schedule, WarmupCosine


def discovered(parent=Schedule):
    for child in parent.__subclasses__():
        yield from discovered(child)
        if child.__module__.startswith("firstlight.") and not inspect.isabstract(child):
            yield child


def every_factor(schedule, total):
    return [schedule(step, total) for step in range(total + 1)]


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 2), (3, 8), (50, 1000), (9, 10)])
def test_warmup_cosine_follows_the_published_formula(warmup, total, floor):
    expected = [(step + 1) / (warmup + 1) for step in range(warmup)]
    expected += [
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest / (total - warmup)))
        for rest in range(total - warmup + 1)
    ]
    assert every_factor(WarmupCosine(warmup_steps=warmup, floor=floor), total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_cosine_equals_the_cosine_annealing_of_torch_over_a_whole_run(floor):
    total, peak = 40, 0.5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=floor * peak)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total):
        optimizer.step()
        reference.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert [peak * factor for factor in every_factor(Cosine(floor), total)] == pytest.approx(rates, abs=1e-9)


def test_constant_is_the_peak_at_every_step_of_a_run_of_unknown_length():
    assert [Constant()(step, math.inf) for step in (0, 1, 10**9)] == [1, 1, 1]
    assert every_factor(Constant(), 5) == [1] * 6


def test_default_warmup_is_five_percent_of_the_run():
    factors = every_factor(WarmupCosine(), 1000)
    assert factors.index(1.0) == 50
    assert factors.count(1.0) == 1
    assert WarmupCosine().warmup_steps_in(1000) == 50


def test_warmup_steps_do_not_depend_on_the_length_of_the_run():
    assert [WarmupCosine(warmup_steps=7).warmup_steps_in(total) for total in (8, 100, 10_000)] == [7, 7, 7]
    assert [WarmupCosine(warmup=0.1).warmup_steps_in(total) for total in (10, 100, 10_000)] == [1, 10, 1000]
    assert [Cosine().warmup_steps_in(100), Constant().warmup_steps_in(100)] == [0, 0]


def test_two_warmups_at_once_are_refused():
    with pytest.raises(UsageError, match=r"warmup=0\.1 and warmup_steps=5"):
        WarmupCosine(warmup=0.1, warmup_steps=5)


@pytest.mark.parametrize("options", [{"warmup": -0.1}, {"warmup": 1.0}, {"warmup": math.nan}, {"warmup_steps": -1}])
def test_warmup_outside_its_range_is_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        WarmupCosine(**options)


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", [Cosine, WarmupCosine])
def test_floor_outside_zero_to_one_is_refused(kind, floor):
    with pytest.raises(UsageError, match="floor"):
        kind(floor=floor)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupCosine(), WarmupCosine(warmup_steps=3)])
def test_a_run_of_unknown_length_is_refused_by_schedules_that_need_it(schedule):
    with pytest.raises(UsageError, match=rf"{type(schedule).__name__} must know.*trainer\.max_steps"):
        schedule(0, math.inf)


@pytest.mark.parametrize("total", [4, 5])
def test_warmup_as_long_as_the_run_is_refused(total):
    with pytest.raises(UsageError, match=f"warmup_steps=5.*{total} optimiser steps"):
        WarmupCosine(warmup_steps=5)(0, total)


def test_resumed_run_keeps_its_warmup_steps():
    schedule = WarmupCosine(warmup=0.1, floor=0.2)
    longer = schedule.with_fixed_warmup(100)
    assert longer.warmup_steps_in(500) == 10
    assert [longer(step, 500) for step in range(11)] == [schedule(step, 100) for step in range(11)]
    assert longer(500, 500) == pytest.approx(0.2)
    assert schedule.warmup_steps_in(500) == 50


def test_schedules_without_a_warmup_stay_the_same():
    assert Cosine(0.3).with_fixed_warmup(10) == Cosine(0.3)
    assert Constant().with_fixed_warmup(math.inf) == Constant()


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_first_and_last_factor_follow_the_formulas(floor):
    assert Cosine(floor)(0, 20) == 1
    assert Cosine(floor)(20, 20) == pytest.approx(floor)
    assert WarmupCosine(warmup_steps=4, floor=floor)(0, 20) == pytest.approx(1 / 5)
    assert WarmupCosine(warmup_steps=4, floor=floor)(4, 20) == 1
    assert WarmupCosine(warmup_steps=4, floor=floor)(20, 20) == pytest.approx(floor)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupCosine()])
def test_the_rate_stays_at_the_floor_after_the_end(schedule):
    assert [schedule(step, 20) for step in (20, 21, 30, 40)] == pytest.approx([0] * 4)


@pytest.mark.parametrize("warmup", [0, 1, 20, 99])
def test_neighbouring_steps_never_differ_by_more_than_the_steepest_slope(warmup):
    total = 200
    factors = every_factor(WarmupCosine(warmup_steps=warmup), total)
    jumps = [abs(after - before) for before, after in pairwise(factors)]
    assert max(jumps[:warmup], default=0) <= 1 / (warmup + 1) + 1e-12
    assert max(jumps[warmup:]) <= math.pi / 2 / (total - warmup) + 1e-12


def test_discovery_finds_all_schedules():
    assert {Constant, Cosine, WarmupCosine} <= set(discovered())


@pytest.mark.parametrize("kind", list(discovered()), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 999])
def test_each_schedule_returns_factors_in_zero_to_one_and_has_no_state(kind, total):
    schedule = kind()
    steps = range(total + 5)
    factors = [schedule(step, total) for step in steps]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert [schedule(step, total) for step in reversed(steps)] == factors[::-1]
    assert 0 <= schedule.warmup_steps_in(total) < total
    assert [schedule.with_fixed_warmup(total)(step, total) for step in steps] == factors


def test_a_share_of_almost_everything_still_reaches_the_peak_and_the_end():
    schedule = WarmupCosine(warmup=0.99)
    assert schedule.warmup_steps_in(10) == 9
    assert (schedule(9, 10), schedule(10, 10)) == (1.0, 0.0)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupCosine()])
def test_a_run_without_steps_is_refused(schedule):
    with pytest.raises(UsageError, match="no optimiser steps"):
        schedule(0, 0)
