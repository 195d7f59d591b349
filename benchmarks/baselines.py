"""What is reached without a neural network of ours, on the same splits.

    python benchmarks/baselines.py --config FILE [options]

prints what `results.py` keeps. Baselines learn from the training split and are scored once on the test split.
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
"""By task, the metric of the table."""

MOST = 1000
"""Iterations, which with scikit-learn's defaults are too few to converge."""

MANY = 10_000
"""Training samples above which a forest stands in for what would take hours."""


def scores(task: Task, data: DataModule, seed: int) -> dict[str, float]:
    """Return the score of each baseline for a task, by name."""
    data.setup()
    kind = type(task).__name__
    if isinstance(data, Windows):
        return compressors(data)
    (train, labels), (test, truth) = (arrays(data, split) for split in ("train", "test"))
    if kind == "Embedding":
        return {"nearest pixels": leave_one_out(test, truth)}
    linear = LogisticRegression(max_iter=MOST)
    perceptron = MLPClassifier(max_iter=MOST, random_state=seed)
    models: dict[str, Any] = {"LogisticRegression": linear, "MLPClassifier": perceptron}
    if kind == "Regression":
        perceptron = MLPRegressor(max_iter=MOST, early_stopping=True, random_state=seed)
        scaled = TransformedTargetRegressor(perceptron, transformer=StandardScaler())
        models = {"LinearRegression": LinearRegression(), "MLPRegressor": scaled}
    elif kind == "MultilabelClassification":
        models["LogisticRegression"] = OneVsRestClassifier(linear)
    elif data.dataset("train").inputs.ndim == 2 and not data.dataset("train").inputs.is_floating_point():
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
        train = vectors.fit_transform("".join(map(chr, row[row > 0])) for row in train)
        test = vectors.transform("".join(map(chr, row[row > 0])) for row in test)
        models = {"TfidfVectorizer + LogisticRegression": linear}
    elif len(train) > MANY:
        models = {"RandomForestClassifier": RandomForestClassifier(random_state=seed)}
    found = {name: model.fit(train, labels) for name, model in models.items()}
    if kind == "Regression":
        return {name: float(model.score(test, truth)) for name, model in found.items()}
    return {name: float(np.mean(model.predict(test) == truth)) for name, model in found.items()}


def arrays(data: DataModule, split: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the inputs `(N, features)` that a network would get, and the targets, `(N,)` where each has one."""
    inputs, targets = data.tensors(split)
    return inputs.flatten(1).numpy(), targets.numpy().squeeze()


def leave_one_out(inputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of samples whose nearest other sample, by cosine, has the same label."""
    _, nearest = NearestNeighbors(n_neighbors=2, metric="cosine").fit(inputs).kneighbors(inputs)
    return float(np.mean(labels[nearest[:, 1]] == labels))


def compressors(data: Windows) -> dict[str, float]:
    """Return the bits per byte of the test text, for whom the text before it is known."""
    whole, _ = data.text()
    cut = len(whole) - round(data.test_fraction * len(whole))
    known, text = whole[:cut], whole[cut:]
    both, alone = (len(lzma.compress(part, preset=9)) for part in (whole, known))
    return {"xz -9": (both - alone) * 8 / len(text), "Witten-Bell 5-gram": witten_bell(known, text, 5)}


def witten_bell(known: bytes, text: bytes, order: int) -> float:
    """Return the bits per byte of a Witten-Bell smoothed n-gram model (Witten and Bell, 1991, method C)."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for end in range(order, len(known)):
        for length in range(order):
            counts[known[end - length : end]][known[end]] += 1
    totals = {context: sum(found.values()) for context, found in counts.items()}
    bits = 0.0
    past = known[-order:] + text
    for end in range(order, len(past)):
        probability = 1 / 256
        for length in range(order):
            if found := counts.get(past[end - length : end]):
                kinds, total = len(found), totals[past[end - length : end]]
                probability = (found[past[end]] + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(text)


def main() -> None:
    """Print what a run of the experiment is to be compared with."""
    experiment = CLI("fit", sys.argv[1:]).experiment
    seed = int(sys.argv[sys.argv.index("--seed_everything") + 1])
    assert isinstance(experiment.datamodule, DataModule)
    found = {
        "metric": METRICS[type(experiment.task).__name__],
        "parameters": sum(parameter.numel() for parameter in experiment.task.parameters()),
        "baselines": scores(experiment.task, experiment.datamodule, seed),
        "machine": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {platform.machine()}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
