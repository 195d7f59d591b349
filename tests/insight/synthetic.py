"""Records of runs that were never made: a sound one, and what is changed in it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from firstlight.insight.record import Record, Series

STEPS, EPOCHS = 400, 20
LAYERS = ("hidden0", "hidden1", "output")


def series(values: Any, last: int = STEPS - 1) -> Series:
    """Return values at evenly spaced steps; the last one is at `last`."""
    values = np.asarray(values, dtype=np.float64)
    return Series(np.linspace(last / max(len(values), 1), last, len(values)).round().astype(np.int64), values)


def falling(first: float, last: float, length: int) -> np.ndarray:
    """Return an exponential decay from `first` to nearly `last`."""
    return last + (first - last) * np.exp(-5 * np.arange(length) / max(length - 1, 1))


def sound_run(changes: Mapping[str, Any] | None = None, facts: Mapping[str, Any] | None = None) -> Record:
    """Return the record of a run of an MLP on ten classes that learns well, except for changes.

    Args:
        changes: Values by name of a series; None removes one.
        facts: Facts that differ. A fact that is a mapping is merged.
    """
    logged = 40
    known: dict[str, Any] = {
        "train/loss": falling(2.3, 0.1, logged),
        "epoch": np.repeat(np.arange(EPOCHS), logged // EPOCHS),
        "lr": 0.003 * (0.5 + 0.5 * np.cos(np.linspace(0, np.pi, logged))),
        "grad_norm/total": falling(2.0, 0.3, logged),
        "clipped": np.zeros(logged),
        "val/loss": falling(1.5, 0.25, EPOCHS),
        "val/accuracy": falling(0.5, 0.94, EPOCHS),
        "fixed/loss_eval": falling(1.5, 0.05, EPOCHS),
        "fixed/loss_train": falling(1.6, 0.1, EPOCHS),
        "fixed/accuracy_eval": falling(0.5, 0.99, EPOCHS),
        "seconds/step": np.full(logged, 0.002),
        "seconds/wait": np.full(logged, 0.0001),
    }
    for name in LAYERS:
        known[f"gradient/norm/{name}"] = falling(1.0, 0.15, logged)
        known[f"update/ratio/{name}"] = falling(0.01, 0.001, logged)
        known[f"activation/std/{name}"] = np.full(logged, 0.7)
    for name in LAYERS[1:]:
        known[f"activation/zeros/{name}"] = np.full(logged, 0.5)
        known[f"activation/dead/{name}"] = np.full(logged, 0.1)
    for name in range(10):
        known[f"val/class_share/{name}"] = np.full(EPOCHS, 0.1)
    known |= changes or {}
    return Record(
        {name: each if isinstance(each, Series) else series(each) for name, each in known.items() if each is not None},
        _merge(FACTS, facts or {}),
    )


FACTS: Mapping[str, Any] = {
    "task": "Classification",
    "network": "MLP",
    "kind": "classification",
    "loss": "CrossEntropyLoss",
    "outputs_are": "logits",
    "outputs_look_like": "logits",
    "classes": 10,
    "class_counts": [126] * 10,
    "chance_loss": float(np.log(10)),
    "initial_loss": 2.35,
    "initial_output_std": 0.3,
    "optimizer": {"class": "AdamW", "lr": 0.003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "schedule": {"class": "WarmupCosine"},
    "planned_steps": STEPS,
    "done_steps": STEPS,
    "warmup_steps": 20,
    "epochs": EPOCHS,
    "steps_per_epoch": STEPS // EPOCHS,
    "batch_size": 32,
    "accumulate": 1,
    "clip_value": None,
    "train_samples": 1260,
    "val_samples": 270,
    "early_stopping": {"patience": 10, "monitor": "val/loss", "stopped": False},
    "ending": None,
    "inputs": {"mean": 0.0, "std": 1.0, "min": -2.0, "max": 3.0, "feature_std_ratio": 2.0, "kind": "numbers"},
    "layers": [
        {"name": name, "kind": "Linear", "parameters": 1000, "trainable": True, "has_gradient": True} for name in LAYERS
    ],
    "activations": ["ReLU"],
    "affine_error": 0.4,
    "last_activation": None,
    "head": "linear",
    "loss_path": ["NllLoss", "LogSoftmax"],
    "loss_broadcasts": False,
    "loss_is": "cross_entropy",
    "raises_right_output": 1.0,
    "loss_fit": 1.0,
    "loss_pairs": True,
    "loss_ranks": 1.0,
    "relation": {"r2": 0.8, "p_value": 0.025, "samples": 400},
    "done_epochs": EPOCHS,
    "dropout": [0.1],
    "normalisation": [],
    "weights_std": {name: 0.05 for name in LAYERS},
    "constant_weights": [],
    "shuffled": {"label_runs": 1.0, "autocorrelation": None, "order_repeats": False},
    "zero_grad_seen": True,
    "modules_in_eval": [],
    "data_findings": [],
}


def _merge(known: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **known,
        **{
            name: _merge(known[name], each)
            if isinstance(each, Mapping) and isinstance(known.get(name), Mapping)
            else each
            for name, each in changes.items()
        },
    }
