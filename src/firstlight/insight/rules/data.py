"""Data, and how a run reads it: scale of the inputs, order of the samples, schedule and waiting."""

from collections.abc import Mapping

import numpy as np

from firstlight.data.quality.finding import Finding
from firstlight.insight.record import Record
from firstlight.insight.rules.reading import fact, finding, is_over, layers, number, plain, share_done, values

# LeCun et al., Efficient BackProp (1998): inputs near mean 0 and standard deviation 1.
# Pixels of 0 to 1 have a standard deviation of 0.2 to 0.4.
_LARGE_INPUTS, _SMALL_INPUTS, _FAR_INPUTS = 5.0, 0.06, 10.0
# Mean length of runs of equal labels, relative to random order. Of 4,000 random orders
# of 100 samples in two classes, the largest is 1.42.
_SORTED = 2.0
# In a random order, the correlation of numbers with the next ones is below 4 / sqrt(samples): 0.4 for 100 samples.
_ORDERED = 0.5
# Cosine and linear schedules are below a thousandth of their peak for less than 3 % of the steps.
_ASLEEP, _ASLEEP_SHARE = 1e-3, 0.25
_WARMUP = 0.5
# The data module tells of fewer copies, too; above a fifth, they explain the scores of the run.
_COPIES = 0.2
_WAITING, _WAITED = 0.5, 0.01


def leakage(record: Record) -> Finding | None:
    """Some input tells the target, as the data module has found."""
    return next((each for each in _data_findings(record, "leakage") if each.severity == "fault"), None)


def duplicate_samples(record: Record) -> Finding | None:
    """Many samples of validation or test are in the training split, so that scores mean little."""
    found = _data_findings(record, "duplicate_samples")
    return next((each for each in found if each.evidence.get("share", 0) > _COPIES), None)


def unscaled_inputs(record: Record) -> Finding | None:
    """Inputs are far from mean 0 and standard deviation 1, and nothing in the network scales them."""
    if fact(record, "inputs", "kind") not in ("numbers", "images"):
        return None
    known = layers(record)
    if known and "Norm" in str(known[0].get("kind")):
        return None
    mean, std, ratio = (number(record, "inputs", name) for name in ("mean", "std", "feature_std_ratio"))
    evidence = {
        "mean": mean,
        "std": std,
        "min": number(record, "inputs", "min"),
        "max": number(record, "inputs", "max"),
    }
    if std > _LARGE_INPUTS or abs(mean) > _FAR_INPUTS:
        text = f"inputs have mean {plain(mean)} and standard deviation {plain(std)}, not about 0 and 1"
    elif std < _SMALL_INPUTS:
        text = f"inputs have a standard deviation of {plain(std)}, not about 1: are they scaled twice?"
    else:
        return None
    if np.isfinite(ratio):
        evidence["feature_std_ratio"] = ratio
    advice = "scale them to mean 0 and standard deviation 1"
    return finding(record, "unscaled_inputs", "warning", text, advice, evidence, 0)


def not_shuffled(record: Record) -> Finding | None:
    """Training samples come sorted by class, or in the same order in each epoch."""
    runs, repeats = number(record, "shuffled", "label_runs"), fact(record, "shuffled", "order_repeats")
    steps, evidence = number(record, "steps_per_epoch"), {"label_runs": runs} if np.isfinite(runs) else {}
    if runs > _SORTED and steps > 1:
        text = f"runs of one class are {plain(runs)} times as long as in a random order"
    elif abs(number(record, "shuffled", "autocorrelation")) > _ORDERED and steps > 1:
        found = number(record, "shuffled", "autocorrelation")
        text = f"targets that follow each other are alike, with a correlation of {plain(found)}"
        evidence = {"autocorrelation": found}
    elif repeats and not np.isfinite(runs) and steps > 1 and fact(record, "kind") == "regression":
        text = "training samples come in the same order in each epoch"
    else:
        return None
    advice = "shuffle the training samples"
    return finding(record, "not_shuffled", "warning", text, advice, evidence, 0)


def schedule_mismatch(record: Record) -> Finding | None:
    """The learning rate is near zero for much of the run, or still rises at its end."""
    rates = values(record, "lr")
    if len(rates) < 4 or not rates.max() > 0 or fact(record, "schedule", "class") == "ReduceLROnPlateau":
        return None
    peak = int(rates.argmax())
    awake = np.flatnonzero(rates > _ASLEEP * rates.max())
    asleep = 1 - (int(awake[-1]) + 1) / len(rates)
    steps, planned, warmup = record.series["lr"].steps, number(record, "planned_steps"), number(record, "warmup_steps")
    if asleep > _ASLEEP_SHARE:
        at = int(steps[min(int(awake[-1]) + 1, len(steps) - 1)])
        text = f"the learning rate is near zero from step {at + 1:,} on, {asleep:.0%} of the run"
        advice = "let the schedule span the run"
        return finding(record, "schedule_mismatch", "warning", text, advice, {"asleep": asleep}, at)
    last, is_late = rates[-1], is_over(record) and share_done(record) > 0.9
    rises = is_late and last == rates.max() and last > max(2 * rates[0], 1.1 * rates[len(rates) // 2])
    changes = len(set(rates))
    if rises and changes <= number(record, "done_epochs") + 1 and len(rates) >= 2 * changes:
        text = f"the learning rate rises until the end, to {plain(last)}, and changes once an epoch"
        advice = "a schedule that counts optimiser steps must step after each: {'scheduler': ..., 'interval': 'step'}"
        evidence = {"lr_end": float(last), "changes": changes - 1}
        return finding(record, "schedule_mismatch", "warning", text, advice, evidence)
    if warmup > _WARMUP * planned or rises:
        text = f"the learning rate still rises at step {int(steps[peak]) + 1:,}, late in the run"
        counts_steps = fact(record, "schedule", "warmup_steps") is not None
        shorter = f"warmup_steps {round(0.05 * planned)}" if counts_steps and planned > 0 else "warmup 0.05"
        advice = "shorten the warm-up" + (f": --model.schedule.{shorter}" if fact(record, "kind") is not None else "")
        return finding(
            record, "schedule_mismatch", "warning", text, advice, {"warmup_steps": warmup, "planned_steps": planned}
        )
    return None


def slow_loader(record: Record) -> Finding | None:
    """Steps wait for the loader."""
    wait, step = values(record, "seconds/wait"), values(record, "seconds/step")
    if len(wait) < 3 or len(step) < 3:
        return None
    share = float(np.median(wait) / max(float(np.median(step)), 1e-9))
    if not (share > _WAITING and float(np.median(wait)) > _WAITED):
        return None
    text = f"{min(share, 1):.0%} of the time of a step is spent waiting for data"
    advice = "raise --data.num_workers, or keep the data in memory"
    return finding(record, "slow_loader", "info", text, advice, {"share": share, "seconds": float(np.median(wait))})


def _data_findings(record: Record, name: str) -> list[Finding]:
    found = fact(record, "data_findings") or []
    return [Finding(**each) for each in found if isinstance(each, Mapping) and each.get("name") == name]


RULES = (leakage, duplicate_samples, unscaled_inputs, not_shuffled, schedule_mismatch, slow_loader)
