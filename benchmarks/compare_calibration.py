"""Compare configurations whose true difference is known, and count how often `firstlight compare` is right.

    python benchmarks/compare_calibration.py [--comparisons 1000]

Prints the table of `docs/compare.md`. It uses the functions of `firstlight.insight`. A configuration is a small
network: random tanh features, drawn by a seed, and a ridge regression on them. So hundreds of runs take seconds. The
test samples of each comparison are drawn from 20,000, on which the true difference is known. Each line has:

- false: how often a difference is shown although there is none, which should be 5 %.
- covers: how often the interval holds the true difference of two different configurations, which should be 95 %.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from scipy import stats

from firstlight.insight import compare
from firstlight.insight.contributions import contributions

CLASSES, DIMENSIONS, POPULATION, RUNS = 4, 8, 20_000, 200


@dataclass
class Configuration:
    """A network of `features` random features, and the strength of its weight decay."""

    features: int
    decay: float = 1.0

    def predict(self, seed: int, inputs: np.ndarray, targets: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Return the class probabilities of new inputs after training with a seed."""
        rng = np.random.default_rng(seed)
        weights, shift = rng.normal(size=(DIMENSIONS, self.features)), rng.normal(size=self.features)
        known, unknown = np.tanh(inputs @ weights + shift), np.tanh(new @ weights + shift)
        gram = known.T @ known + self.decay * np.eye(self.features)
        scores = 4 * unknown @ np.linalg.solve(gram, known.T @ np.eye(CLASSES)[targets])
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)


SMALL, LARGE = Configuration(40), Configuration(60)


def draw(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets: four clouds that overlap, and 5 % random targets."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(2 * CLASSES, DIMENSIONS)) * 1.1
    cloud = rng.integers(0, 2 * CLASSES, size)
    targets = np.where(rng.random(size) < 0.05, rng.integers(0, CLASSES, size), cloud % CLASSES)
    return centres[cloud] + rng.normal(size=(size, DIMENSIONS)), targets


@cache
def bank(features: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the probabilities of many runs of a configuration for the population, and its targets."""
    inputs, targets = draw(600, 1)
    new, truth = draw(POPULATION, 2)
    configuration = Configuration(features)
    found = [configuration.predict(1000 * features + seed, inputs, targets, new) for seed in range(RUNS)]
    return [each.astype(np.float32) for each in found], truth


def metric(name: str, probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the contributions of samples to a metric, as `firstlight compare` computes them."""
    arrays = {"predictions": probabilities.argmax(1)} if name == "accuracy" else {"outputs": probabilities}
    if name == "loss":
        nats = -np.log(probabilities[np.arange(len(targets)), targets].astype(float))
        arrays = {"loss": nats, "weight": np.ones(len(targets))}
    outputs = {"kind": "classes", "targets": targets, **arrays}
    return contributions(outputs)[name]


@cache
def of_population(name: str, features: int) -> np.ndarray:
    """Return what each sample of the population adds to a metric, `(RUNS, POPULATION)`; not for `auroc`."""
    every, targets = bank(features)
    return np.array([metric(name, each, targets) for each in every])


@cache
def truth(name: str, features: int) -> np.ndarray:
    """Return the true metric of each run of a configuration, on the whole population."""
    every, targets = bank(features)
    return np.array([metric(name, each, targets).mean() for each in every])


@dataclass
class Row:
    """Counts of one line of the table."""

    what: str
    shown: list[bool] = field(default_factory=list)
    covers: list[bool] = field(default_factory=list)

    def add_equal(self, found: compare.Difference) -> None:
        """Count a comparison whose true difference is 0."""
        self.shown.append(found.is_shown)

    def add_other(self, found: compare.Interval, true: float) -> None:
        """Count a comparison whose true difference is known."""
        self.covers.append(found.low <= true <= found.high)

    def __str__(self) -> str:
        rates = [f"{100 * np.mean(each):.1f} %" if each else "-" for each in (self.shown, self.covers)]
        return f"| {self.what} | {rates[0]} | {rates[1]} |"


def pick(rng: np.random.Generator, features: int, count: int, size: int, name: str) -> Callable[..., np.ndarray]:
    """Return a function that gives the contributions `(count, size)` of other runs, on the same test samples."""
    order, rows = rng.permutation(RUNS), rng.choice(POPULATION, size, replace=False)
    given = iter(range(0, RUNS, count))

    def runs(of: int = features, many: int = count) -> tuple[np.ndarray, np.ndarray]:
        every, targets = bank(of)
        start = next(given)
        chosen = order[start : start + many]
        if name != "auroc":  # Its contributions depend on the other samples.
            return of_population(name, of)[np.ix_(chosen, rows)], truth(name, of)[chosen]
        return np.array([metric(name, every[each][rows], targets[rows]) for each in chosen]), truth(name, of)[chosen]

    return runs


def single(name: str, size: int, comparisons: int) -> Row:
    """Compare two runs on the same samples. For equal ones, the outputs of each sample are swapped at random."""
    row = Row(f"one run each, {size:,} samples, {name}")
    rng = np.random.default_rng(size)
    for _ in range(comparisons):
        runs = pick(rng, SMALL.features, 1, size, name)
        (a, _), (b, _) = runs(), runs()
        swap = rng.random(size) < 0.5
        row.add_equal(compare.difference_of_samples(np.where(swap, b[0], a[0]), np.where(swap, a[0], b[0])))
        (a, true_a), (b, true_b) = runs(), runs(LARGE.features)
        row.add_other(compare.difference_of_samples(a[0], b[0]), true_b[0] - true_a[0])
    return row


def seeds(name: str, counts: tuple[int, int], size: int, comparisons: int, is_paired: bool = False) -> Row:
    """Compare groups of runs with other seeds: a configuration with itself, and with another one."""
    pairs = ", in pairs" if is_paired else ""
    row = Row(f"{counts[0]} and {counts[1]} seeds{pairs}, {size:,} samples, {name}")
    rng = np.random.default_rng(size + sum(counts))
    true = truth(name, LARGE.features).mean() - truth(name, SMALL.features).mean()
    for _ in range(comparisons):
        runs = pick(rng, SMALL.features, max(counts), size, name)
        groups = [runs(many=count)[0] for count in counts]
        row.add_equal(compare.difference_of_groups(*groups, is_paired=is_paired))
        groups = [runs(of, count)[0] for of, count in zip((SMALL.features, LARGE.features), counts, strict=True)]
        row.add_other(compare.difference_of_groups(*groups, is_paired=is_paired), true)
    return row


def folds(count: int, size: int, comparisons: int) -> list[Row]:
    """Compare runs of the same folds of new data, with other seeds; with the correction and without it."""
    row = Row(f"{count} folds of {size:,} samples, accuracy")
    plain = Row(f"{count} folds of {size:,} samples, accuracy, without the correction (not used)")
    new, truths = draw(POPULATION // 4, 3)
    kept = size - size // count
    true = np.mean([accuracies(draw(kept, 9000 + index), index, new, truths) for index in range(300)], axis=0)
    for comparison in range(comparisons):
        inputs, targets = draw(size, 10_000 + comparison)
        found = []
        for fold in range(count):
            held = np.arange(size) % count == fold
            known = inputs[~held], targets[~held]
            found.append(accuracies(known, count * comparison + fold, inputs[held], targets[held]))
        small, again, large = np.array(found).T
        row.add_equal(compare.difference_of_folds(small, again))
        row.add_other(compare.difference_of_folds(small, large), true[2] - true[0])
        plain.add_equal(compare.difference_of_groups(small, again, is_paired=True))
        plain.add_other(compare.difference_of_groups(small, large, is_paired=True), true[2] - true[0])
    return [row, plain]


def accuracies(known: tuple[np.ndarray, np.ndarray], seed: int, inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """Return the accuracies of the small configuration with two seeds, and of the large one."""
    return [
        float((each.predict(3 * seed + index, *known, inputs).argmax(1) == targets).mean())
        for index, each in enumerate((SMALL, SMALL, LARGE))
    ]


def other_methods(size: int, comparisons: int) -> list[Row]:
    """Return how methods that are not used do, and what one run each says about a configuration."""
    names = (
        "one run each of one configuration with two seeds",
        "6 seeds: two-level bootstrap",
        "6 seeds: BCa bootstrap of the seeds",
        "6 seeds: BCa bootstrap and sign-flip test agree",
        "one run each: exact McNemar test",
        "one run each: BCa bootstrap alone",
    )
    rows = [Row(f"{name}, {size:,} samples, accuracy") for name in names]
    rng = np.random.default_rng(7)
    true = truth("accuracy", LARGE.features).mean() - truth("accuracy", SMALL.features).mean()
    for _ in range(comparisons):
        runs = pick(rng, SMALL.features, 6, size, "accuracy")
        (a, true_a), (b, _), (c, true_c) = runs(), runs(), runs(LARGE.features)
        rows[0].add_equal(compare.difference_of_samples(a[0], b[0]))
        rows[0].add_other(compare.difference_of_samples(a[0], c[0]), true)
        for equal, each in ((True, b - a), (False, c - a)):
            two = two_level(each, rng)
            low, high = stats.bootstrap((each.mean(1),), np.mean, n_resamples=1999, rng=rng).confidence_interval
            if equal:
                rows[1].shown.append(not two[0] <= 0 <= two[1])
                rows[2].shown.append(not low <= 0 <= high)
                rows[3].shown.append(not low <= 0 <= high and compare.sign_flip(each.mean(1)) <= 0.05)
            else:
                rows[1].covers.append(two[0] <= true <= two[1])
                rows[2].covers.append(low <= true <= high)
        swapped = (b[0] - a[0]) * rng.choice((-1, 1), size)
        counts = int((swapped > 0).sum()), int((swapped < 0).sum())
        rows[4].shown.append(sum(counts) > 0 and stats.binomtest(counts[0], sum(counts)).pvalue < 0.05)
        for each, true_difference in ((swapped, 0.0), (c[0] - a[0], true_c[0] - true_a[0])):
            found = stats.bootstrap((each,), np.mean, n_resamples=999, rng=rng).confidence_interval
            if each is swapped:
                rows[5].shown.append(not found.low <= 0 <= found.high)
            else:
                rows[5].covers.append(found.low <= true_difference <= found.high)
    return rows


def two_level(values: np.ndarray, rng: np.random.Generator, resamples: int = 400) -> np.ndarray:
    """Return the interval of a bootstrap of runs and of samples for `(S, N)`."""
    runs, samples = values.shape
    weights = rng.multinomial(runs, np.full(runs, 1 / runs), resamples) @ values
    means = [row[rng.integers(0, samples, samples)].mean() / runs for row in weights]
    return np.quantile(means, (0.025, 0.975))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--comparisons", type=int, default=1000)
    count = parser.parse_args().comparisons
    print("| compared | false | covers |\n|---|---|---|")
    for name, size in (("accuracy", 270), ("accuracy", 1000), ("accuracy", 3000), ("loss", 270), ("auroc", 270)):
        print(single(name, size, count), flush=True)
    for name, counts, size in (
        ("accuracy", (6, 6), 270),
        ("accuracy", (6, 6), 3000),
        ("loss", (6, 6), 270),
        ("auroc", (6, 6), 270),
        ("accuracy", (3, 3), 1000),
        ("accuracy", (6, 1), 1000),
    ):
        print(seeds(name, counts, size, count), flush=True)
    print(seeds("accuracy", (6, 6), 1000, count, is_paired=True), flush=True)
    for row in [*folds(5, 600, count), *folds(10, 600, count), *other_methods(300, count)]:
        print(row, flush=True)


if __name__ == "__main__":
    main()
