"""Compare what `firstlight lr` suggests with the best of a grid of 12 learning rates, on the shipped configurations.

    python benchmarks/lr.py --results F [NAME...]         measure what F lacks, and print the table
    python benchmarks/lr.py --results F --write           print the table of F, and write it into docs/search.md

Each rate is the peak of a run with the configuration's own schedule, on one thread. The loss of a run is its lowest
validation loss, infinite if a step was not finite. A run has as many epochs as fit into `--seconds` of the processor,
at most `--epochs` and those of the configuration, which is left out if no epoch fits.

The grid is trained with seed 0. Its best loss is that of a lucky run, too, so the suggestion and the best rate are
trained again with the seeds 1, 2, ... (`--seeds`), and compared without luck.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from pages import write_section

from firstlight.cli.parser import CLI
from firstlight.cli.rate import TRIES, find_rate
from firstlight.cli.side_effects import isolated
from firstlight.errors import TrainingError, UsageError, printing

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "search.md"
GRID = [10 ** (-5 + 5 * index / 11) for index in range(12)]
OPTION = "model.optimizer.lr"
DISABLED = "best,last,hparams,insight,progress,lr,gradient_norm,shutdown,random_state"
CHOSEN = {
    *("bicycles", "bicycles_tabm", "breast_cancer", "corpus_lm", "diabetes", "diabetes_linear"),
    *("digits_contrastive", "digits_convnet", "digits_convnet_augmented", "digits_mlp"),
}
"""Configurations whose grids chose the constants of `preflight/lr_range.py`."""
CLOSE = 0.03


class Lowest(Callback):
    """Keep the lowest validation loss of a fit."""

    def __init__(self) -> None:
        self.loss = math.inf

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the loss of this validation."""
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val/loss"])
            self.loss = min(self.loss, loss) if math.isfinite(loss) else self.loss


class Configuration:
    """A shipped configuration and what is known of it; its data are loaded once, when they are needed."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        self.name, self.entry = name, entry

    @cached_property
    def cli(self) -> CLI:
        """Its command line, which holds the experiment that was trained last."""
        return self.build()

    def build(self, *more: str) -> CLI:
        """Return a command line with an experiment that was not trained."""
        self.folder = tempfile.TemporaryDirectory()
        options = ["--runs", self.folder.name, "--disable", DISABLED, "--trainer.logger", "false"]
        return CLI("fit", ["--config", f"firstlight:{self.name}", *options, *more])

    def train(self, rate: float, seed: int, epochs: int) -> dict[str, float]:
        """Return the lowest validation loss of a run, and its seconds."""
        lowest, started = Lowest(), time.monotonic()
        with isolated(), printing("silent"):
            experiment = self.cli.variant({OPTION: rate, "seed_everything": seed, "trainer.max_epochs": epochs})
            experiment.options = {**experiment.options, "callbacks": [lowest]}
            experiment.datamodule.share(self.cli.experiment.datamodule)
            try:
                experiment.fit()
            except TrainingError:
                lowest.loss = math.inf
        return {"loss": lowest.loss, "seconds": round(time.monotonic() - started, 2)}

    def plan(self, seconds: float, most: int) -> int:
        """Return how many epochs fit into seconds of the processor."""
        own, took = self.cli.options(), []
        for epochs in (1, 1, 3):  # The first run is slow.
            begun = time.process_time()
            self.train(own[OPTION], 0, epochs)
            took.append(time.process_time() - begun)
        return min(most, own["trainer.max_epochs"], int(2 * seconds / max(took[2] - took[1], 1e-3)))

    def suggest(self) -> dict[str, float]:
        """Return what `firstlight lr` suggests for the epochs of the grid, and what its range test alone suggests."""
        started = time.monotonic()
        with isolated(), printing("silent"):
            found = find_rate(self.build("--trainer.max_epochs", str(self.entry["epochs"])), TRIES)
        tested = found.test.suggestion
        rates = {"rate": found.rate, "tested": tested.rate, "low": tested.low, "high": tested.high}
        return rates | {"own": found.test.own, "tries": len(found.tried), "seconds": time.monotonic() - started}

    def loss(self, rate: float, seed: int) -> float:
        """Return the loss of a run that was trained."""
        return self.entry["runs"][f"{rate:.3g} {seed}"]["loss"]

    @property
    def best(self) -> float:
        """The rate of the grid with the lowest loss."""
        return min(GRID, key=lambda rate: self.loss(rate, 0))

    def difference(self, seeds: int) -> float | None:
        """Return how far the suggestion is above the best rate, over so many other seeds; with 0, over seed 0."""
        numbers = range(1, seeds + 1) if seeds else range(1)
        try:
            mine, best = (
                statistics.fmean(self.loss(rate, seed) for seed in numbers)
                for rate in (self.entry["suggestion"]["rate"], self.best)
            )
        except KeyError:
            return None
        return (mine - best) / abs(best)

    def measure(self, given: argparse.Namespace, results: dict[str, Any]) -> None:
        """Train what is missing, and store it after each run."""
        entry = self.entry
        if "epochs" not in entry:
            entry["epochs"] = self.plan(given.seconds, given.epochs)
        if not entry["epochs"]:
            return
        wanted = [(rate, 0) for rate in GRID]
        self._train(wanted, given.results, results)
        if "suggestion" not in entry:
            entry["suggestion"] = self.suggest()
            store(given.results, results)
        rates = (entry["suggestion"]["rate"], self.best)
        self._train([(rates[0], 0), (entry["suggestion"]["tested"], 0)], given.results, results)
        self._train([(rate, seed) for seed in range(1, given.seeds + 1) for rate in rates], given.results, results)

    def _train(self, wanted: list[tuple[float, int]], path: Path, results: dict[str, Any]) -> None:
        for rate, seed in wanted:
            if (key := f"{rate:.3g} {seed}") not in self.entry["runs"]:
                self.entry["runs"][key] = self.train(rate, seed, self.entry["epochs"])
                print(self.name, key, self.entry["runs"][key], flush=True)
                store(path, results)


def store(path: Path, results: dict[str, Any]) -> None:
    """Write the results, so that a benchmark that was interrupted continues."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1))
    new.replace(path)


def table(measured: list[Configuration], seeds: int) -> str:
    """Return the table and its summary as Markdown."""
    other = f"with {seeds} other seed{'s' * (seeds > 1)}"
    lines = [
        "| configuration | epochs | suggestion | runs | its loss | best rate | its loss | difference | "
        f"{other} | range test alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in measured:
        found, best = each.entry["suggestion"], each.best
        alone = (each.loss(found["tested"], 0) - each.loss(best, 0)) / abs(each.loss(best, 0))
        differences = [each.difference(0), each.difference(seeds), alone]
        cells = (
            each.name + ("" if each.name in CHOSEN else " \\*"),
            each.entry["epochs"],
            f"{found['rate']:.2g}",
            found["tries"],
            f"{each.loss(found['rate'], 0):.4g}",
            f"{best:.2g}",
            f"{each.loss(best, 0):.4g}",
            *("" if value is None else f"{100 * value:+.1f} %" for value in differences),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    held_out = [each for each in measured if each.name not in CHOSEN]
    close = [(_close(measured, number), _close(held_out, number)) for number in (0, seeds)]
    text = (
        f"Within {100 * CLOSE:.0f} % of the best of 12 rates: {close[0][0]}; of those with \\*, which had no part in "
        f"choosing the rule, {close[0][1]}. {other.capitalize()}: {close[1][0]}; of those with \\*, {close[1][1]}. The "
        f"median difference is {100 * _median(measured, 0):.1f} %, and {100 * _median(measured, seeds):.1f} % {other}. "
        f"Another seed alone changes the loss of the best rate by {100 * _luck(measured):.1f} % (median)."
    )
    return "\n".join([*lines, "", *_wrapped(text)])


def _known(measured: list[Configuration], seeds: int) -> list[float]:
    return [value for each in measured if (value := each.difference(seeds)) is not None]


def _close(measured: list[Configuration], seeds: int) -> str:
    known = _known(measured, seeds)
    return f"{sum(value <= CLOSE for value in known)} of {len(known)}"


def _median(measured: list[Configuration], seeds: int) -> float:
    return statistics.median(_known(measured, seeds) or [math.nan])


def _luck(measured: list[Configuration]) -> float:
    """Return the median relative change of the loss of the best rate from seed 0 to seed 1."""
    known = [each for each in measured if f"{each.best:.3g} 1" in each.entry["runs"]]
    changes = [abs(each.loss(each.best, 1) / each.loss(each.best, 0) - 1) for each in known]
    return statistics.median(changes or [math.nan])


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 120, break_long_words=False)


def main() -> None:
    """Measure what is missing, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="configurations; default: all, with --write those of the results")
    parser.add_argument("--results", type=Path, required=True, metavar="F", help="JSON file of what is measured")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor for a run")
    parser.add_argument("--epochs", type=int, default=sys.maxsize, help="at most, for a run")
    parser.add_argument("--seeds", type=int, default=2, help="other seeds for the suggestion and the best rate")
    parser.add_argument("--write", action="store_true", help="measure nothing, and write the table into docs/search.md")
    given = parser.parse_args()
    results = json.loads(given.results.read_text()) if given.results.is_file() else {}
    names = given.names or sorted(results if given.write else (each.stem for each in (ROOT / "configs").glob("*.yaml")))
    for name in () if given.write else names:
        try:
            Configuration(name, results.setdefault(name, {"runs": {}})).measure(given, results)
        except UsageError as error:  # For example, its data are not on this machine.
            print(f"{name}: {error}", file=sys.stderr)
    measured = [Configuration(name, results[name]) for name in names if f"{GRID[-1]:.3g} 0" in results[name]["runs"]]
    text = table([each for each in measured if each.difference(0) is not None], given.seeds)
    print(text)
    if given.write:
        write_section(PAGE, "rates", text)


if __name__ == "__main__":
    main()
