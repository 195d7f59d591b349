"""Held-out runs. docs/faults.md says which rules were later changed with their results.

They have other data, other networks and other seeds than those of `catalogue.py`, and most faults are made in another
way. Each family has at least three instances.
"""

from collections.abc import Mapping
from typing import Any

from planted.catalogue import BASES as OLD
from planted.catalogue import (
    Case,
    Config,
    adamw,
    experiment,
    mlp,
    part,
    sgd,
    shipped,
    task,
    updated,
)

PARTS = "planted.held_out_parts"
SEED = 11
"""Of faults, and of the sound runs that they are compared with."""
SHIPPED_SEEDS = range(5, 9)


def made(name: str, **options: Any) -> Config:
    """Return rows that are made."""
    return part(f"{PARTS}.Made", name=name, **options)


def own(body: Config, features: int, outputs: int, **options: Any) -> Config:
    """Return a user's module."""
    return part(f"{PARTS}.Learner", body=body, features=features, outputs=outputs, **options)


def adam(lr: float, **options: Any) -> Config:
    """Return Adam."""
    return part("torch.optim.Adam", lr=lr, **options)


def convnet(channels: int, widths: list[int], outputs: int, **options: Any) -> Config:
    """Return a convolutional network."""
    return part("firstlight.networks.ConvNet", in_channels=channels, widths=widths, out_features=outputs, **options)


_GELU, _SILU, _TANH, _ELU = (f"torch.nn.{name}" for name in ("GELU", "SiLU", "Tanh", "ELU"))
_SIGNS = part(f"{PARTS}.Signs", batch_size=32)
_TRANSFORMER = "firstlight.networks.TransformerClassifier"

BASES: dict[str, Config] = {
    "clothes_strided": experiment(
        task("Classification", part(f"{PARTS}.Strided"), "CrossEntropyLoss", adam(0.003), classes=10),
        part(f"{PARTS}.Clothes", batch_size=50),
        8,
    ),
    "clothes_wide": experiment(
        task("Classification", mlp(784, [128], 10, activation=_ELU), "CrossEntropyLoss", sgd(0.02), classes=10),
        part(f"{PARTS}.Clothes", batch_size=50),
        10,
    ),
    "shoes": experiment(
        task("BinaryClassification", mlp(784, [48], 1, activation=_SILU), "BCEWithLogitsLoss", adamw(0.001, 0.1)),
        part(f"{PARTS}.Clothes", pair=[5, 7], batch_size=32),
        10,
    ),
    "textures": experiment(
        task("Classification", convnet(3, [12, 24], 4), "CrossEntropyLoss", adamw(0.01), classes=4),
        part(f"{PARTS}.Textures", batch_size=24),
        10,
    ),
    "residual": experiment(
        task(
            "Classification",
            part("firstlight.networks.ResNet", in_channels=1, out_features=10, depth=8, width=8),
            "CrossEntropyLoss",
            sgd(0.05),
            classes=10,
        ),
        part("planted.data.Digits", batch_size=40, first=1200),
        8,
    ),
    "moons": experiment(
        task("Classification", mlp(2, [24, 24], 2, activation=_GELU), "CrossEntropyLoss", sgd(0.1), classes=2),
        made("moons", batch_size=20),
        30,
    ),
    "spirals": experiment(
        task("Classification", mlp(2, [40, 40], 3, activation=_TANH), "CrossEntropyLoss", adam(0.02), classes=3),
        made("spirals", batch_size=32),
        30,
    ),
    "shells": experiment(
        task("Classification", mlp(4, [48, 24], 3, norm="layer"), "CrossEntropyLoss", adamw(0.01), classes=3),
        made("shells", batch_size=32),
        20,
    ),
    "shells_deep": experiment(
        task("Classification", mlp(4, [32] * 8, 3, norm="batch"), "CrossEntropyLoss", adam(0.01), classes=3),
        made("shells", batch_size=32),
        20,
    ),
    "numbers": experiment(
        task("Classification", mlp(40, [32], 3, dropout=0.4), "CrossEntropyLoss", adamw(0.003, 0.5), classes=3),
        made("numbers", batch_size=32),
        20,
    ),
    "current": experiment(
        task("Regression", mlp(4, [40, 20], 1), "SmoothL1Loss", adam(0.01)),
        made("current", batch_size=32),
        25,
    ),
    "noisy": experiment(
        task("Regression", mlp(4, [16], 1), "MSELoss", adamw(0.01, 0.1)),
        made("current", noise=0.7, batch_size=32),
        12,
    ),
    "wave": experiment(
        task("Regression", mlp(1, [40, 40], 1, activation=_TANH), "MSELoss", adam(0.02)),
        made("wave", batch_size=16),
        30,
    ),
    "roll": experiment(
        task("Regression", mlp(3, [64, 64], 2, activation=_SILU), "MSELoss", adamw(0.01), outputs=2),
        made("roll", batch_size=32),
        25,
    ),
    "counts": experiment(
        task("Regression", mlp(5, [32], 1, activation=_SILU), "PoissonNLLLoss", adam(0.01)),
        made("counts", batch_size=32),
        20,
    ),
    "labels": experiment(
        task("MultilabelClassification", mlp(30, [48], 6, dropout=0.2), "BCEWithLogitsLoss", adamw(0.01), labels=6),
        made("labels", batch_size=32),
        20,
    ),
    "signs_ngrams": experiment(
        task(
            "Classification",
            part("firstlight.networks.NgramClassifier", out_features=5, lengths=[2, 3], buckets=1024, width=24),
            "CrossEntropyLoss",
            adam(0.02),
            classes=5,
        ),
        _SIGNS,
        12,
    ),
    "signs_transformer": experiment(
        task(
            "Classification",
            part(_TRANSFORMER, out_features=5, width=32, layers=1, heads=2, norm="post"),
            "CrossEntropyLoss",
            adamw(0.005),
            classes=5,
        ),
        _SIGNS,
        14,
    ),
    "licence": experiment(
        updated(
            task(
                "LanguageModel",
                part("firstlight.networks.TransformerLM", width=32, layers=1, heads=2),
                "CrossEntropyLoss",
                adamw(0.01, 0.1),
                monitor="val/bits_per_byte",
            ),
            {"init_args.loss": part("torch.nn.CrossEntropyLoss", ignore_index=0)},
        ),
        part("firstlight.data.Corpus", path="LICENSE", length=48, context=16, stride=24, batch_size=16),
        12,
    ),
    "own_recurrent": experiment(own(part(f"{PARTS}.Recurrent", width=32), 32, 5, lr=0.01), _SIGNS, 8),
    "own_windows": experiment(
        own(part(f"{PARTS}.Windows", width=32), 32, 10, lr=0.01), part(f"{PARTS}.Own", batch_size=40), 14
    ),
    "own_windows_sgd": experiment(
        own(part(f"{PARTS}.Windows", width=32, activation=_TANH), 32, 10, lr=0.05, optimizer="SGD"),
        part(f"{PARTS}.Own", batch_size=25),
        14,
    ),
    "own_numbers": experiment(
        own(mlp(4, [32], 32), 32, 1, kind="numbers", divisor=400.0, lr=0.01), made("current", batch_size=32), 20
    ),
    "own_code": experiment(
        own(mlp(64, [48], 16), 16, 64, kind="inputs", lr=0.01), part("planted.data.Digits", batch_size=32), 16
    ),
    "own_shoes": experiment(
        own(mlp(784, [], 24), 24, 1, kind="binary", lr=0.001, optimizer="RMSprop"),
        part(f"{PARTS}.Clothes", pair=[0, 6], batch_size=30),
        8,
    ),
}
"""Small sound experiments on other data; each takes one to three seconds on one core."""

_FAULTS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = []


def _family(name: str, *accepts: str) -> Any:
    def add(base: str, options: Mapping[str, Any]) -> None:
        _FAULTS.append((name, base, dict(options), accepts))

    return add


def faulty(base: str, wrapper: str = "planted.networks.Faulty", /, **options: Any) -> dict[str, Any]:
    """Return the option that wraps the network of a base."""
    arguments = BASES[base]["model"]["init_args"]
    name = "network" if "network" in arguments else "body"
    return {f"model.{name}": part(wrapper, network=arguments[name], **options)}


def ending(base: str, kind: str) -> dict[str, Any]:
    """Return the option that adds an activation after the last layer of a base."""
    return faulty(base, f"{PARTS}.Ending", kind=kind)


def careless(base: str, **options: Any) -> dict[str, Any]:
    """Return the option that starts the network of a base with careless weights."""
    return faulty(base, f"{PARTS}.Careless", **options)


def loss(name: str, **options: Any) -> dict[str, Any]:
    """Return the option that takes another loss."""
    return {"model.loss": part(name if "." in name else f"{PARTS}.{name}", **options)}


def schedule(name: str, **options: Any) -> dict[str, Any]:
    """Return the option that takes another schedule."""
    return {"model.schedule": part(name, **options)}


add = _family("flipped loss sign", "wrong_loss")
add("shells", {"model.optimizer": adam(0.01, maximize=True)})
add("licence", loss("FlippedTokens", ignore_index=0))
add("counts", loss("FlippedPoisson"))
add("own_recurrent", {"model.fault": "gains"})

add = _family("learning rate too high", "learning_rate_too_high")
add("clothes_strided", {"model.optimizer.lr": 20.0})
add("signs_transformer", {"model.optimizer.lr": 0.5})
add("current", {"model.optimizer.lr": 10.0})
add("own_windows_sgd", {"model.lr": 5.0})
add("licence", {"model.optimizer.lr": 1.0})
add("roll", {"model.optimizer": sgd(3.0)})

add = _family("learning rate too low", "learning_rate_too_low", "updates_too_small")
add("textures", {"model.optimizer.lr": 1e-6})
add("licence", {"model.optimizer.lr": 3e-6})
add("own_numbers", {"model.optimizer": "SGD", "model.lr": 1e-5})
add("shells", {"model.optimizer.lr": 3e-6})
add("signs_ngrams", {"model.optimizer": sgd(1e-4)})

add = _family("Adam epsilon too small", "learning_rate_too_high", "updates_too_large")
add("signs_ngrams", {"model.optimizer.eps": 0.0})
add("signs_transformer", {"model.optimizer.eps": 0.0})
add("own_recurrent", {"model.fault": "no_epsilon"})
add("own_windows", {"model.fault": "no_epsilon"})

add = _family("constant initialisation", "bad_initialisation")
add("current", faulty("current", constant=0.2))
add("textures", faulty("textures", constant=0.1))
add("own_recurrent", faulty("own_recurrent", constant=0.1))
add("shells", faulty("shells", constant=1.0))

add = _family("zero initialisation", "bad_initialisation")
add("moons", faulty("moons", constant=0.0))
add("own_windows", faulty("own_windows", constant=0.0))
add("labels", faulty("labels", constant=0.0))

add = _family("too large initialisation", "bad_initialisation", "initial_loss_off")
add("shoes", careless("shoes", normal=2.0))
add("signs_transformer", faulty("signs_transformer", scale=15.0))
add("own_numbers", faulty("own_numbers", scale=30.0))
add("clothes_wide", careless("clothes_wide", normal=1.0))

add = _family("missing input scaling", "unscaled_inputs")
add("current", {"data.raw": True})
add("spirals", {"data.divisor": 0.005})
add("clothes_wide", {"data.raw": True})
add("own_numbers", {"data.raw": True})

add = _family("double input scaling", "unscaled_inputs")
add("shells", {"data.divisor": 10000.0, "model.network.norm": None})
add("own_windows", {"data.divisor": 65025.0})
add("spirals", {"data.divisor": 255.0})
add("wave", {"data.divisor": 100.0})

add = _family("missing output activation", "wrong_loss")
add("own_windows", {"model.fault": "likelihood"})
add("labels", loss("LabelsWithoutSigmoid"))
add("licence", loss("TokensWithoutLogSoftmax"))
add("counts", loss("torch.nn.PoissonNLLLoss", log_input=False))

add = _family("redundant output activation", "wrong_loss")
add("labels", faulty("labels", ending="sigmoid"))
add("shells", ending("shells", "softmax"))
add("clothes_wide", ending("clothes_wide", "softmax"))
add("licence", ending("licence", "softmax"))

add = _family("wrong output activation", "wrong_loss")
add("own_shoes", {"model.fault": "softmax"})
add("own_numbers", {"model.fault": "softmax"})
add("roll", ending("roll", "clamp"))
add("own_numbers", {"model.fault": "tanh", "model.divisor": 100.0})
add("wave", ending("wave", "relu"))

add = _family("wrong loss", "wrong_loss")
add("shoes", loss("HingeOfZeros"))
add("shells", loss("CountsFromOne"))
add("current", loss("RelativeError"))
add("signs_ngrams", loss("SquaredLogits"))
add("own_numbers", {"model.fault": "column"})
add("wave", loss("SignedError"))

add = _family("wrong labels", "label_noise")
add("shoes", {"data.exchanged": 0.6, "trainer.max_epochs": 25})
add("clothes_wide", {"data.confused": 0.45, "trainer.max_epochs": 20})
add("own_windows", {"data.swapped": 0.6, "trainer.max_epochs": 20})
add("signs_ngrams", {"data.mislabelled": 0.5})

add = _family("shuffled labels", "label_noise")
add("own_windows", {"data.mixed_up": True})
add("signs_transformer", {"data.exchanged": 0.9})
add("roll", {"data.permuted": True})
add("clothes_strided", {"data.rolled": 1})
add("labels", {"data.misplaced": True})

add = _family("too strong regularisation", "over_regularised")
add("own_windows", {"model.decay": 1.0})
add("current", {"model.l1": 0.1})
add("textures", {"model.optimizer.weight_decay": 60.0})
add("clothes_wide", {"model.optimizer.weight_decay": 0.5})

add = _family("missing regularisation", "overfitting")
_LONG = {"disable": ["early_stopping"]}
add("numbers", {"model.network.dropout": 0.0, "model.network.hidden": [256, 256], "trainer.max_epochs": 40, **_LONG})
add("licence", {"model.network.width": 96, "model.optimizer.weight_decay": 0.0, "trainer.max_epochs": 30, **_LONG})
add("labels", {"model.network.hidden": [256, 128], "model.network.dropout": 0.0, "trainer.max_epochs": 50, **_LONG})
add("noisy", {"model.network.hidden": [256, 256], "trainer.max_epochs": 60, **_LONG})

add = _family(
    "batch norm missing", "vanishing_gradient", "bad_initialisation", "learning_rate_too_high", "exploding_gradient"
)
add("shells_deep", {"model.network.norm": None, "model.network.hidden": [32] * 30})
add("shells_deep", {"model.network.norm": None, "model.optimizer": sgd(0.5)})
add("residual", {**faulty("residual", without_norm=True), "model.optimizer.lr": 0.5})

add = _family("vanishing gradient", "vanishing_gradient", "saturated_units")
_SIGMOID = "torch.nn.Sigmoid"
add("spirals", {"model.network.hidden": [40] * 8, "model.network.activation": _SIGMOID})
add("clothes_wide", {"model.network.hidden": [64] * 10, "model.network.activation": _SIGMOID})
add("own_numbers", {"model.body": mlp(4, [32] * 10, 32, activation=_SIGMOID)})

add = _family("dead units", "dead_units", "bad_initialisation")
add("current", faulty("current", bias=-20.0))
add("own_code", faulty("own_code", bias=-30.0))
add("labels", faulty("labels", bias=-15.0))
add("own_windows", {**faulty("own_windows", f"{PARTS}.Careless", negative=True)})

add = _family("batch norm in the wrong mode", "train_eval_mismatch")
add("residual", faulty("residual", norm_mode="stale"))
add("shells_deep", faulty("shells_deep", norm_mode="stale"))
add("textures", faulty("textures", norm_mode="stale"))
add("clothes_strided", faulty("clothes_strided", norm_mode="stale"))

add = _family("augmentation that destroys labels", "over_regularised", "train_eval_mismatch")
add("textures", {"data.augment": [part("planted.data.Damage", kind="shuffle")]})
add("clothes_strided", {"data.augment": [part(f"{PARTS}.Blend", share=2.0)]})
add("clothes_strided", {"data.augment": [part(f"{PARTS}.Crop", size=4)]})
add("residual", {"data.augment": [part("planted.data.Damage", kind="flip")]})

add = _family("imbalance", "class_imbalance", "class_collapse", "few_samples")
add("shells", {"data.keep": {1: 0.05, 2: 0.05}})
add("shoes", {"data.positives": 0.03})
add("own_windows", {"data.share": {label: 0.05 for label in range(1, 10)}})
add("signs_transformer", {"data.keep": {1: 0.05, 2: 0.05, 3: 0.05, 4: 0.05}})

add = _family("output scale", "initial_loss_off", "bad_initialisation", "wrong_loss")
add("own_numbers", {"model.divisor": 1.0, "model.lr": 0.001})
add("moons", faulty("moons", factor=300.0))
add("labels", {"model.optimizer": sgd(0.05), **faulty("labels", factor=300.0)})
add("roll", faulty("roll", factor=200.0))

add = _family("missing activation", "missing_nonlinearity")
_LINEAR = {"model.network.activation": "torch.nn.Identity"}
add("spirals", _LINEAR)
add("wave", _LINEAR)
add("shells_deep", _LINEAR)
add("own_numbers", {"model.body": mlp(4, [32], 32, activation="torch.nn.Identity"), "model.linear": True})

add = _family("dropout too high", "over_regularised")
add("spirals", {"model.network.dropout": 0.8})
add("clothes_strided", {"model.network.dropout": 0.95})
add("own_recurrent", {"model.body.dropout": 0.97})
add("current", {"model.network.dropout": 0.9})

add = _family("frozen layer", "updates_too_small", "frozen_layer")
add("own_windows", {"model.fault": "only_head"})
add("residual", faulty("residual", freeze=["stem", "stage"]))
add("current", faulty("current", freeze=["hidden"]))
add("own_recurrent", faulty("own_recurrent", freeze=["embedding", "recurrent"]))

add = _family("detached branch", "updates_too_small", "detached_layer", "frozen_layer")
add("own_windows", {"model.fault": "no_grad"})
add("shells", faulty("shells", detach="hidden1"))
add("textures", faulty("textures", detach="stage1"))
add("wave", faulty("wave", detach="hidden1"))

add = _family("gradient not zeroed", "gradient_not_zeroed")
add("own_windows_sgd", {"model.fault": "keeps_gradients"})
add("moons", {"model.class_path": "planted.tasks.AccumulatingClassification"})
add("roll", {"model.class_path": "planted.tasks.AccumulatingRegression", "model.optimizer": sgd(0.02)})
add("own_numbers", {"model.fault": "keeps_gradients"})

add = _family("not shuffled", "not_shuffled")
add("own_windows_sgd", {"data.ordered": True})
add("textures", {"data.by_class": True})
add("moons", {"data.by_class": True})
add("current", {"data.by_class": True, "data.batch_size": 8})

add = _family("leakage", "leakage", "duplicate_samples")
add("numbers", {"data.target_column": True, "model.network.in_features": 41})
add("own_windows", {"data.all_in_train": True, "trainer.max_epochs": 25})
add("clothes_wide", {"data.copies": 3})
add("counts", {"data.target_column": True, "model.network.in_features": 6})

add = _family("too few epochs", "stopped_too_early", "underfitting")
add("own_recurrent", {"trainer.max_epochs": 1})
add("licence", {"trainer.max_epochs": 1})
add("roll", {"trainer.max_epochs": 2})
add("clothes_wide", {"trainer.max_epochs": 1})

add = _family("early stopping too early", "stopped_too_early")
add("roll", {"early_stopping": {"patience": 1, "min_delta": 0.5}, "model.optimizer.lr": 0.001})
add("licence", {"early_stopping": {"patience": 2, "min_delta": 1.0}})
add("spirals", {"early_stopping": {"patience": 2, "min_delta": 0.2}, "model.optimizer.lr": 0.002})

add = _family("batch of one", "batch_too_small")
add("shells", {"data.batch_size": 1, "model.optimizer": sgd(0.1), "trainer.max_epochs": 3})
add("own_windows_sgd", {"data.batch_size": 1, "trainer.max_epochs": 2})
add("moons", {"data.batch_size": 1, "trainer.max_epochs": 3})

add = _family("clipping too low", "clipping_always")
add("own_windows_sgd", {"trainer.gradient_clip_val": 0.001})
add("roll", {"model.optimizer": sgd(0.02), "trainer.gradient_clip_val": 0.002})
add("moons", {"trainer.gradient_clip_val": 0.0003})

add = _family("schedule too short", "schedule_mismatch")
add("clothes_strided", {**schedule("planted.tasks.EndsEarly", share=0.03), "model.optimizer.lr": 0.002})
add("own_windows", {"model.fault": "rate_dies", "model.lr": 0.001})
add("roll", schedule(f"{PARTS}.Halves", steps=[10, 20]))
add("licence", schedule(f"{PARTS}.Halves", steps=[8, 16], factor=0.05))

UNUSUAL: dict[str, tuple[Config, dict[str, Any]]] = {}
"""Sound variants that look like a fault in one way."""


def variant(name: str, base: str, options: Mapping[str, Any]) -> None:
    """Add a sound variant of a base."""
    UNUSUAL[name] = ((BASES | {f"old {key}": value for key, value in OLD.items()})[base], dict(options))


variant(
    "fine-tuning with frozen layers",
    "old digits_mlp",
    {"model.network": part(f"{PARTS}.Pretrained", network=mlp(64, [64, 32], 10), frozen=["hidden0", "hidden1"])},
)
variant("SGD with momentum at 0.1", "clothes_wide", {"model.network.norm": "batch", "model.optimizer.lr": 0.1})
variant("weight decay that helps", "numbers", {"model.optimizer.weight_decay": 1.0, "model.network.dropout": 0.0})
variant(
    "heavy imbalance with class weights",
    "shells",
    {"data.keep": {1: 0.2}, "model.class_weights": "balanced", "trainer.max_epochs": 30},
)
variant(
    "rare positives with weights",
    "shoes",
    {"data.positives": 0.15, "model.pos_weight": "balanced", "trainer.max_epochs": 15},
)
variant(
    "thirty training samples",
    "old wine",
    {"data.first": None, "data.val_fraction": 0.5, "data.test_fraction": 0.33, "data.batch_size": 8},
)
variant("tiny targets", "current", {"data.unit": 1e-6})
variant("huge targets", "roll", {"data.unit": 6e4})
variant("large offset", "wave", {"data.offset": 1e6})
variant(
    "deep residual net",
    "old digits_mlp",
    {"model.network": mlp(64, [32] * 24, 10, norm="layer", residual=True, activation=_SILU)},
)
variant("strong label smoothing", "clothes_strided", loss("torch.nn.CrossEntropyLoss", label_smoothing=0.3))
variant("mild blending", "clothes_strided", {"data.augment": [part(f"{PARTS}.Blend", share=0.2)]})
variant("clipping that acts rarely", "signs_transformer", {"trainer.gradient_clip_val": 5.0})
variant("long warm-up", "shells", schedule("firstlight.schedules.WarmupCosine", warmup=0.3))
variant("cosine with restarts", "old digits_mlp", schedule(f"{PARTS}.Restarts", cycles=3))
variant("very wide net", "old digits_sgd", {"model.network.hidden": [2048], "trainer.max_epochs": 6})
variant("recurrent LSTM", "own_recurrent", {"model.body.kind": "lstm", "trainer.max_epochs": 10})
variant("rare labels", "labels", {"data.name": "rare"})
variant(
    "RMSprop without schedule",
    "old digits_mlp",
    {"model.optimizer": part("torch.optim.RMSprop", lr=0.001), **schedule("firstlight.schedules.Constant")},
)
variant("Adagrad", "clothes_wide", {"model.optimizer": part("torch.optim.Adagrad", lr=0.01)})
variant("Nesterov momentum", "moons", {"model.optimizer": part("torch.optim.SGD", lr=0.1, momentum=0.9, nesterov=True)})
variant(
    "full batch",
    "old wine",
    {"data.batch_size": 200, "model.optimizer.lr": 0.02, "trainer.max_epochs": 40},
)
variant("large batches", "clothes_wide", {"data.batch_size": 250, "model.optimizer.lr": 0.05, "trainer.max_epochs": 20})
variant("accumulated batches", "shoes", {"data.batch_size": 8, "trainer.accumulate_grad_batches": 4})
variant("output layer of zeros", "clothes_strided", careless("clothes_strided", zero_output=True))
variant("linear model", "clothes_wide", {"model.network.hidden": [], "model.optimizer.lr": 0.005})
variant("no decay and many epochs", "moons", {"trainer.max_epochs": 60})
variant(
    "dropout of inputs and hidden units", "old digits_mlp", {"model.network.dropout": 0.5, "trainer.max_epochs": 25}
)
variant("leaky units and no normalisation", "old digits_mlp", {"model.network.activation": "torch.nn.LeakyReLU"})
variant("patient early stopping", "old friedman", {"early_stopping": {"patience": 8}, "trainer.max_epochs": 40})
variant("margin loss", "shells", loss("torch.nn.MultiMarginLoss"))
variant("exponential averages off, AMSGrad on", "labels", {"model.optimizer.amsgrad": True})
variant("constant rate of Adam", "spirals", schedule("firstlight.schedules.Constant"))


def cases() -> list[Case]:
    """Return all held-out runs, the faults first."""
    found: list[Case] = []
    seen: dict[str, int] = {}
    for family, base, options, accepts in _FAULTS:
        number = seen[family] = seen.get(family, -1) + 1
        config = updated(BASES[base], options)
        found.append(Case(family, f"{number}-{base}", config, "held out", SEED, accepts, base))
    for name, config in BASES.items():
        found.append(Case("clean", name, config, "held out", SEED))
    for name, (base, options) in UNUSUAL.items():
        found.append(Case("clean", name, updated(base, options), "held out", SEED))
    return found + shipped("held out", SHIPPED_SEEDS)
