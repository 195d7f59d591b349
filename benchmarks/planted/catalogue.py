"""The runs that rules may be tuned on: sound bases, planted faults on them, and sound runs that must get no warning.

A fault is a base with other options. `accepts` are the names of findings that say its cause; the first is the usual
one. `held_out.py` has the runs that measure the rules.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
P = "planted"
Config = dict[str, Any]

_SEED_1 = (
    "zero initialisation",
    "double input scaling",
    "wrong output activation",
    "shuffled labels",
    "dropout too high",
    "detached branch",
    "early stopping too early",
)
"""Families whose runs all have seed 1; in the others, seeds 0 and 1 alternate."""


@dataclass(frozen=True)
class Case:
    """A run of the bench.

    Args:
        family: Family of the fault, `"clean"` for a sound run.
        name: Name within the family.
        config: The configuration, as in YAML.
        half: `"development"` if rules may be tuned on it, else `"held out"`.
        seed: Seed of weights and order.
        accepts: Names of findings that say the cause.
        sound: Name of the sound run to compare with.
        true: Names of findings that are true of the data of a sound run, so they are no false alarms.
    """

    family: str
    name: str
    config: Config
    half: str
    seed: int
    accepts: Sequence[str] = ()
    sound: str = ""
    true: Sequence[str] = ()

    @property
    def id(self) -> str:
        """Return a name for folders."""
        return f"{self.family}-{self.name}-{self.seed}".replace(" ", "_").replace("/", "_")


def part(class_path: str, /, **options: Any) -> Config:
    """Return a class and its arguments, as a configuration names them."""
    return {"class_path": class_path, "init_args": options}


def updated(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a configuration with other options, named as `data.batch_size`; `init_args` is implied."""
    config = copy.deepcopy(config)
    for name, value in options.items():
        *path, last = name.split(".")
        place = config
        for key in path:
            place = place.setdefault(key, {})
            if "class_path" in place and last != "class_path":
                place = place["init_args"]
        place[last] = copy.deepcopy(value)
    return config


def task(name: str, network: Config, loss: str, optimizer: Config, **rest: Any) -> Config:
    """Return a task of firstlight."""
    return part(
        f"firstlight.tasks.{name}",
        network=network,
        loss=part(f"torch.nn.{loss}"),
        optimizer=optimizer,
        schedule=part("firstlight.schedules.WarmupCosine"),
        **rest,
    )


def experiment(model: Config, data: Config, epochs: int, log: int = 5, **trainer: Any) -> Config:
    """Return an experiment."""
    return {"model": model, "data": data, "trainer": {"max_epochs": epochs, "log_every_n_steps": log, **trainer}}


def adamw(lr: float, decay: float = 0.01) -> Config:
    """Return AdamW."""
    return part("torch.optim.AdamW", lr=lr, weight_decay=decay)


def mlp(inputs: int, hidden: list[int], outputs: int, **options: Any) -> Config:
    """Return a perceptron."""
    return part("firstlight.networks.MLP", in_features=inputs, hidden=hidden, out_features=outputs, **options)


def sgd(lr: float, momentum: float = 0.9) -> Config:
    """Return SGD with momentum."""
    return part("torch.optim.SGD", lr=lr, momentum=momentum)


_LETTERS = part(f"{P}.data.Letters", path="configs/data/letters.csv", text="name", label="script", max_length=40)

_TOPICS = [f"topic{number}" for number in range(4)]

BASES: dict[str, Config] = {
    "digits_mlp": experiment(
        task("Classification", mlp(64, [64, 32], 10, dropout=0.1), "CrossEntropyLoss", adamw(0.003), classes=10),
        part(f"{P}.data.Digits", batch_size=32),
        12,
    ),
    "digits_sgd": experiment(
        task("Classification", mlp(64, [64, 32], 10), "CrossEntropyLoss", sgd(0.05), classes=10),
        part(f"{P}.data.Digits", batch_size=32),
        10,
    ),
    "digits_convnet": experiment(
        task(
            "Classification",
            part("firstlight.networks.ConvNet", in_channels=1, widths=[16, 32], out_features=10),
            "CrossEntropyLoss",
            adamw(0.005),
            classes=10,
        ),
        part(f"{P}.data.Digits", batch_size=32, first=1000),
        10,
    ),
    "digits_deep": experiment(
        task("Classification", mlp(64, [32] * 12, 10, norm="batch"), "CrossEntropyLoss", adamw(0.003), classes=10),
        part(f"{P}.data.Digits", batch_size=64),
        14,
    ),
    "fashion_mlp": experiment(
        task("Classification", mlp(784, [64], 10, dropout=0.2), "CrossEntropyLoss", adamw(0.002, 0.05), classes=10),
        part(f"{P}.data.Fashion", batch_size=64),
        12,
    ),
    "wine": experiment(
        task(
            "Classification",
            mlp(13, [32], 3, activation="torch.nn.Tanh", dropout=0.1),
            "CrossEntropyLoss",
            part("torch.optim.Adam", lr=0.01),
            classes=3,
        ),
        part(f"{P}.data.Rows", name="wine", batch_size=16),
        25,
    ),
    "iris": experiment(
        task("Classification", mlp(4, [16], 3), "CrossEntropyLoss", part("torch.optim.Adam", lr=0.02), classes=3),
        part(f"{P}.data.Rows", name="iris", batch_size=16),
        40,
    ),
    "circles": experiment(
        task("Classification", mlp(2, [32, 32], 2), "CrossEntropyLoss", adamw(0.01), classes=2),
        part(f"{P}.data.Rows", name="circles", batch_size=32),
        25,
    ),
    "breast_cancer": experiment(
        task("BinaryClassification", mlp(30, [16], 1, dropout=0.1), "BCEWithLogitsLoss", adamw(0.005, 0.1)),
        part(f"{P}.data.Rows", name="breast_cancer", batch_size=32),
        25,
    ),
    "friedman": experiment(
        task("Regression", mlp(10, [64, 32], 1, activation="torch.nn.GELU"), "MSELoss", adamw(0.005, 0.1)),
        part(f"{P}.data.Rows", name="friedman", batch_size=32),
        25,
    ),
    "diabetes": experiment(
        task("Regression", mlp(10, [32], 1, dropout=0.3), "HuberLoss", adamw(0.003, 0.1)),
        part(f"{P}.data.Rows", name="diabetes", batch_size=32),
        40,
    ),
    "topics": experiment(
        task(
            "MultilabelClassification",
            mlp(20, [64], 4, activation="torch.nn.SiLU", dropout=0.3),
            "BCEWithLogitsLoss",
            adamw(0.003, 0.1),
            labels=4,
        ),
        part(
            "firstlight.data.Table",
            path="configs/data/topics.csv",
            target=_TOPICS,
            kind="multilabel",
        ),
        30,
    ),
    "letters_ngrams": experiment(
        task(
            "Classification",
            part("firstlight.networks.NgramClassifier", out_features=4, buckets=2048, width=32),
            "CrossEntropyLoss",
            adamw(0.01, 0.1),
            classes=4,
        ),
        _LETTERS,
        18,
    ),
    "letters_transformer": experiment(
        task(
            "Classification",
            part("firstlight.networks.TransformerClassifier", out_features=4, width=32, layers=2, heads=2, dropout=0.1),
            "CrossEntropyLoss",
            adamw(0.003, 0.1),
            classes=4,
        ),
        _LETTERS,
        12,
    ),
    "digits_supcon": experiment(
        updated(
            task(
                "Embedding",
                part(
                    "firstlight.networks.EmbeddingNet",
                    backbone=part("firstlight.networks.ConvNet", in_channels=1, widths=[16, 32], out_features=32),
                    features=32,
                    dimensions=16,
                ),
                "CrossEntropyLoss",
                adamw(0.005),
                monitor="val/nn_accuracy",
            ),
            {"init_args.loss": part("firstlight.losses.SupervisedContrastiveLoss", temperature=0.1)},
        ),
        part(f"{P}.data.Digits", batch_size=64),
        8,
    ),
    "own_digits": experiment(
        part(f"{P}.tasks.Own", network=mlp(64, [64], 10)), part(f"{P}.data.Digits", batch_size=32), 8
    ),
    "own_deep": experiment(
        part(f"{P}.tasks.Own", network=mlp(64, [32] * 8, 10, norm="batch")),
        part(f"{P}.data.Digits", batch_size=64),
        10,
    ),
    "own_diabetes": experiment(
        part(f"{P}.tasks.Own", network=mlp(10, [32], 1), kind="numbers", scale=100.0, lr=0.01),
        part(f"{P}.data.Rows", name="diabetes", batch_size=32),
        30,
    ),
}
"""Small sound experiments; each takes about a second on one core."""

_FAULTS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = []


def _family(name: str, *accepts: str) -> Any:
    """Return a function that adds an instance: its base, its options, and names accepted in place of the family's."""

    def add(base: str, options: Mapping[str, Any], *others: str) -> None:
        _FAULTS.append((name, base, dict(options), others or accepts))

    return add


def _wrapped(base: str, **options: Any) -> dict[str, Any]:
    """Return the option that wraps the network of a base in `Faulty`."""
    network = BASES[base]["model"]["init_args"]["network"]
    return {"model.network": part(f"{P}.networks.Faulty", network=network, **options)}


def _schedule(name: str, **options: Any) -> dict[str, Any]:
    return {"model.schedule": part(name, **options)}


add = _family("flipped loss sign", "wrong_loss")
add("digits_mlp", {"model.loss": part(f"{P}.losses.FlippedCrossEntropy")})
add("friedman", {"model.loss": part(f"{P}.losses.FlippedSquares")})
add("breast_cancer", {"model.loss": part(f"{P}.losses.FlippedBinary")})
add("letters_transformer", {"model.loss": part(f"{P}.losses.FlippedCrossEntropy")})
add("own_digits", {"model.fault": "flipped"})

add = _family("learning rate too high", "learning_rate_too_high")
add("digits_mlp", {"model.optimizer.lr": 1.0})
add("digits_sgd", {"model.optimizer.lr": 5.0})
add("letters_transformer", {"model.optimizer.lr": 0.3})
add("digits_convnet", {"model.optimizer.lr": 100.0})
add("friedman", {"model.optimizer": sgd(1.0)})
add("fashion_mlp", {"model.optimizer.lr": 0.5})
add("diabetes", {"model.optimizer.lr": 3.0})
add("own_digits", {"model.lr": 1.0})

add = _family("learning rate too low", "learning_rate_too_low", "updates_too_small")
add("digits_mlp", {"model.optimizer.lr": 1e-6})
add("digits_convnet", {"model.optimizer.lr": 1e-5})
add("letters_ngrams", {"model.optimizer.lr": 1e-5})
add("letters_transformer", {"model.optimizer.lr": 1e-6})
add("friedman", {"model.optimizer.lr": 2e-6})
add("digits_sgd", {"model.optimizer": sgd(1e-5)})
add("wine", {"model.optimizer.lr": 1e-5})
add("own_digits", {"model.lr": 2e-6})

add = _family("Adam epsilon too small", "learning_rate_too_high", "updates_too_large")
add("digits_mlp", {"model.optimizer.eps": 0.0})
add("letters_ngrams", {"model.optimizer.eps": 0.0})
add("iris", {"model.optimizer.eps": 0.0, "data.batch_size": 4})
add("letters_transformer", {"model.optimizer.eps": 0.0})

add = _family("constant initialisation", "bad_initialisation")
add("digits_mlp", _wrapped("digits_mlp", constant=0.1))
add("digits_convnet", _wrapped("digits_convnet", constant=0.05))
add("friedman", _wrapped("friedman", constant=0.1))
add("letters_transformer", _wrapped("letters_transformer", constant=0.05))
add("circles", _wrapped("circles", constant=0.1))
add("digits_sgd", _wrapped("digits_sgd", constant=0.01))

add = _family("zero initialisation", "bad_initialisation")
add("digits_mlp", _wrapped("digits_mlp", constant=0.0))
add("letters_ngrams", _wrapped("letters_ngrams", constant=0.0))
add("friedman", _wrapped("friedman", constant=0.0))
add("digits_convnet", _wrapped("digits_convnet", constant=0.0))

add = _family("too large initialisation", "bad_initialisation", "initial_loss_off")
add("digits_mlp", _wrapped("digits_mlp", scale=20.0))
add("letters_transformer", _wrapped("letters_transformer", scale=20.0))
add("fashion_mlp", _wrapped("fashion_mlp", scale=30.0))
add("friedman", _wrapped("friedman", scale=20.0))
add("wine", _wrapped("wine", scale=50.0))
add("digits_sgd", _wrapped("digits_sgd", scale=20.0))

add = _family("missing input scaling", "unscaled_inputs")
add("wine", {"data.raw": True})
add("diabetes", {"data.raw": True})
add("digits_sgd", {"data.raw": True})
add("breast_cancer", {"data.raw": True})
add("fashion_mlp", {"data.raw": True})
add("own_diabetes", {"data.divisor": 0.001})

add = _family("double input scaling", "unscaled_inputs")
add("fashion_mlp", {"data.divisor": 255.0})
add("digits_sgd", {"data.divisor": 255.0})
add("wine", {"data.divisor": 1000.0})
add("friedman", {"data.divisor": 255.0})

add = _family("missing output activation", "wrong_loss")
add("digits_mlp", {"model.loss": part(f"{P}.losses.WithoutLogSoftmax")})
add("breast_cancer", {"model.loss": part(f"{P}.losses.WithoutSigmoid")})
add("letters_transformer", {"model.loss": part(f"{P}.losses.WithoutSoftmax")})
add("topics", {"model.loss": part(f"{P}.losses.WithoutSigmoid")})
add("digits_convnet", {"model.loss": part(f"{P}.losses.WithoutLogSoftmax")})

add = _family("redundant output activation", "wrong_loss")
add("digits_sgd", _wrapped("digits_sgd", ending="softmax"))
add("letters_transformer", _wrapped("letters_transformer", ending="softmax"))
add("breast_cancer", _wrapped("breast_cancer", ending="sigmoid"))
add("digits_sgd", {"model.optimizer": sgd(0.01), **_wrapped("digits_sgd", ending="softmax")})
add("topics", _wrapped("topics", ending="sigmoid"))
add("own_deep", {"model.fault": "softmax"})

add = _family("wrong output activation", "wrong_loss")
add("friedman", _wrapped("friedman", ending="sigmoid"))
add("digits_mlp", _wrapped("digits_mlp", ending="relu"))
add("diabetes", _wrapped("diabetes", ending="relu"))
add("breast_cancer", _wrapped("breast_cancer", ending="relu"))
add("letters_ngrams", _wrapped("letters_ngrams", ending="sigmoid"))

add = _family("wrong loss", "wrong_loss")
add("digits_mlp", {"model.loss": part(f"{P}.losses.SquaredIndex")})
add("friedman", {"model.loss": part(f"{P}.losses.Broadcast")})
add("diabetes", {"model.loss": part(f"{P}.losses.NumbersAsClasses")})
add("letters_transformer", {"model.loss": part(f"{P}.losses.AbsoluteOneHot")})
add("breast_cancer", {"model.loss": part(f"{P}.losses.SquaredBinary")})
add("own_diabetes", {"model.fault": "broadcast"})
add("wine", {"model.loss": part(f"{P}.losses.SquaredIndex")})
add("fashion_mlp", {"model.loss": part(f"{P}.losses.AbsoluteOneHot")})

add = _family("wrong labels", "label_noise")
add("digits_mlp", {"data.mislabelled": 0.4, "trainer.max_epochs": 40})
add("letters_ngrams", {"data.mislabelled": 0.4})
add("fashion_mlp", {"data.mislabelled": 0.4, "trainer.max_epochs": 25})
add("digits_convnet", {"data.mislabelled": 0.4, "trainer.max_epochs": 15})
add("breast_cancer", {"data.mislabelled": 0.4, "trainer.max_epochs": 60})

add = _family("shuffled labels", "label_noise")
add("digits_mlp", {"data.permuted": True, "trainer.max_epochs": 30})
add("wine", {"data.permuted": True})
add("letters_ngrams", {"data.permuted": True})
add("friedman", {"data.permuted": True})
add("fashion_mlp", {"data.permuted": True})

add = _family("too strong regularisation", "over_regularised")
add("digits_mlp", {"model.optimizer.weight_decay": 100.0})
add("letters_ngrams", {"model.l1": 0.1})
add("friedman", {"model.l1": 0.03})
add("fashion_mlp", {"model.l1": 0.02})
add("letters_transformer", {"model.optimizer.weight_decay": 100.0})
add("digits_convnet", {"model.l1": 0.05})

_FREE = {"model.network.dropout": 0.0, "model.optimizer.weight_decay": 0.0, "disable": ["early_stopping"]}
add = _family("missing regularisation", "overfitting")
add("diabetes", {"model.network.hidden": [256, 256], "trainer.max_epochs": 60, **_FREE})
add("topics", {"model.network.hidden": [256, 256], **_FREE})
add("fashion_mlp", {"model.network.hidden": [256], "trainer.max_epochs": 40, **_FREE})
add("digits_mlp", {"data.first": 150, "model.network.hidden": [256, 256], "trainer.max_epochs": 40, **_FREE})
_MANY = {"data.first": 150, "model.network.hidden": [256, 256], "trainer.max_epochs": 100}
add("friedman", {**_MANY, "disable": ["early_stopping"]})

_DEPTH = "vanishing_gradient", "bad_initialisation", "learning_rate_too_high", "exploding_gradient"
add = _family("batch norm missing", *_DEPTH)
add("digits_deep", _wrapped("digits_deep", without_norm=True))
add("digits_deep", {"model.optimizer": sgd(0.3), **_wrapped("digits_deep", without_norm=True)})
add("own_deep", {"model.network.hidden": [32] * 16, "model.network.norm": None})
add("digits_deep", {"model.network.norm": None, "model.network.hidden": [64] * 20})

add = _family("vanishing gradient", "vanishing_gradient", "saturated_units")
add("digits_deep", {"model.network.norm": None, "model.network.activation": "torch.nn.Sigmoid"})
add("wine", {"model.network.hidden": [32] * 10, "model.network.activation": "torch.nn.Sigmoid"})
add("friedman", {"model.network.hidden": [32] * 10, "model.network.activation": "torch.nn.Sigmoid"})
add("own_digits", {"model.network.hidden": [32] * 10, "model.network.activation": "torch.nn.Sigmoid"})

add = _family("dead units", "dead_units", "bad_initialisation")
add("digits_mlp", _wrapped("digits_mlp", bias=-20.0))
add("fashion_mlp", _wrapped("fashion_mlp", bias=-50.0))
add("breast_cancer", _wrapped("breast_cancer", bias=-20.0))
add("iris", _wrapped("iris", bias=-10.0))

add = _family("batch norm in the wrong mode", "train_eval_mismatch")
add("digits_convnet", _wrapped("digits_convnet", norm_mode="stale"))
add("digits_deep", _wrapped("digits_deep", norm_mode="eval"))
add("digits_deep", _wrapped("digits_deep", norm_mode="stale"))
add("own_deep", {"model.network.hidden": [32] * 16, "model.fault": "stays_in_eval"})
_BACKBONE = BASES["digits_supcon"]["model"]["init_args"]["network"]["init_args"]["backbone"]
add("digits_supcon", {"model.network.backbone": part(f"{P}.networks.Faulty", network=_BACKBONE, norm_mode="stale")})

add = _family("augmentation that destroys labels", "over_regularised", "train_eval_mismatch")
add("digits_mlp", {"data.augment": [part(f"{P}.data.Damage", kind="erase")]})
add("digits_convnet", {"data.augment": [part(f"{P}.data.Damage", kind="shuffle")]})
add("fashion_mlp", {"data.augment": [part(f"{P}.data.Damage", kind="noise")]})
add("digits_convnet", {"data.augment": [part(f"{P}.data.Damage", kind="noise")]})
add("fashion_mlp", {"data.augment": [part(f"{P}.data.Damage", kind="shift")]})
add("digits_supcon", {"data.augment": [part(f"{P}.data.Damage", kind="shuffle")]})

add = _family("imbalance", "class_imbalance", "class_collapse", "few_samples")
add("digits_mlp", {"data.keep": {n: 0.06 for n in range(1, 10)}})
add("fashion_mlp", {"data.keep": {n: 0.08 for n in range(1, 10)}})
add("letters_transformer", {"data.keep": {0: 0.06, 1: 0.06, 2: 0.06}})
add("circles", {"data.keep": {1: 0.04}})
add("letters_ngrams", {"data.keep": {1: 0.06, 2: 0.06, 3: 0.06}})

add = _family("output scale", "initial_loss_off", "bad_initialisation", "wrong_loss")
add("digits_sgd", _wrapped("digits_sgd", factor=100.0))
add("own_diabetes", {"model.scale": 1.0, "model.lr": 0.001})
add("wine", {"model.optimizer": sgd(0.05), **_wrapped("wine", factor=100.0)})
add("friedman", _wrapped("friedman", factor=100.0))
add("breast_cancer", {"model.optimizer": sgd(0.1), **_wrapped("breast_cancer", factor=1000.0)})

_LINEAR = {"model.network.activation": "torch.nn.Identity"}
add = _family("missing activation", "missing_nonlinearity")
add("circles", _LINEAR)
add("friedman", _LINEAR)
add("circles", {**_LINEAR, "model.network.norm": "batch", "model.network.hidden": [64]})
add("circles", {**_LINEAR, "model.network.hidden": [64, 64, 64], "model.optimizer": sgd(0.05)})
add("friedman", {**_LINEAR, "model.network.hidden": [128, 64, 32], "model.optimizer": sgd(0.01)})

add = _family("dropout too high", "over_regularised")
add("digits_mlp", {"model.network.dropout": 0.95})
add("fashion_mlp", {"model.network.dropout": 0.98})
add("letters_transformer", {"model.network.dropout": 0.9})
add("letters_ngrams", {"model.network.dropout": 0.97})
add("friedman", {"model.network.dropout": 0.8})

add = _family("frozen layer", "updates_too_small", "frozen_layer")
add("digits_mlp", _wrapped("digits_mlp", freeze=["hidden1", "output"]))
add("digits_convnet", _wrapped("digits_convnet", freeze=["stage0", "stage1"]))
add("letters_ngrams", _wrapped("letters_ngrams", freeze=["embedding"]))
add("letters_transformer", _wrapped("letters_transformer", freeze=["embedding", "blocks"]))
add("friedman", _wrapped("friedman", freeze=["hidden"]))


def _branches(inputs: int, outputs: int) -> dict[str, Any]:
    options = {"in_features": inputs, "width": 64, "out_features": outputs, "detached": True}
    return {"model.network": part(f"{P}.networks.Branches", **options)}


add = _family("detached branch", "updates_too_small", "detached_layer", "frozen_layer")
add("digits_mlp", _wrapped("digits_mlp", detach="hidden1"))
add("digits_convnet", _wrapped("digits_convnet", detach="stage1"))
add("friedman", _branches(10, 1))
add("letters_transformer", _wrapped("letters_transformer", detach="blocks.1"))
add("own_digits", _branches(64, 10))

add = _family("gradient not zeroed", "gradient_not_zeroed")
add("digits_sgd", {"model.class_path": f"{P}.tasks.AccumulatingClassification"})
add("friedman", {"model.class_path": f"{P}.tasks.AccumulatingRegression", "model.optimizer": sgd(0.02)})
add("own_digits", {"model.fault": "no_zero_grad"})
add("letters_transformer", {"model.class_path": f"{P}.tasks.AccumulatingClassification"})
add("digits_mlp", {"model.class_path": f"{P}.tasks.AccumulatingClassification", "model.optimizer": sgd(0.05)})

add = _family("not shuffled", "not_shuffled")
add("digits_sgd", {"data.by_class": True})
add("fashion_mlp", {"data.by_class": True})
add("letters_transformer", {"data.by_class": True})
add("digits_convnet", {"data.by_class": True})
add("friedman", {"data.by_class": True, "data.batch_size": 8, "model.optimizer": sgd(0.02)})
add("own_diabetes", {"data.by_class": True, "data.batch_size": 8})

add = _family("leakage", "leakage", "duplicate_samples")
add("diabetes", {"data.target_column": True, "model.network.in_features": 11})
add("digits_mlp", {"data.trains_on_all": True})
add("iris", {"data.target_column": True, "model.network.in_features": 5})
add("fashion_mlp", {"data.copies": 4})
add("letters_ngrams", {"data.copies": 4})
add("friedman", {"data.trains_on_all": True, "trainer.max_epochs": 60})

add = _family("too few epochs", "stopped_too_early", "underfitting")
add("digits_mlp", {"trainer.max_epochs": 1})
add("letters_transformer", {"trainer.max_epochs": 1})
add("friedman", {"trainer.max_epochs": 1})
add("wine", {"trainer.max_epochs": 2, "model.optimizer.lr": 0.001})
add("fashion_mlp", {"trainer.max_epochs": 1, "model.optimizer.lr": 0.0005})

add = _family("early stopping too early", "stopped_too_early")
_EARLY = {"early_stopping": {"patience": 1, "min_delta": 0.3}}
add("digits_mlp", {**_EARLY, "model.optimizer.lr": 0.0005})
add("letters_transformer", _EARLY)
add("friedman", {**_EARLY, "model.optimizer.lr": 0.001})
add("fashion_mlp", {**_EARLY, "model.optimizer.lr": 0.0005})

add = _family("batch of one", "batch_too_small")
add("digits_sgd", {"data.batch_size": 1, "data.first": 500, "trainer.max_epochs": 3})
add("wine", {"data.batch_size": 1, "model.optimizer.lr": 0.05, "trainer.max_epochs": 8})
add("friedman", {"data.batch_size": 1, "model.optimizer": sgd(0.02), "trainer.max_epochs": 3})
add("letters_transformer", {"data.batch_size": 1, "trainer.max_epochs": 2})
add("diabetes", {"data.batch_size": 1, "model.optimizer": sgd(0.05), "trainer.max_epochs": 4})

add = _family("clipping too low", "clipping_always")
add("digits_sgd", {"trainer.gradient_clip_val": 0.001})
add("friedman", {"model.optimizer": sgd(0.05), "trainer.gradient_clip_val": 0.001})
add("wine", {"model.optimizer": sgd(0.1), "trainer.gradient_clip_val": 0.001})
add("letters_transformer", {"model.optimizer": sgd(0.1), "trainer.gradient_clip_val": 0.0005})

add = _family("schedule too short", "schedule_mismatch")
add("digits_mlp", {**_schedule(f"{P}.tasks.EndsEarly", share=0.04), "model.optimizer.lr": 0.001})
add("letters_transformer", _schedule(f"{P}.tasks.EndsEarly", share=0.1))
add("friedman", {**_schedule(f"{P}.tasks.Steps", every=5, factor=0.5), "model.optimizer.lr": 0.002})
add("fashion_mlp", {**_schedule(f"{P}.tasks.Steps", every=4, factor=0.5), "model.optimizer.lr": 0.001})
add("digits_convnet", {**_schedule(f"{P}.tasks.EndsEarly", share=0.03), "model.optimizer.lr": 0.001})

_FEW = {"trainer.max_epochs": 4, "trainer.limit_train_batches": 80, "trainer.limit_val_batches": 10}
SHIPPED: dict[str, dict[str, Any]] = {
    **{path.stem: {} for path in sorted((ROOT / "configs").glob("*.yaml"))},
    "bicycles": {"trainer.max_epochs": 25},
    "bicycles_tabm": {"trainer.max_epochs": 20},
    "breast_cancer": {"trainer.max_epochs": 30},
    "diabetes": {"trainer.max_epochs": 35},
    "diabetes_linear": {"trainer.max_epochs": 40},
    "topics": {"trainer.max_epochs": 30},
    "wine": {"trainer.max_epochs": 40},
    "digits_mlp": {"trainer.max_epochs": 12},
    "digits_mlp_adafactor": {"trainer.max_epochs": 12},
    "digits_mlp_l1": {"trainer.max_epochs": 12},
    "digits_mlp_batchnorm": {"trainer.max_epochs": 12},
    "digits_convnet": {"trainer.max_epochs": 8, "model.network.widths": [16, 32]},
    "digits_convnet_augmented": {"trainer.max_epochs": 10, "model.network.widths": [16, 32]},
    "digits_deep_mlp": {"trainer.max_epochs": 12},
    "digits_resnet": {"trainer.max_epochs": 15, "model.network.depth": 8},
    "digits_simplenet": {"trainer.max_epochs": 8},
    "digits_contrastive": {"trainer.max_epochs": 12, "model.network.backbone.widths": [16, 32]},
    "digits_supcon": {"trainer.max_epochs": 20, "model.network.backbone.widths": [16, 32]},
    "fashion_mnist_simplenet": _FEW,
    "fashion_mnist_regularizednet": _FEW,
    "fashion_mnist_convnet": {
        "trainer.max_epochs": 6,
        "trainer.limit_train_batches": 60,
        "trainer.limit_val_batches": 8,
        "trainer.log_every_n_steps": 20,
        "model.network.widths": [8, 16, 32],
        "model.network.blocks": 1,
    },
    "image_folder": {"data.size": 32, "trainer.max_epochs": 10},
    "letters": {"trainer.max_epochs": 12, "model.network.buckets": 4096},
    "letters_transformer": {"trainer.max_epochs": 10, "model.network.width": 32},
    "corpus_lm": {"model.network.width": 32, "trainer.max_epochs": 8},
    "python_docs_lm": {
        "model.network.width": 32,
        "model.network.layers": 2,
        "data.length": 64,
        "data.context": 16,
        "data.stride": 64,
        "data.batch_size": 16,
        "trainer.max_epochs": 2,
        "trainer.limit_train_batches": 150,
        "trainer.limit_val_batches": 10,
    },
    "unicode_names": {"trainer.max_epochs": 2, "model.network.buckets": 4096},
    "unicode_names_transformer": {
        "model.network.width": 32,
        "model.network.layers": 1,
        "trainer.max_epochs": 3,
        "trainer.limit_train_batches": 100,
        "trainer.limit_val_batches": 20,
    },
}
"""Every shipped experiment, shortened where it would take long; the schedule follows the number of epochs."""

UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD at a high but stable rate": ("digits_deep", {"model.optimizer": sgd(0.3)}),
    "strong dropout that helps": (
        "fashion_mlp",
        {"model.network.hidden": [512], "model.network.dropout": 0.6, "trainer.max_epochs": 15},
    ),
    "tiny data": ("iris", {"data.first": None, "data.val_fraction": 0.3, "data.test_fraction": 0.3}),
    "imbalance handled by weights": (
        "digits_mlp",
        {
            "data.keep": {n: 0.25 for n in range(1, 10)},
            "model.class_weights": "balanced",
            "trainer.max_epochs": 25,
        },
    ),
    "deep ReLU net with batch norm": ("digits_deep", {"model.network.hidden": [32] * 20}),
    "constant rate": ("digits_sgd", {"model.schedule": part("firstlight.schedules.Constant")}),
    "no hidden layer": ("breast_cancer", {"model.network.hidden": [], "model.optimizer.lr": 0.02}),
    "SGD without momentum": ("digits_sgd", {"model.optimizer": sgd(0.2, 0.0)}),
    "small batches": ("wine", {"data.batch_size": 4, "model.optimizer.lr": 0.003}),
    "frequent clipping with Adam": ("letters_transformer", {"trainer.gradient_clip_val": 1.0}),
    "wide network": ("friedman", {"model.network.hidden": [512], "model.optimizer.lr": 0.002}),
    "tanh network": ("digits_mlp", {"model.network.activation": "torch.nn.Tanh"}),
}
"""Sound variants that look like a fault in one way: base, options."""


def cases() -> list[Case]:
    """Return all runs, the faults first."""
    found: list[Case] = []
    seen: dict[str, int] = {}
    half = "development"
    for family, base, options, accepts in _FAULTS:
        number = seen[family] = seen.get(family, -1) + 1
        seed = 1 if family in _SEED_1 else number % 2
        found.append(Case(family, f"{number}-{base}", updated(BASES[base], options), half, seed, accepts, base))
    for name, config in BASES.items():
        found += [Case("clean", name, config, half, seed) for seed in range(2)]
    for name, (base, options) in UNUSUAL.items():
        found += [Case("clean", name, updated(BASES[base], options), half, seed) for seed in range(2)]
    return found + shipped(half, range(5))


def shipped(half: str, seeds: Iterable[int]) -> list[Case]:
    """Return every shipped experiment with some seeds."""
    found = []
    for name, options in SHIPPED.items():
        config = updated(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()), options)
        true = ("duplicate_samples",) if name.startswith("letters") else ()  # Their file holds copies.
        found += [Case("clean", f"shipped {name}", config, half, seed, true=true) for seed in seeds]
    return found
