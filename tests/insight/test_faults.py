"""A part of the bench of planted faults; docs/faults.md has the score of all of it."""

from collections import Counter

import pytest

from firstlight.insight.findings import CAUSES, MEASURED, SYMPTOMS
from tests.helpers import ROOT, quick_or_slow

HALVES = ("development", "held out")

SAMPLE = (
    "flipped_loss_sign-2-breast_cancer-0",
    "learning_rate_too_high-1-digits_sgd-1",
    "learning_rate_too_low-6-wine-0",
    "constant_initialisation-4-circles-0",
    "missing_input_scaling-0-wine-0",
    "redundant_output_activation-2-breast_cancer-0",
    "missing_activation-0-circles-0",
    "frozen_layer-4-friedman-0",
    "clipping_too_low-2-wine-0",
    "clean-wine-0",
    "clean-circles-0",
    "clean-own_digits-0",
)
QUICK = {
    "flipped_loss_sign-2-breast_cancer-0",
    "learning_rate_too_high-1-digits_sgd-1",
    "clean-wine-0",
}


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import faults

    return faults


@pytest.fixture
def cases(faults):
    return {case.id: case for case in faults.cases()}


@pytest.mark.parametrize("name", quick_or_slow(SAMPLE, QUICK))
def test_findings_name_the_planted_fault_and_are_silent_without_one(faults, cases, name, tmp_path):
    case = cases[name]
    faults.train(tmp_path, case)
    verdict = faults.judge(tmp_path, case)
    if case.family == "clean":
        assert not verdict.alarms
    else:
        assert verdict.is_right, verdict.alarms


@pytest.mark.slow
def test_held_out_half_of_the_bench_reaches_its_figures(faults, tmp_path):
    score = faults.main(["--runs", str(tmp_path), "--half", "held out", "--train"])
    assert score.detected >= 0.9 * score.faults
    assert score.right >= 0.7 * score.faults
    assert score.alarmed <= 0.02 * score.sound


def test_each_family_has_at_least_three_instances_in_each_half(cases):
    halves = {half: Counter(case.family for case in cases.values() if case.half == half) for half in HALVES}
    families = {case.family for case in cases.values()}
    for half, instances in halves.items():
        assert {family: count for family, count in instances.items() if count < 3} == {}
        assert set(instances) == families, half


def test_halves_share_no_configuration_of_a_fault(cases):
    of = {half: [c.config for c in cases.values() if c.half == half and c.family != "clean"] for half in HALVES}
    assert not [config for config in of["held out"] if config in of["development"]]


def test_accepted_names_are_names_of_findings(cases):
    accepted = {name for case in cases.values() for name in case.accepts}
    assert accepted <= {*MEASURED, *CAUSES, *SYMPTOMS, "few_samples"}  # The last one is found in data only.


def test_held_out_half_has_140_sound_runs_and_all_shipped_experiments(cases):
    held_out = [case.name for case in cases.values() if case.family == "clean" and case.half == "held out"]
    assert len(held_out) >= 140
    assert {f"shipped {path.stem}" for path in (ROOT / "configs").glob("*.yaml")} <= set(held_out)


def test_fault_that_changes_little_does_not_hurt(faults, cases):
    case = cases["flipped_loss_sign-2-breast_cancer-0"]
    assert not faults.hurt(case, {"accuracy": 0.945}, {"accuracy": 0.95})
    assert faults.hurt(case, {"accuracy": 0.92}, {"accuracy": 0.95}) == "accuracy 0.920, sound 0.950"
    assert faults.hurt(case, {}, {"accuracy": 0.95}) == "failed"


def test_changed_configuration_is_trained_again(faults, cases, tmp_path):
    case = cases["clean-wine-0"]
    (tmp_path / case.id).mkdir()
    assert faults.state(tmp_path, case) == "missing"
    (tmp_path / case.id / "stamp.json").write_text(faults.json.dumps(faults.stamp(case)))
    assert faults.state(tmp_path, case) == "done"
    changed = faults.Case(case.family, case.name, {**case.config, "monitor": "val/loss"}, case.half, case.seed)
    assert faults.state(tmp_path, changed) == "changed"
