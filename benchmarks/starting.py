"""Measure how long firstlight takes to start, and the cost of logging at each step.

    python benchmarks/starting.py [--rounds 5]

This prints a table with medians over interleaved rounds, with one thread:

- seconds from the command to the first optimiser step of the tiny case, beside those of `import lightning.pytorch`;
- seconds of `firstlight --help`;
- milliseconds of a step of the mlp case that logs everything, with and without gradient norms. One run switches
  gradient norms on and off every twenty steps. The first two steps after a switch are left out, because the loggers
  still write the values of the steps before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from speed import HERE, train

CALLBACK = """
import time
from lightning.pytorch import Callback


class FirstStep(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print("first step at", time.time(), flush=True)
        raise KeyboardInterrupt
"""


def seconds(*command: str, folder: str, until: str = "") -> float:
    """Return the seconds of a Python command, or those until it printed `until` and a time."""
    started = time.time()
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    ended = time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith(until)] if until else []
    if bool(until) != bool(lines) or (done.returncode and not until):
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return (float(lines[0].split()[-1]) if lines else ended) - started


def logging_steps(case: str, folder: str) -> list[float]:
    """Return the median seconds of a step without and with gradient norms, in one run in this process."""
    import contenders

    from firstlight.callbacks import GradientNorm

    work = contenders.Work(case, Path(folder))
    times, log_norms = work.stamps.trained, GradientNorm.on_before_optimizer_step

    def in_every_other_turn(*args: Any) -> None:
        if (len(times) - 1) // 20 % 2:
            log_norms(*args)

    GradientNorm.on_before_optimizer_step = in_every_other_turn  # type: ignore[method-assign]
    contenders.firstlight(work)
    gaps = list(enumerate(after - before for before, after in pairwise(times)))[work.steps :]
    return [median(gap for step, gap in gaps if step // 20 % 2 == turn and step % 20 > 1) for turn in range(2)]


def main() -> None:
    """Measure, and print the table."""
    if sys.argv[1:2] == ["--logged"]:
        sys.argv[:2] = ["contenders.py", "firstlight"]  # contenders.py reads its options from here
        print(json.dumps(logging_steps(*sys.argv[2:4])))
        return
    parser = argparse.ArgumentParser(description="Measure how long firstlight takes to start.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "first_step.py").write_text(CALLBACK)
        fit = ["-m", "firstlight", "fit", "--config", str(HERE / "cases" / "tiny.yaml"), "--trainer.callbacks"]
        if train("prepare", "mlp", folder, 1) is None:
            sys.exit("mlp cannot be prepared")
        for _ in range(rounds):
            for name, command, until in (
                ("`import lightning.pytorch`", ["-c", "import lightning.pytorch"], ""),
                ("`firstlight fit`, to the first step", [*fit, "first_step.FirstStep"], "first step at"),
                ("`firstlight --help`", ["-m", "firstlight", "--help"], ""),
            ):
                figures[name, "s"].append(seconds(*command, folder=folder, until=until))
            command = [sys.executable, __file__, "--logged", "mlp", folder, "--trainer.log_every_n_steps=1"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"firstlight failed:\n{done.stderr[-2000:]}")
            without, with_norms = (1000 * each for each in json.loads(done.stdout.splitlines()[-1]))
            figures["a step that logs all but gradient norms", "ms"].append(without)
            figures["a step that logs gradient norms too", "ms"].append(with_norms)
            figures["difference", "%"].append((with_norms / without - 1) * 100)
    print("| figure | median | minimum to maximum |\n|---|---|---|")
    for (name, unit), values in figures.items():
        digits = 1 if unit == "%" else 3
        low, high = min(values), max(values)
        print(f"| {name} | {median(values):.{digits}f} {unit} | {low:.{digits}f} to {high:.{digits}f} |")


if __name__ == "__main__":
    main()
