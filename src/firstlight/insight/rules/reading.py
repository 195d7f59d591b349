"""How rules read a record: the start and the end of a series, what was learned, and how findings are made."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.data.quality.finding import Finding, Severity
from firstlight.insight.record import Record

Values = NDArray[np.float64]

# The first tenth of a series is its start, the last fifth its end: one phase of training, and enough for a median.
_START, _END = 0.1, 0.2
# The first steps of the sound runs of the half development change the weights by 0.001 to 0.07 of their size, with a
# median of 0.019, and all steps by 0.0024. Karpathy (CS231n) gives 0.001 for the whole run.
_FIRST_UPDATE = 0.01

CLASSES = ("classification", "binary", "multilabel")


def values(record: Record, name: str) -> Values:
    """Return the finite values of a series; empty if it was not recorded."""
    if name not in record.series:
        return np.empty(0)
    found = record.series[name].values
    return found[np.isfinite(found)]


def start(series: Values) -> float:
    """Return the median of the first tenth, at least of three values; NaN if there is none."""
    return float(np.median(series[: max(3, round(len(series) * _START))])) if len(series) else np.nan


def end(series: Values) -> float:
    """Return the median of the last fifth, at least of three values; NaN if there is none."""
    return float(np.median(series[-max(3, round(len(series) * _END)) :])) if len(series) else np.nan


def median(series: Values) -> float:
    """Return the median; NaN if there is no value."""
    return float(np.median(series)) if len(series) else np.nan


def by_layer(record: Record, prefix: str, *, kinds: tuple[str, ...] = ()) -> dict[str, Values]:
    """Return the finite values of each layer in order of depth, for layers of some kinds only if any are given."""
    kind = {each["name"]: str(each.get("kind", "")) for each in layers(record)}
    found = {name: series.values[np.isfinite(series.values)] for name, series in record.layers(prefix).items()}
    return {
        name: each
        for name, each in found.items()
        if len(each) and (not kinds or any(word in kind.get(name, "") for word in kinds))
    }


def fact(record: Record, *path: str) -> Any:
    """Return a fact, or None where it is unknown."""
    found: Any = record.facts
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def number(record: Record, *path: str) -> float:
    """Return a fact that is a number, or NaN where it is unknown."""
    found = fact(record, *path)
    return float(found) if isinstance(found, int | float) else np.nan


def layers(record: Record) -> list[Mapping[str, Any]]:
    """Return the layers with parameters of their own; empty if they are unknown."""
    return fact(record, "layers") or []


def matrices(record: Record) -> list[Mapping[str, Any]]:
    """Return the layers that multiply by a matrix: linear ones and convolutions."""
    return [each for each in layers(record) if any(word in str(each.get("kind")) for word in ("Linear", "Conv"))]


def is_over(record: Record) -> bool:
    """Return whether the run has ended, so that its last values are final."""
    return bool(fact(record, "ending")) or share_done(record) >= 1


def is_late(record: Record) -> bool:
    """Return whether half of the planned steps are made, so that an early phase does not mislead."""
    return is_over(record) or share_done(record) > 0.5


def share_done(record: Record) -> float:
    """Return the share of the planned steps that are made; NaN if the plan is unknown."""
    planned = number(record, "planned_steps")
    return number(record, "done_steps") / planned if planned > 0 else np.nan


def initial_loss(record: Record) -> float:
    """Return the loss before the first step, or the first recorded one."""
    known = number(record, "initial_loss")
    return known if np.isfinite(known) else float(next(iter(values(record, "train/loss")), np.nan))


def reference_loss(record: Record) -> float:
    """Return the loss of a guess without inputs, or the loss before the first step; NaN if it is not above zero."""
    known, first = number(record, "chance_loss"), initial_loss(record)
    known = known if np.isfinite(known) else first
    return known if known > 0 else np.nan


def skill(record: Record, split: str) -> Values:
    """Return what was learned at each validation: 0 is a guess without inputs, 1 is perfect, less than 0 is worse.

    For classes, it is how far accuracy is from that of the majority class to 1, for numbers R², and else the share of
    the loss of a guess that is gone.

    Args:
        record: What was recorded.
        split: `"val"`, or `"fixed"` for the sample of the training split in evaluation mode.
    """
    name = f"{split}/{{}}" if split == "val" else f"{split}/{{}}_eval"
    accuracy, r2 = values(record, name.format("accuracy")), values(record, name.format("r2"))
    counts = np.array(fact(record, "class_counts") or [], dtype=float)
    if len(accuracy) and counts.sum() and fact(record, "kind") in ("classification", "binary"):
        guess = counts.max() / counts.sum()
        better: Values = (accuracy - guess) / max(1 - guess, 1e-6)
        return better
    known: Values = r2 if len(r2) else 1 - values(record, name.format("loss")) / reference_loss(record)
    return known


def skills(record: Record) -> tuple[float, float]:
    """Return what is known of training and of validation samples at the end, told from the same number.

    That is accuracy or R² if both were recorded, else the loss. NaN where nothing was recorded.
    """
    fixed, validated = skill(record, "fixed"), skill(record, "val")
    if not any(f"fixed/{name}_eval" in record.series and f"val/{name}" in record.series for name in ("accuracy", "r2")):
        fixed, validated = (
            1 - values(record, name) / reference_loss(record) for name in ("fixed/loss_eval", "val/loss")
        )
    return (float(fixed[-1]) if len(fixed) else np.nan), median(validated[-3:])


def train_skill(record: Record) -> float:
    """Return how far the final accuracy on training samples is from that of the majority class to 1; NaN if unknown.

    It is the better one of the fixed sample and of the batches of training.
    """
    counts = np.array(fact(record, "class_counts") or [], dtype=float)
    names = ("fixed/accuracy_eval", "fixed/accuracy_train", "train/accuracy")
    accuracy = max((end(values(record, name)) for name in names if len(values(record, name))), default=np.nan)
    guess = counts.max() / counts.sum() if counts.sum() else np.nan
    return float((accuracy - guess) / max(1 - guess, 1e-6))


def learned(record: Record) -> float:
    """Return what the run knows of its training samples at the end: 0 is a guess without inputs, 1 is perfect.

    It is the better of accuracy and loss, because class weights lower accuracy, and label smoothing raises the loss.
    """
    accuracy = skill(record, "fixed")
    losses = [values(record, name)[-1:] for name in ("fixed/loss_eval", "train/loss")]
    found = [accuracy[-1:], *(1 - each / reference_loss(record) for each in losses)]
    return max((float(each[0]) for each in found if len(each) and np.isfinite(each[0])), default=np.nan)


def update_ratios(record: Record) -> Values:
    """Return the median over layers of the size of each recorded update relative to the weights."""
    found = [*by_layer(record, "update/ratio").values()]
    length = min(map(len, found), default=0)
    ratios: Values = np.median([each[-length:] for each in found], axis=0) if length else np.empty(0)
    return ratios


def first_updates(record: Record) -> float:
    """Return the largest update relative to the weights in the first fifth of the run, as a median of three."""
    ratios = update_ratios(record)
    early = ratios[: max(3, round(len(ratios) * 0.2))]
    if not len(early):
        return np.nan
    return max(float(np.median(early[at : at + 3])) for at in range(max(1, len(early) - 2)))


def better_rate(record: Record) -> float:
    """Return a learning rate, 1 or 3 times a power of ten, whose first steps change the weights by about 1/100.

    It follows from the first recorded update, and with Adam, whose steps are about as large as the learning rate
    whatever the gradient is, from the size of the initial weights. NaN if neither is known.
    """
    ratios, rates = update_ratios(record), values(record, "lr")
    known = [float(ratios[0] / rates[0])] if len(ratios) and len(rates) and ratios[0] > 0 and rates[0] > 0 else []
    spread = [std for std in (fact(record, "weights_std") or {}).values() if std]
    if is_adam(record) and spread:
        known.append(1 / float(np.median(spread)))
    if not known:
        return np.nan
    rate = _FIRST_UPDATE / max(known)
    power = 10.0 ** np.floor(np.log10(rate))
    return float(f"{power * min((1, 3, 10), key=lambda each: abs(np.log(rate / power / each))):.0e}")


def is_adam(record: Record) -> bool:
    """Return whether the optimiser is Adam or one of its kin, whose steps are as large as the learning rate."""
    return str(fact(record, "optimizer", "class")) in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")


def option(record: Record, name: str = "lr") -> str:
    """Return how an option of the optimiser is set on the command line, or its name if no task of firstlight has it."""
    if fact(record, "kind") is not None:
        return f"--model.optimizer.{name}"
    return "the learning rate" if name == "lr" else f"the {name} of the optimiser"


def try_schedule(record: Record) -> str:
    """Return the advice to use a schedule, with its option if the module has one; `""` if the run has a schedule."""
    if fact(record, "schedule") is not None:
        return ""
    return "use a schedule" + (" (--model.schedule)" if fact(record, "kind") is not None else "")


def finding(
    record: Record,
    name: str,
    severity: Severity,
    text: str,
    advice: str,
    evidence: Mapping[str, float],
    step: int | None = None,
) -> Finding:
    """Return a finding, with the epoch of its step; without a step, with the last one that was recorded."""
    if step is None:
        step = max((int(each.steps[-1]) for each in record.series.values() if len(each.steps)), default=None)
    epochs = record.series.get("epoch")
    epoch = None
    if step is not None and epochs is not None and len(epochs.steps):
        at = min(int(np.searchsorted(epochs.steps, step)), len(epochs.steps) - 1)
        epoch = int(epochs.values[at])
    return Finding(name, severity, text, {key: float(value) for key, value in evidence.items()}, advice, epoch, step)


def fault_if(condition: bool) -> Severity:
    """Return `"fault"`, or `"warning"` if the condition does not hold."""
    return "fault" if condition else "warning"


def warning_if(condition: bool) -> Severity:
    """Return `"warning"`, or `"info"` if the condition does not hold."""
    return "warning" if condition else "info"


def short(layer: str) -> str:
    """Return the name of a layer without the attributes that hold the network.

    >>> short("network.network.hidden0.0")
    'hidden0.0'
    """
    while layer.startswith("network."):
        layer = layer.removeprefix("network.")
    return layer


def plain(value: float) -> str:
    """Return a number with three digits, as people write it.

    >>> plain(0.00001234), plain(12345.6), plain(0.25)
    ('1.23e-05', '12,300', '0.25')
    """
    if value != 0 and np.isfinite(value) and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
