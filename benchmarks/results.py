"""Measure the experiments over five seeds, and write the table in `configs/README.md`.

    python benchmarks/results.py                 measure what was not measured yet, and write the table
    python benchmarks/results.py NAME [NAME...]  measure these again

Each experiment is run as a user does, in a process of its own, with `--seed_everything S --data.split_seed S`: seconds
and peak memory are those of the whole command. Beside it stand the baselines of `baselines.py` on the same splits,
which learn from the training split and are scored once on the test split. What was measured is kept in
`benchmarks/results/NAME.json`.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import baselines
import torch

from firstlight.cli import CLI

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results"
SEEDS = range(5)
BEGIN, END = "<!-- results: made by benchmarks/results.py -->", "<!-- end of results -->"


def run(options: list[str]) -> tuple[dict[str, Any], float, float]:
    """Return `results.json`, the seconds and the peak memory in MiB of one run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "firstlight", "run", *options, "--runs", folder])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            sys.exit(f"firstlight run {' '.join(options)} failed")
        (results,) = Path(folder).glob("*/*/results.json")
        return json.loads(results.read_text()), seconds, usage.ru_maxrss / 1024


def measure(config: Path, known: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what an experiment and its baselines, of which some may be known, reach, a value a seed."""
    scores, seconds, memory = [], [], []
    theirs: dict[str, list[float]] = {}
    for seed in SEEDS:
        options = [
            "--config",
            str(config.relative_to(ROOT)),
            "--seed_everything",
            str(seed),
            "--data.split_seed",
            str(seed),
        ]
        results, took, peak = run(options)
        seconds.append(round(took, 1))
        memory.append(round(peak))
        experiment = CLI("fit", options).experiment
        metric = baselines.METRICS[type(experiment.task).__name__]
        scores.append(results["metrics"][f"test/{metric}"])
        same = f"{type(experiment.task)} {type(experiment.datamodule)} {experiment.datamodule.hparams} {seed}"
        if same not in known:
            known[same] = baselines.scores(experiment.task, experiment.datamodule, seed)
        for name, score in known[same].items():
            theirs.setdefault(name, []).append(score)
    return {
        "metric": metric,
        "scores": scores,
        "seconds": seconds,
        "memory": memory,
        "parameters": sum(parameter.numel() for parameter in experiment.task.parameters()),
        "baselines": theirs,
        "machine": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s)",
    }


def spread(values: list[float]) -> str:
    """Return mean and standard deviation; one value where nothing is random."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(set(values)) > 1 else "")


def row(name: str, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    theirs = ", ".join(f"{each} {spread(values)}" for each, values in found["baselines"].items())
    cells = (
        f"`firstlight run --config configs/{name}.yaml`",
        found["metric"],
        f"**{spread(found['scores'])}**",
        theirs,
        f"{mean(found['seconds']):.0f}",
        f"{max(found['memory']):,}",
        f"{found['parameters']:,}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and write the table."""
    os.chdir(ROOT)
    known: dict[str, dict[str, float]] = {}
    for config in sorted(ROOT.glob("configs/*.yaml")):
        kept = MEASURED / f"{config.stem}.json"
        if config.stem in sys.argv[1:] or not (sys.argv[1:] or kept.exists()):
            kept.write_text(json.dumps(measure(config, known), indent=1) + "\n")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(MEASURED.glob("*.json"))}
    head = "| command | test metric | firstlight | baselines | seconds | MiB | parameters |"
    rows = [row(name, each) for name, each in found.items()]
    table = "\n".join([BEGIN, "", head, "|---|---|---|---|---|---|---|", *rows, ""])
    machines = sorted({each["machine"] for each in found.values()})
    table += (
        "\nMean ± standard deviation over seeds 0 to 4 (`--seed_everything S --data.split_seed S`), the mean of the "
        f"seconds of the whole command, the largest peak memory. {'; '.join(machines)}; two processors that share a "
        f"core, the other one busy.\n\n{END}"
    )
    page = ROOT / "configs" / "README.md"
    text = page.read_text()
    page.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])
    print(table)


if __name__ == "__main__":
    main()
