"""How long firstlight takes to start, and what it costs to log at each step.

    python benchmarks/starting.py [--rounds 5]

Prints a table, medians over interleaved rounds: seconds from the command to the first optimiser step, of the tiny case,
beside those of `import lightning.pytorch`; seconds of `firstlight --help`; and a step of the mlp case where everything
is logged at each step, with gradient norms and without: twenty steps of one run each in turn, of which the first two
count for neither, since what was logged before is still being written. One thread.
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
    """Return how long a command of this Python took, or how long it took until it printed `until` and a time."""
    started = time.time()
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    ended = time.time()
    found = [line for line in done.stdout.splitlines() if line.startswith(until)] if until else []
    if bool(until) != bool(found) or (done.returncode and not until):
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return (float(found[0].split()[-1]) if found else ended) - started


def logged(case: str, folder: str) -> list[float]:
    """Return the median seconds of a step without gradient norms and with them, of one run in this process."""
    import contenders

    from firstlight.callbacks import GradientNorm

    work = contenders.Work(case, Path(folder))
    moments, norm = work.stamps.trained, GradientNorm.on_before_optimizer_step

    def in_turn(*args: Any) -> None:
        if (len(moments) - 1) // 20 % 2:
            norm(*args)

    GradientNorm.on_before_optimizer_step = in_turn  # type: ignore[method-assign]
    contenders.firstlight(work)
    took = list(enumerate(after - before for before, after in pairwise(moments)))[work.steps :]
    return [median(each for step, each in took if step // 20 % 2 == turn and step % 20 > 1) for turn in range(2)]


def main() -> None:
    """Measure, and print the table."""
    if sys.argv[1:2] == ["--logged"]:
        sys.argv[:2] = ["contenders.py", "firstlight"]  # where contenders look for their options
        print(json.dumps(logged(*sys.argv[2:4])))
        return
    parser = argparse.ArgumentParser(description="How long firstlight takes to start.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    many = parser.parse_args().rounds
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "first_step.py").write_text(CALLBACK)
        fit = ["-m", "firstlight", "fit", "--config", str(HERE / "cases" / "tiny.yaml"), "--trainer.callbacks"]
        if train("prepare", "mlp", folder, 1) is None:
            sys.exit("mlp cannot be prepared")
        for _ in range(many):
            for name, command, until in (
                ("`import lightning.pytorch`", ["-c", "import lightning.pytorch"], ""),
                ("`firstlight fit`, to the first step", [*fit, "first_step.FirstStep"], "first step at"),
                ("`firstlight --help`", ["-m", "firstlight", "--help"], ""),
            ):
                took[name, "s"].append(seconds(*command, folder=folder, until=until))
            command = [sys.executable, __file__, "--logged", "mlp", folder, "--trainer.log_every_n_steps=1"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"firstlight failed:\n{done.stderr[-2000:]}")
            less, more = (1000 * each for each in json.loads(done.stdout.splitlines()[-1]))
            took["a step that logs all but gradient norms", "ms"].append(less)
            took["a step that logs gradient norms too", "ms"].append(more)
            took["what they add to it", "%"].append((more / less - 1) * 100)
    print("| what | median | least to most |\n|---|---|---|")
    for (name, unit), found in took.items():
        digits = 1 if unit == "%" else 3
        print(f"| {name} | {median(found):.{digits}f} {unit} | {min(found):.{digits}f} to {max(found):.{digits}f} |")


if __name__ == "__main__":
    main()
