"""How long a step takes by hand, with firstlight and with its peers.

    python benchmarks/speed.py [--cases tiny,mlp] [--contenders floor,firstlight] [--rounds 40] [--threads 1] [--json F]

Each contender trains in a process of its own. They take short turns, round after round, in any order, each stopped by
SIGSTOP while the others train, so that whatever else the machine does falls on all of them alike. In a turn, a step's
time is the median of its steps. An epoch's holds its validation and all that is logged and written in it; it may take
several turns, and counts in the round in which it ends. Ratios are to the floor's in the same round, or, of epochs, in
the nearest in which one ended: shown are the median of the rounds and their quartiles. Between epochs are the
milliseconds from an epoch's last step to the next one's first. `ddp` is the floor of `firstlight_ddp`, on two
processes. firstlight may write checkpoints for a hundredth of the time in which it trains, not of that in which it is
stopped. What could not run is said. The table is printed; `--json F` keeps the figures.
"""

# Nothing heavy is imported here: the peak memory of what `train` starts begins with that of this process.
import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from random import sample
from statistics import fmean, median, quantiles
from typing import Any

from stamps import read

HERE = Path(__file__).parent
CASES = ("tiny", "mlp", "conv", "lm")
TURNS = {"tiny": (0.5, 40), "mlp": (1.0, 30), "conv": (4.0, 9), "lm": (6.0, 9)}
"""Seconds of a turn, and rounds."""
PEERS = ("dataloader", "accelerate", "lightning", "skorch", "fastai", "keras", "transformers")
PACKAGES = ("torch", "lightning", *PEERS[1:2], *PEERS[3:])
FLOORS = {"firstlight_ddp": "ddp", "ddp": "ddp"}


def version_of(package: str) -> str | None:
    """Return which version of a package is installed, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def train(contender: str, case: str, folder: str, threads: int, *options: str) -> dict[str, Any] | None:
    """Return what a contender took in a case, or nothing when it failed; `options` are for firstlight."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / "contenders.py"), contender, case, folder, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{contender} failed in {case}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if contender != "prepare" else {}
    return found


class Contender:
    """A process that trains while it is its turn.

    Args:
        name: Of the contender.
        command: What this Python runs.
        folder: Where the case was prepared.
        threads: Of the process.
        steps: Batches of an epoch.
    """

    def __init__(self, name: str, command: list[str], folder: str, threads: int, steps: int) -> None:
        self.name, self.steps, self.turns = name, steps, list[tuple[int, float, float]]()
        self.stamps, self.errors = Path(folder, f"{name}.stamps"), Path(folder, f"{name}.errors")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["FIRSTLIGHT_STAMPS"] = str(self.stamps)
        command = [sys.executable, *command]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )

    def warm_up(self) -> bool:
        """Let it train for an epoch and a little; tell whether it could."""
        while len(read(self.stamps)[0]) < self.steps + 5:
            if self.process.poll() is not None:
                print(f"{self.name} failed:\n{self.errors.read_text()[-2000:]}", file=sys.stderr)
                return False
            time.sleep(0.2)
        os.killpg(self.process.pid, signal.SIGSTOP)
        return True

    def train(self, number: int, seconds: float) -> None:
        """Let it train for a turn."""
        begun = time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        time.sleep(seconds)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.turns.append((number, begun, time.perf_counter()))

    def end(self) -> list[dict[str, Any]]:
        """End it; return what it took in each turn, and its peak memory."""
        status = Path("/proc", str(self.process.pid), "status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # What was trained in the last moments of the last turn may not have been written.
        return [{"MiB": round(peak), **each} for each in told(self.turns[:-1], *read(self.stamps), self.steps)]


def told(
    turns: list[tuple[int, float, float]], trained: list[float], validated: list[float], steps: int
) -> list[dict[str, Any]]:
    """Return the seconds of each turn: of a step, between epochs, of a validated batch, of an epoch that ended in it.

    Args:
        turns: Their rounds, beginnings and ends.
        trained: Moments of training, one after the other from the first on.
        validated: Moments of validation.
        steps: Batches of an epoch.
    """
    found, spent = [], 0.0
    clock: dict[int, float] = {}  # The time, of that in which it trained, at which each batch was reached.
    for number, begun, ended in turns:
        first, last = bisect(trained, begun), bisect(trained, ended)
        clock |= {index: trained[index] - begun + spent for index in range(first, last)}
        spent += ended - begun
        apart = [(index, clock[index] - clock[index - 1]) for index in range(first, last) if index - 1 in clock]
        inside = [took for index, took in apart if index % steps]
        if not inside:
            continue
        step = median(inside)
        between = [took - step for index, took in apart if index % steps == 0]
        ends = [index for index in range(first, last) if index % steps == 0 and index - steps in clock]
        checks = [after - before for before, after in pairwise(validated) if begun < before and after < ended]
        found.append(
            {
                "round": number,
                "step": step,
                "between": median(between) if between else None,
                "validated": median(checks) if checks else None,
                "epoch": fmean(clock[index] - clock[index - steps] for index in ends) if ends else None,
            }
        )
    return found


def steps_of(case: str, processes: int) -> int:
    """Return the batches of an epoch of each process."""
    config = (HERE / "cases" / f"{case}.yaml").read_text()
    return int(re.findall(r"limit_train_batches: (\d+)", config)[0]) // processes


def rounds(
    case: str, names: list[str], many: int | None, threads: int, script: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return what each contender took in each round; `script` is called with a name, the case and further arguments."""
    seconds, usual = TURNS.get(case, (2.0, 11))
    many = many or usual
    script = script or [str(HERE / "contenders.py")]
    with tempfile.TemporaryDirectory() as folder:
        if train("prepare", case, folder, threads) is None:
            sys.exit(f"{case} cannot be prepared")
        contenders = []
        try:
            for name in names:
                steps = steps_of(case, 2 if name.endswith("ddp") else 1)
                contenders.append(Contender(name, [*script, name, case, folder], folder, threads, steps))
                if not contenders[-1].warm_up():
                    contenders.pop()
            for number in range(many):
                # In another order each time, or what comes and goes on the machine would fall on the same ones.
                for each in sample(contenders, len(contenders)):
                    each.train(number, seconds)
                print(f"{case}: {number + 1} of {many} rounds", file=sys.stderr, flush=True)
            for each in contenders:
                each.train(many, 0.6)
        finally:
            took = {each.name: each.end() for each in contenders}
    return {name: found for name, found in took.items() if found}


def middle(found: list[dict[str, Any]], figure: str) -> float:
    """Return the median of a figure over the rounds that have it."""
    return median([each[figure] for each in found if each[figure] is not None] or [float("nan")])


def over(found: list[dict[str, Any]], floors: list[dict[str, Any]], figure: str) -> str:
    """Return the median ratio of a figure to the floor's in the nearest round, and the quartiles of the rounds."""
    floor = {each["round"]: each[figure] for each in floors if each[figure] is not None}
    took = [(each["round"], each[figure]) for each in found if each[figure] is not None] if floor else []
    ratios = [value / floor[min(floor, key=lambda other: abs(other - number))] for number, value in took]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}" if ratios else "-"
    low, half, high = quantiles(ratios, n=4, method="inclusive")
    return f"{half:.2f} ({low:.2f} to {high:.2f})"


def rows(case: str, took: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a case in the table."""
    lines = []
    for name, found in took.items():
        floors = took[FLOORS.get(name, "floor")]
        step, between, validated = (
            f"{middle(found, figure) * 1000:.3f}" for figure in ("step", "between", "validated")
        )
        peak, least = middle(found, "MiB"), middle(floors, "MiB")
        ratios = f"{over(found, floors, 'step')} | {over(found, floors, 'epoch')}"
        memory = f"{peak:,.0f} | {peak / least:.2f}"
        lines.append(f"| {case} | {name} | {step} | {ratios} | {between} | {validated} | {memory} | {len(found)} |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How long a step takes.", allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contenders", default=",".join(("firstlight", *PEERS)))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    asked = given.contenders.split(",")
    floors = {FLOORS.get(each, "floor") for each in asked}
    contenders = [*sorted(floors), *(each for each in asked if each not in floors)]
    took = {case: rounds(case, contenders, given.rounds, given.threads) for case in given.cases.split(",")}
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version_of(name)))
    processors = f"{os.cpu_count()} {platform.machine()} processors"
    print(f"Python {platform.python_version()}, {versions}; {processors}, {given.threads} thread(s) a process\n")
    print(
        "| case | contender | ms a step | over the floor's | an epoch over the floor's | ms between epochs "
        "| ms a validated batch | MiB | MiB over the floor's | rounds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line for case, found in took.items() for line in rows(case, found)))
    if given.json:
        given.json.write_text(json.dumps(took, indent=1) + "\n")


if __name__ == "__main__":
    main()
