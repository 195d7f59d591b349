"""Measure the experiments over five seeds and write the table in `configs/README.md`.

    python benchmarks/results.py [EXPERIMENT ...]

Each experiment is run as a user does, in a process of its own, with `--seed_everything S --data.split_seed S`; the
seconds are those of the whole command. The baseline is scikit-learn's `MLPClassifier` with its default settings on
the same splits, scaled alike: it learns from the training split and is scored once on the test split.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from firstlight.cli import CLI

CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = range(5)
BEGIN, END = "<!-- results: made by benchmarks/results.py -->", "<!-- end of results -->"


def measure(config: Path) -> str:
    """Return the line of the table for an experiment."""
    scores, seconds, baseline = [], [], []
    for seed in SEEDS:
        options = ["--config", str(config), "--seed_everything", str(seed), "--data.split_seed", str(seed)]
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "firstlight", "run", *options], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
            seconds.append(time.monotonic() - start)
            (results,) = Path(folder).glob("runs/*/*/results.json")
            scores.append(json.loads(results.read_text())["metrics"]["test/accuracy"])
        cli = CLI("fit", options)
        cli.datamodule.setup()
        train, test = cli.datamodule.dataset("train"), cli.datamodule.dataset("test")
        inputs = [cli.datamodule.transform(part.inputs).flatten(1) for part in (train, test)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier = MLPClassifier(random_state=seed).fit(inputs[0], train.targets)
        baseline.append(classifier.score(inputs[1], test.targets))
    parameters = sum(parameter.numel() for parameter in cli.model.parameters())
    command = f"`firstlight run --config configs/{config.name}`"
    ours, theirs = (f"{mean(each):.4f} ± {stdev(each):.4f}" for each in (scores, baseline))
    return f"| {command} | {parameters:,} | {ours} | {theirs} | {mean(seconds):.1f} (most {max(seconds):.1f}) |"


def main() -> None:
    """Measure the experiments that were named, or all, and write the table."""
    named = [CONFIGS / f"{name}.yaml" for name in sys.argv[1:]]
    rows = [measure(config) for config in named or sorted(CONFIGS.glob("*.yaml"))]
    head = "| command | parameters | test accuracy | MLPClassifier | seconds |"
    machine = (
        f"Mean ± standard deviation over seeds 0 to {len(SEEDS) - 1} (`--seed_everything S --data.split_seed S`). "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{platform.machine()}."
    )
    table = "\n".join([BEGIN, "", head, "|---|---|---|---|---|", *rows, "", machine, "", END])
    print(table)
    page = CONFIGS / "README.md"
    text = page.read_text()
    if not named:
        page.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])


if __name__ == "__main__":
    main()
