"""How long firstlight takes to start, and what it costs to log at each step.

    python benchmarks/starting.py [--rounds 5]

Prints a table, medians over interleaved rounds: seconds from the command to the first optimiser step, of the tiny case,
beside those of `import lightning.pytorch`; seconds of `firstlight --help`; and a step of the mlp case where everything
is logged at each step, with gradient norms and without. One thread.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

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


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How long firstlight takes to start.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    many = parser.parse_args().rounds
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    took: dict[str, list[float]] = {}
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
                took.setdefault(name, []).append(seconds(*command, folder=folder, until=until))
            for name, options in (
                ("a step, all of it logged each time", []),
                ("a step, all but gradient norms", ["--without=[gradient_norm]"]),
            ):
                found = train("firstlight", "mlp", folder, 1, "--trainer.log_every_n_steps=1", *options)
                if found:
                    took.setdefault(name, []).append(found["step"] * 1000)
    print("| what | median | least to most |\n|---|---|---|")
    for name, found in took.items():
        unit = "ms" if name.startswith("a step") else "s"
        print(f"| {name} | {median(found):.3f} {unit} | {min(found):.3f} to {max(found):.3f} |")


if __name__ == "__main__":
    main()
