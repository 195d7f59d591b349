"""Measure a training step by hand, with firstlight, and with other frameworks.

    python benchmarks/speed.py [--cases tiny,mlp] [--contenders floor,firstlight] [--rounds 40] [--threads 1] [--json F]

Each contender trains in its own process. The contenders take short turns in random order, round after round. SIGSTOP
stops each one while the others train. So other work on the machine affects all of them alike.

The time of a step is the median of the steps of a turn. The time of an epoch includes validation, logging and
checkpoints. An epoch may take several turns, and counts in the round in which it ends.

Each ratio compares a contender with the floor, the loop by hand, in the same round. For epochs it uses the nearest
round in which an epoch of the floor ended. The table shows the median of the rounds and the quartiles. "Between epochs"
is the time from the last step of an epoch to the first step of the next, minus one step. `ddp` is the floor of
`firstlight_ddp`, on two processes.

A contender that fails is named on standard error. The table is printed, and `--json F` writes the figures to a file.
"""

# Import nothing large here: the peak memory of a child process starts at that of this process.
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
"""Seconds of a turn and number of rounds, by case."""
PEERS = ("dataloader", "accelerate", "lightning", "skorch", "fastai", "keras", "transformers")
PACKAGES = ("torch", "lightning", *PEERS[1:2], *PEERS[3:])
FLOORS = {"firstlight_ddp": "ddp", "ddp": "ddp"}


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def train(contender: str, case: str, folder: str, threads: int, *options: str) -> dict[str, Any] | None:
    """Return the figures of a contender in a case, or None if it failed; `options` are passed to firstlight."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / "contenders.py"), contender, case, folder, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{contender} failed in {case}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if contender != "prepare" else {}
    return figures


class Contender:
    """A process that trains during its turns and is stopped otherwise.

    Args:
        name: Name of the contender.
        command: Arguments for the Python interpreter.
        folder: Folder with the prepared data.
        threads: Threads of the process.
        steps: Batches in an epoch.
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
        """Train for one epoch and five steps; return whether that worked."""
        while len(read(self.stamps)[0]) < self.steps + 5:
            if self.process.poll() is not None:
                print(f"{self.name} failed:\n{self.errors.read_text()[-2000:]}", file=sys.stderr)
                return False
            time.sleep(0.2)
        os.killpg(self.process.pid, signal.SIGSTOP)
        return True

    def train(self, number: int, seconds: float) -> None:
        """Train for one turn."""
        start = time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        time.sleep(seconds)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.turns.append((number, start, time.perf_counter()))

    def end(self) -> list[dict[str, Any]]:
        """End the process; return the figures of each turn and the peak memory."""
        status = Path("/proc", str(self.process.pid), "status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # The last stamps of the last turn may not be in the file yet.
        return [{"MiB": round(peak), **each} for each in turn_figures(self.turns[:-1], *read(self.stamps), self.steps)]


def turn_figures(
    turns: list[tuple[int, float, float]], trained: list[float], validated: list[float], steps: int
) -> list[dict[str, Any]]:
    """Return the seconds of a step, between epochs, of a validated batch, and of an epoch, for each turn.

    Args:
        turns: Number, start and end of each turn.
        trained: Times at which training batches reached the network, from the first one.
        validated: Times at which validation batches reached it.
        steps: Batches in an epoch.
    """
    figures, spent = [], 0.0
    clock: dict[int, float] = {}  # By batch: the time since the start, without the time in which others train.
    for number, start, end in turns:
        first, last = bisect(trained, start), bisect(trained, end)
        clock |= {index: trained[index] - start + spent for index in range(first, last)}
        spent += end - start
        gaps = [(index, clock[index] - clock[index - 1]) for index in range(first, last) if index - 1 in clock]
        inside = [seconds for index, seconds in gaps if index % steps]
        if not inside:
            continue
        step = median(inside)
        between = [seconds - step for index, seconds in gaps if index % steps == 0]
        ends = [index for index in range(first, last) if index % steps == 0 and index - steps in clock]
        checks = [after - before for before, after in pairwise(validated) if start < before and after < end]
        figures.append(
            {
                "round": number,
                "step": step,
                "between": median(between) if between else None,
                "validated": median(checks) if checks else None,
                "epoch": fmean(clock[index] - clock[index - steps] for index in ends) if ends else None,
            }
        )
    return figures


def steps_of(case: str, processes: int) -> int:
    """Return the number of batches in an epoch of each process."""
    config = (HERE / "cases" / f"{case}.yaml").read_text()
    return int(re.findall(r"limit_train_batches: (\d+)", config)[0]) // processes


def measure(
    case: str, names: list[str], rounds: int | None, threads: int, script: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of each contender in each round; `script` is called with a name, the case and a folder."""
    seconds, default_rounds = TURNS.get(case, (2.0, 11))
    rounds = rounds or default_rounds
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
            for number in range(rounds):
                # The order changes, so that periodic work on the machine does not always affect the same contender.
                for each in sample(contenders, len(contenders)):
                    each.train(number, seconds)
                print(f"{case}: {number + 1} of {rounds} rounds", file=sys.stderr, flush=True)
            for each in contenders:
                each.train(rounds, 0.6)
        finally:
            results = {each.name: each.end() for each in contenders}
    return {name: turns for name, turns in results.items() if turns}


def median_of(turns: list[dict[str, Any]], figure: str) -> float:
    """Return the median of a figure over the turns that have it."""
    return median([each[figure] for each in turns if each[figure] is not None] or [float("nan")])


def ratio_to(floors: list[dict[str, Any]], turns: list[dict[str, Any]], figure: str) -> str:
    """Return the median and the quartiles of the ratios of a figure to that of the floor in the nearest round."""
    floor = {each["round"]: each[figure] for each in floors if each[figure] is not None}
    values = [(each["round"], each[figure]) for each in turns if each[figure] is not None] if floor else []
    ratios = [value / floor[min(floor, key=lambda other: abs(other - number))] for number, value in values]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}" if ratios else "-"
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def rows(case: str, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a case in the table."""
    lines = []
    for name, turns in results.items():
        floors = results[FLOORS.get(name, "floor")]
        step, between, validated = (
            f"{median_of(turns, figure) * 1000:.3f}" for figure in ("step", "between", "validated")
        )
        peak, floor_peak = median_of(turns, "MiB"), median_of(floors, "MiB")
        ratios = f"{ratio_to(floors, turns, 'step')} | {ratio_to(floors, turns, 'epoch')}"
        memory = f"{peak:,.0f} | {peak / floor_peak:.2f}"
        lines.append(f"| {case} | {name} | {step} | {ratios} | {between} | {validated} | {memory} | {len(turns)} |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Measure a training step.", allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contenders", default=",".join(("firstlight", *PEERS)))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.contenders.split(",")
    floors = {FLOORS.get(each, "floor") for each in names}
    contenders = [*sorted(floors), *(each for each in names if each not in floors)]
    results = {case: measure(case, contenders, args.rounds, args.threads) for case in args.cases.split(",")}
    versions = ", ".join(f"{name} {installed}" for name in PACKAGES if (installed := version_of(name)))
    processors = f"{os.cpu_count()} {platform.machine()} processors"
    print(f"Python {platform.python_version()}, {versions}; {processors}, {args.threads} thread(s) a process\n")
    print(
        "| case | contender | ms a step | over the floor's | an epoch over the floor's | ms between epochs "
        "| ms a validated batch | MiB | MiB over the floor's | rounds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line for case, turns in results.items() for line in rows(case, turns)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
