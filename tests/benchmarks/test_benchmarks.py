"""The benchmarks compute the figures that they print."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import Ranks, called

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed

    return speed


def test_ratio_is_to_the_floor_of_the_same_round(speed):
    def turns(*steps):
        figures = {"between": 0.002, "validated": 0.0005}
        return [
            {"round": number, "step": step / 1000, "epoch": 5 + step, "MiB": 100 + step, **figures}
            for number, step in enumerate(steps)
        ]

    rows = speed.rows("tiny", {"floor": turns(1.0, 2.0, 4.0), "firstlight": turns(3.0, 4.0, 4.0)})
    assert rows[1] == (
        "| tiny | firstlight | 4.000 | 2.00 (1.50 to 2.50) | 1.29 (1.14 to 1.31) | 2.000 | 0.500 | 104 | 1.02 | 3 |"
    )


def test_epoch_without_a_floor_in_its_round_uses_the_nearest(speed):
    floors = [{"round": 0, "epoch": 1.0}, {"round": 1, "epoch": None}, {"round": 5, "epoch": 2.0}]
    turns = [{"round": 1, "epoch": 3.0}, {"round": 4, "epoch": 4.0}, {"round": 6, "epoch": None}]
    assert speed.ratio_to(floors, turns, "epoch") == "2.50 (2.25 to 2.75)"
    assert speed.ratio_to(floors[1:2], turns, "epoch") == speed.ratio_to(floors, [], "epoch") == "-"


def test_turn_counts_only_the_time_in_which_its_process_runs(speed):
    # Epochs of three batches and two validations of 0.1, in turns from 10 to 15 and from 100 to 104.
    trained = [1, 2, 3, 10.5, 11.5, 12.5, 14, 100, 101, 102.5, 103.5]
    validated = [3.5, 3.6, 13, 13.1, 101.5, 101.6]
    figures = speed.turn_figures([(0, 10, 15), (1, 100, 104)], trained, validated, 3)
    assert [{name: round(value, 6) for name, value in each.items()} for each in figures] == [
        {"round": 0, "step": 1, "between": 0.5, "validated": 0.1, "epoch": 3.5},
        {"round": 1, "step": 1, "between": 0.5, "validated": 0.1, "epoch": 3.5},
    ]
    assert speed.turn_figures([(0, 10, 15), (1, 16, 17)], trained[:6], [], 3) == [
        {"round": 0, "step": 1, "between": None, "validated": None, "epoch": None}
    ]


@pytest.mark.parametrize("written", [False, True])
def test_stamps_give_seconds_of_epochs_steps_and_validation(monkeypatch, tmp_path, written):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stamps
    from torch import nn

    class Net(nn.Module):
        def forward(self, inputs):
            return inputs

    times = iter([1, 9, 20, 21, 22, 23, 24, 30, 31, 32, 40, 41])
    path = str(tmp_path / "stamps") if written else None
    with monkeypatch.context() as patch:
        patch.setattr(stamps.time, "perf_counter", lambda: next(times, 1))
        net = Net()
        if written:  # Stamps reads the clock once at the start.
            times = iter([0, *times])
        seen = stamps.Stamps(Net, path)
        for mode in (True, True, True, True, False, False, False, True, True, False, True, True):
            net.train(mode)(None)
    trained, validated = stamps.read(path) if written else (seen.trained, seen.validated)
    assert trained == [1, 9, 20, 21, 30, 31, 40, 41] and validated == [22, 23, 24, 32]
    figures = stamps.figures(trained[2:], validated, 2, 2)
    assert figures == {"epochs": [10, 10], "steps": 2, "step": 1, "between": 8, "validated": 1}
    assert stamps.figures(trained[3:6], validated, 2, 3) == {**figures, "epochs": []}
    nothing = {"epochs": [], "steps": 2, "step": None, "between": None, "validated": None}
    assert stamps.figures(trained[:1], [], 2) == nothing


def run_script(name, *args):
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = [name, *args]
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


@pytest.mark.slow
def test_contenders_train_and_print_their_figures(tmp_path):
    for name in ("prepare", "floor", "firstlight"):
        done = Ranks(run_script, "contenders.py", name, "tiny", str(tmp_path), cwd=tmp_path).succeed()
        if name != "prepare":
            figures = json.loads(done.stdout.splitlines()[-1])
            assert figures["steps"] == 39 and len(figures["epochs"]) > 5 and 0 < figures["step"] < figures["epochs"][0]


@pytest.mark.slow
def test_undoing_a_shortcut_changes_no_result(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from undone import UNDOINGS

    def run(script, *arguments):
        command = [sys.executable, BENCHMARKS / script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    run("contenders.py", "prepare", "tiny", prepared)
    losses = {}
    for name in UNDOINGS:
        shutil.copytree(prepared, tmp_path / name)
        run("undone.py", "--undo", name, "tiny", tmp_path / name)
        (found,) = (tmp_path / name).rglob("results.json")
        losses[name] = json.loads(found.read_text())["best"]["val/loss"]
    # torch's loader shuffles in another order.
    assert losses.pop("takes_samples_one_by_one") == pytest.approx(losses["as_it_is"], rel=0.05)
    assert losses == {name: pytest.approx(losses["as_it_is"], rel=1e-5) for name in losses}


def test_ratio_on_a_gpu_is_to_the_floor_of_the_same_round(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def rounds(*steps):
        return [{"step": step / 1000, "host": step / 2000} for step in steps]

    about = {"samples": 100, "flops": 10**9, "parameters": 1234}
    rows = gpu.rows("conv", {"floor": rounds(1.0, 2.0, 4.0), "firstlight": rounds(3.0, 4.0, 4.0)}, about, 1e12)
    assert rows[1] == "| conv | 1,234 | 100 | firstlight | 4.000 | - | 2.000 (1.000 to 3.000) | 25,000 | 25.0% |"


@pytest.mark.parametrize("case", sorted((BENCHMARKS / "cases").rglob("*.yaml")), ids=lambda path: path.stem)
def test_firstlight_can_build_every_case(case, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert "class_path: firstlight" in called("fit", "--config", str(case), "--print_config", cwd=tmp_path).stdout


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_machine_without_a_gpu(tmp_path):
    command = [
        sys.executable,
        BENCHMARKS / "gpu.py",
        "--cases",
        "tiny",
        "--rounds",
        "2",
        "--json",
        tmp_path / "figures",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["about"]["tiny"] == {"flops": 323584, "samples": 32, "parameters": 2410}
    assert {name: len(steps) for name, steps in figures["results"]["tiny"].items()} == {"floor": 2, "firstlight": 2}


def test_rates_of_a_configuration_are_compared_with_the_best_of_the_grid(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lr

    runs = {f"{rate:.3g} 0": {"loss": 2.0} for rate in lr.GRID}
    runs[f"{lr.GRID[3]:.3g} 0"], runs["0.002 0"] = {"loss": 1.0}, {"loss": 1.02}
    found = {"rate": 0.002, "tested": lr.GRID[0], "low": 0.001, "high": 0.003, "tries": 5}
    chosen, other = (
        lr.Configuration(name, {"runs": runs, "epochs": 3, "suggestion": found}) for name in ("bicycles", "x")
    )
    other.entry = {**other.entry, "runs": {**runs, "0.002 0": {"loss": 1.04}}}
    assert chosen.difference(0) == pytest.approx(0.02) and chosen.difference(1) is None
    assert "within 3 % of the best of 12 rates: 1 of 2; of those with \\*," in lr.table([chosen, other], 1).lower()
    runs |= {"0.002 1": {"loss": 0.9}, f"{lr.GRID[3]:.3g} 1": {"loss": 1.2}}
    assert chosen.difference(1) == pytest.approx(-0.25)
    row = "| bicycles | 3 | 0.002 | 5 | 1.02 | 0.00023 | 1 | +2.0 % | -25.0 % | +100.0 % |"
    assert row in lr.table([chosen], 1).splitlines()
