"""Measure baselines on the splits of an experiment.

    python benchmarks/baselines.py --config FILE [options]

This prints a JSON line for `results.py`. Baselines are trained on the training split and scored once on the test split.
"""

import json
import lzma
import math
import platform
import sys
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from firstlight.cli.parser import CLI
from firstlight.data import DataModule
from firstlight.data.sources.corpus import Windows
from firstlight.tasks import Task

METRICS = {
    "Classification": "accuracy",
    "BinaryClassification": "accuracy",
    "MultilabelClassification": "accuracy",
    "Regression": "r2",
    "Embedding": "nn_accuracy",
    "LanguageModel": "bits_per_byte",
}
"""The metric of the table, by task."""

MAX_ITERATIONS = 1000
"""scikit-learn's default is too small for convergence."""

LARGE = 10_000
"""With more training samples, a random forest is the baseline: the others would take hours."""


def scores(task: Task, data: DataModule, seed: int) -> dict[str, float]:
    """Return the score of each baseline for a task, by name."""
    data.setup()
    kind = type(task).__name__
    if isinstance(data, Windows):
        return compressors(data)
    (train, labels), (test, truth) = (arrays(data, split) for split in ("train", "test"))
    if kind == "Embedding":
        return {"nearest pixels": leave_one_out(test, truth)}
    linear = LogisticRegression(max_iter=MAX_ITERATIONS)
    perceptron = MLPClassifier(max_iter=MAX_ITERATIONS, random_state=seed)
    models: dict[str, Any] = {"LogisticRegression": linear, "MLPClassifier": perceptron}
    if kind == "Regression":
        perceptron = MLPRegressor(max_iter=MAX_ITERATIONS, early_stopping=True, random_state=seed)
        scaled = TransformedTargetRegressor(perceptron, transformer=StandardScaler())
        models = {"LinearRegression": LinearRegression(), "MLPRegressor": scaled}
    elif kind == "MultilabelClassification":
        models["LogisticRegression"] = OneVsRestClassifier(linear)
    elif data.dataset("train").inputs.ndim == 2 and not data.dataset("train").inputs.is_floating_point():
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
        train = vectors.fit_transform("".join(map(chr, row[row > 0])) for row in train)
        test = vectors.transform("".join(map(chr, row[row > 0])) for row in test)
        models = {"TfidfVectorizer + LogisticRegression": linear}
    elif len(train) > LARGE:
        models = {"RandomForestClassifier": RandomForestClassifier(random_state=seed)}
    fitted = {name: model.fit(train, labels) for name, model in models.items()}
    if kind == "Regression":
        return {name: float(model.score(test, truth)) for name, model in fitted.items()}
    return {name: float(np.mean(model.predict(test) == truth)) for name, model in fitted.items()}


def arrays(data: DataModule, split: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the network's inputs `(N, features)` and the targets, `(N,)` if a sample has one."""
    inputs, targets = data.tensors(split)
    return inputs.flatten(1).numpy(), targets.numpy().squeeze()


def leave_one_out(inputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of samples that have the label of the nearest other sample, by cosine distance."""
    _, nearest = NearestNeighbors(n_neighbors=2, metric="cosine").fit(inputs).kneighbors(inputs)
    return float(np.mean(labels[nearest[:, 1]] == labels))


def compressors(data: Windows) -> dict[str, float]:
    """Return the bits per byte of the test text, given the text before it."""
    whole, _ = data.text()
    cut = len(whole) - round(data.test_fraction * len(whole))
    before, text = whole[:cut], whole[cut:]
    both, alone = (len(lzma.compress(part, preset=9)) for part in (whole, before))
    return {"xz -9": (both - alone) * 8 / len(text), "Witten-Bell 5-gram": witten_bell(before, text, 5)}


def witten_bell(before: bytes, text: bytes, order: int) -> float:
    """Return the bits per byte of a Witten-Bell smoothed n-gram model (Witten and Bell, 1991, method C)."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for end in range(order, len(before)):
        for length in range(order):
            counts[before[end - length : end]][before[end]] += 1
    totals = {context: sum(following.values()) for context, following in counts.items()}
    bits = 0.0
    past = before[-order:] + text
    for end in range(order, len(past)):
        probability = 1 / 256
        for length in range(order):
            if following := counts.get(past[end - length : end]):
                kinds, total = len(following), totals[past[end - length : end]]
                probability = (following[past[end]] + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(text)


def main() -> None:
    """Print the scores of the baselines of an experiment."""
    cli = CLI("fit", sys.argv[1:])
    experiment = cli.experiment
    assert isinstance(experiment.datamodule, DataModule)
    figures = {
        "metric": METRICS[type(experiment.task).__name__],
        "parameters": sum(parameter.numel() for parameter in experiment.task.parameters()),
        "baselines": scores(experiment.task, experiment.datamodule, cli.seed),
        "machine": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {platform.machine()}",
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
