"""Outputs, loss and classes: whether the loss fits the outputs, and what the network predicts."""

import numpy as np
from numpy.typing import NDArray

from firstlight.data.quality.finding import Finding, Severity
from firstlight.insight.record import Record
from firstlight.insight.rules.reading import (
    CLASSES,
    Values,
    end,
    fact,
    finding,
    initial_loss,
    is_late,
    is_over,
    learned,
    number,
    plain,
    train_skill,
    values,
    warning_if,
)

UNPAIRED = "the loss stays the same when samples exchange their targets"
COMPARE_OWN = "compare each output with its own target: see whether their shapes are the same, or broadcast"
# Losses for numbers that cannot be less than zero.
_NOT_NEGATIVE = ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
_OF_NUMBERS = ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "PoissonNLLLoss", "GaussianNLLLoss")
_OF_CLASSES = ("CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss", "MultiMarginLoss", "KLDivLoss")
# A negative loss that grows tenfold has no minimum: bounded ones do not, and log-likelihoods grow as a logarithm.
_UNBOUNDED = 10.0
# The loss falls by a third while the metric of the same samples stays at a guess. Set on the half development.
_LOSS_FALLS, _METRIC_STAYS = 0.67, 0.1
_SINGLE = ("classification", "binary")
_USUAL = {
    "classification": "CrossEntropyLoss",
    "binary": "BCEWithLogitsLoss",
    "multilabel": "BCEWithLogitsLoss",
    "regression": "MSELoss",
}
# One class takes nearly all predictions although the samples are not of one class.
_COLLAPSED, _MAJORITY = 0.95, 0.8
# A class is rare if the largest one has ten times as many samples. Chosen by hand.
_RARE = 10.0
# A rare class is left out if few of its samples are found although nearly all of the others are.
_LEFT_OUT, _POOR, _BOUNDS_HURT, _POOR_RECALL, _FREQUENT = 0.5, 0.5, 0.8, 0.45, 0.9

# Ranges that a function after the last layer keeps, whatever numbers it gets, and how people name it.
_BOUNDS: dict[str, tuple[float, float]] = {
    "softmax": (0, 1),
    "sigmoid": (0, 1),
    "tanh": (-1, 1),
    "probabilities": (0, 1),
    "in [0, 1]": (0, 1),
    "in [-1, 1]": (-1, 1),
    "at least -1": (-1, np.inf),
    "at most 1": (-np.inf, 1),
}
"""The others start at 0."""
_ENDS = {
    "probabilities": "a softmax",
    "in [0, 1]": "a function like the sigmoid",
    "in [-1, 1]": "a function like tanh",
    "non-negative": "a function like ReLU",
    "at least -1": "a function like GELU",
    "at most 1": "a function like LogSigmoid",
}
# Operations of autograd that bound what they return, and the losses that want numbers of both signs without bounds.
_BOUNDING = {"Softmax": "softmax", "Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "ReLU", "Softplus": "softplus"}
_OF_LOGITS = ("LogSoftmax", "BinaryCrossEntropyWithLogits")
_OF_DIFFERENCES = ("MseLoss", "HuberLoss", "SmoothL1Loss")
# Free outputs become right to 0.98 and more by each sound loss that was tried, and to 0.3 at most by wrong ones.
_FREE_FIT = 0.5
# Outputs that cannot be negative can still rank many classes.
_RANKED, _REACHED = 0.9, 0.95


def wrong_loss(record: Record) -> Finding | None:
    """The loss has the wrong sign, does not fit the outputs or the task, or does not measure what is scored."""
    return (
        _flipped(record)
        or _other_token(record)
        or _unpaired(record)
        or _without_link(record)
        or _bounded(record)
        or _other_outputs(record)
        or _other_task(record)
        or _unaimed(record)
        or _unranked(record)
        or _other_aim(record)
    )


def _other_token(record: Record) -> Finding | None:
    """Return whether the loss of a language model wants another token than the next one."""
    offset = number(record, "token_offset")
    if not np.isfinite(offset) or offset == 1:
        return None
    where = {-1: "before", 0: "at"}.get(int(offset), f"{offset:.0f} places after")
    text = f"the loss compares the output at each position with the token {where} it, not with the next one"
    advice = "shift targets against inputs by one place, once: firstlight's language data hold the next tokens already"
    return finding(record, "wrong_loss", "fault", text, advice, {"token_offset": offset}, 0)


def _flipped(record: Record) -> Finding | None:
    losses, path = values(record, "train/loss"), _path(record)
    first, loss = initial_loss(record), fact(record, "loss")
    last = min(end(losses), float(losses[-1])) if len(losses) else first
    is_known = loss in _NOT_NEGATIVE or fact(record, "kind") in (*CLASSES, "language")
    is_known = is_known or ("Neg" in path and any(each in path for each in (*_OF_LOGITS, "MseLoss")))
    if is_known and last < 0:
        text = f"the loss is {plain(last)}, and for this task it cannot be less than zero"
    elif last < -_UNBOUNDED * max(abs(first), 1):
        text = f"the loss falls without a limit, from {plain(first)} to {plain(last)}"
    else:
        return None
    advice = "look for a minus sign, or a missing log_softmax"
    if "NllLoss" in path and not {"LogSoftmax", "Log"} & {*path}:
        advice = "apply log_softmax before nll_loss, or use CrossEntropyLoss"
    elif path[:1] == ["Neg"]:
        advice = "remove the minus sign before the loss"
    return finding(record, "wrong_loss", "fault", text, advice, {"loss_start": first, "loss": last})


def _path(record: Record) -> list[str]:
    """Return the operations from the loss back to the last layer; empty if they are unknown."""
    return [str(each) for each in fact(record, "loss_path") or []]


def _unpaired(record: Record) -> Finding | None:
    """Return whether the loss does not compare each output with its own target."""
    if fact(record, "loss_broadcasts"):
        text = "the loss compares each output of a batch with the targets of all samples, because shapes differ"
        advice = "give outputs and targets the same shape: targets.unsqueeze(1), or outputs.squeeze(1)"
    elif fact(record, "loss_pairs") is False:
        text, advice = UNPAIRED, COMPARE_OWN
    else:
        return None
    return finding(record, "wrong_loss", "fault", text, advice, {"loss_pairs": 0}, 0)


def _without_link(record: Record) -> Finding | None:
    """Return whether a loss of probabilities gets outputs that are none."""
    path, head = _path(record), fact(record, "head")
    last = {*path}
    if "NllLoss" in last and not {"LogSoftmax", "Log"} & last and head not in (None, "log-probabilities"):
        text = "nll_loss expects log-probabilities, and nothing makes them of the outputs"
        advice = "apply log_softmax before nll_loss, or use CrossEntropyLoss"
    elif "NllLoss" in last and "Log" in last and not {"Softmax", "Div", "LogSoftmax"} & last and head == "linear":
        text = "the loss takes the logarithm of outputs that are no probabilities"
        advice = "use CrossEntropyLoss, which applies log_softmax to the outputs"
    elif "BinaryCrossEntropy" in last and not {"Sigmoid", "Softmax"} & last and head == "linear":
        text = "binary_cross_entropy expects probabilities, and nothing makes them of the outputs"
        advice = "use BCEWithLogitsLoss, or end the network with sigmoid"
    else:
        return None
    return finding(record, "wrong_loss", "fault", text, advice, {}, 0)


def _bounded(record: Record) -> Finding | None:
    """Return whether a function after the last layer keeps outputs from what the loss needs."""
    expected, path, head = fact(record, "outputs_are"), _path(record), str(fact(record, "head"))
    at = max((path.index(each) for each in _OF_LOGITS if each in path), default=-1)
    # A ReLU may be part of a loss, so only what lies behind a loss of torch belongs to the outputs.
    loss_at = max((path.index(each) for each in (*_OF_LOGITS, *_OF_DIFFERENCES) if each in path), default=len(path))
    between = [_BOUNDING[each] for each in path[loss_at + 1 :] if each in _BOUNDING]
    ending = between[0] if between else _ENDS.get(head, "")
    if not ending or ("LogSoftmax" in path and head == "log-probabilities"):
        return None
    if at >= 0:
        twice = ending.endswith("softmax") or "sigmoid" in ending
        name = "cross-entropy" if path[at] == "LogSoftmax" else "BCEWithLogitsLoss"
        text = f"{ending} is applied to the outputs, and {name} needs logits of any size and both signs"
        advice = f"remove the {between[0] if between else 'function'} after the last layer"
        # The best of many outputs that are not negative can be the right one; a single one cannot say no.
        may_rank = not twice and head != "in [-1, 1]" and fact(record, "kind") not in ("binary", "multilabel")
        severity: Severity = "fault"
        if may_rank:
            severity = warning_if(is_late(record) and not learned(record) > _RANKED)
        return finding(record, "wrong_loss", severity, text, advice, {}, 0)
    mean, spread = number(record, "target_mean"), number(record, "target_spread")
    if expected == "standardised":
        mean, spread = 0.0, 1.0
    low, high = (0, np.inf) if head == "non-negative" else _BOUNDS.get(head, _BOUNDS.get(ending, (0, np.inf)))
    # Numbers between two ends differ by at most half of the distance, and about half of standardised ones are negative.
    is_out = mean < low or mean > high or spread > (high - low) / 2 or (low == 0 and mean <= 0.05 * spread)
    if not is_out and expected not in ("scores", "standardised"):
        return None
    text = f"{ending} is applied to the outputs, so they stay {_range(low, high)}, and targets do not"
    advice = "remove the activation after the last layer"
    severity = warning_if(is_late(record) and not learned(record) > _BOUNDS_HURT)
    evidence = {"target_mean": mean, "target_spread": spread}
    return finding(record, "wrong_loss", severity, text, advice, evidence, 0)


def _range(low: float, high: float) -> str:
    if np.isfinite(low) and np.isfinite(high):
        return f"between {low:g} and {high:g}"
    return f"at {low:g} or more" if np.isfinite(low) else f"at {high:g} or less"


def _other_outputs(record: Record) -> Finding | None:
    """Return whether outputs look different from what the loss expects; for a record without a graph of the loss."""
    expected, seen = fact(record, "outputs_are"), fact(record, "outputs_look_like")
    loss, last = fact(record, "loss"), fact(record, "last_activation")
    if expected == "log_probabilities" and seen not in (None, "log-probabilities", "constant"):
        text = f"{loss} expects log-probabilities, and the outputs look like {seen}"
        advice = "end the network with log_softmax, or use CrossEntropyLoss"
    elif expected == "probabilities" and seen not in (None, "probabilities", "in [0, 1]", "constant"):
        text = f"{loss} expects probabilities, and the outputs look like {seen}"
        advice = "end the network with sigmoid, or use BCEWithLogitsLoss"
    elif not _path(record) and expected == "logits" and last in ("Softmax", "Sigmoid"):
        text = f"the network ends with {last}, and {loss} applies it once more"
        advice = "remove the last activation"
    else:
        return None
    return finding(record, "wrong_loss", "fault", text, advice, {}, 0)


def _unaimed(record: Record) -> Finding | None:
    """Return whether even outputs that could be any numbers do not become right by this loss."""
    fit, kind = number(record, "loss_fit"), str(fact(record, "kind"))
    right = number(record, "raises_right_output")
    is_own = fact(record, "kind") is None and fact(record, "output_size") == fact(record, "classes")
    if fit < _FREE_FIT and fact(record, "outputs_are") != "rates":  # Large counts are far from where outputs start.
        text = "the least loss has wrong outputs: free outputs that minimise it are "
        text += "no better than a guess" if fit < _METRIC_STAYS else f"only {fit:.0%} better than a guess"
        evidence = {"loss_fit": fit}
    elif is_own and right < _METRIC_STAYS:
        text = f"the first step raises the output of the right class most for only {right:.0%} of the samples"
        evidence = {"raises_right_output": right}
    else:
        return None
    usual = _USUAL.get(kind, "CrossEntropyLoss" if is_own else "MSELoss")
    option = f"use torch.nn.{usual}" if is_own else f"use --model.loss torch.nn.{usual}"
    return finding(record, "wrong_loss", "fault", text, option, evidence, 0)


def _unranked(record: Record) -> Finding | None:
    """Return whether the loss does not prefer the likeliest class where the inputs leave a doubt."""
    if not number(record, "loss_ranks") == 0 or fact(record, "loss") == "MultiMarginLoss":
        return None
    known = train_skill(record)
    text = "where inputs leave a doubt, the least loss does not have the likeliest class first"
    advice = f"use --model.loss torch.nn.{_USUAL['classification']}"
    severity = warning_if(is_late(record) and not known > _REACHED)
    return finding(record, "wrong_loss", severity, text, advice, {"loss_ranks": 0, "skill": known}, 0)


def _other_task(record: Record) -> Finding | None:
    kind, loss = fact(record, "kind"), str(fact(record, "loss"))
    if kind in CLASSES and loss in _OF_NUMBERS:
        text = f"{loss} is made for numbers, and the targets are classes"
        advice = "use --model.loss torch.nn.CrossEntropyLoss (BCEWithLogitsLoss for zeros and ones)"
    elif kind == "regression" and loss in _OF_CLASSES:
        text, advice = f"{loss} is made for classes, and the targets are numbers", "use --model.loss torch.nn.MSELoss"
    else:
        return None
    return finding(record, "wrong_loss", "warning", text, advice, {})


def _other_aim(record: Record) -> Finding | None:
    """Return whether the loss falls, but predictions of the same samples stay bad."""
    losses, known = values(record, "train/loss"), train_skill(record)
    if len(losses) < 6 or not is_over(record) or fact(record, "kind") not in _SINGLE:
        return None
    last = end(losses)
    counts = np.array(fact(record, "class_counts") or [np.nan], dtype=float)
    shares = counts[counts > 0] / counts.sum()
    chance, entropy = number(record, "chance_loss"), -float(np.sum(shares * np.log(shares)))
    # Class weights and label smoothing change the loss of a guess; here they change both.
    is_other = not fact(record, "class_weights") and not 0.8 * entropy < chance < 1.5 * entropy
    # Where most samples are of one class, a falling loss need not change the predicted class.
    is_lost = (known < _METRIC_STAYS and shares.max() < _POOR) or (is_other and known < _POOR)
    before = initial_loss(record) if is_other else min(initial_loss(record), chance)
    if not (last < _LOSS_FALLS * before and is_lost):
        return None
    text = f"the loss falls from {plain(before)} to {plain(last)}, but predictions are only {max(known, 0):.0%} "
    text += "better than a guess"
    advice = f"try --model.loss torch.nn.{_USUAL[fact(record, 'kind')]}"
    evidence = {"loss_start": before, "loss_end": last, "skill": known, "chance_loss": chance, "entropy": entropy}
    return finding(record, "wrong_loss", "warning", text, advice, evidence)


def class_collapse(record: Record) -> Finding | None:
    """Nearly all predictions are of one class."""
    shares = _predicted(record)
    if not shares:
        return None
    name, share = max(shares.items(), key=lambda item: item[1])
    largest = _largest_share(record)
    if share < _COLLAPSED or not largest < _MAJORITY or not is_late(record):
        return None
    text = f"{share:.0%} of the validation samples are predicted as class {name}"
    advice = "lower the learning rate, or weigh the classes"
    return finding(record, "class_collapse", "fault", text, advice, {"share": share, "largest_class": largest})


def class_imbalance(record: Record) -> Finding | None:
    """Rare classes are hardly predicted."""
    counts = np.array(fact(record, "class_counts") or [], dtype=float)
    shares = [*_predicted(record).values()]
    counts = counts[counts > 0] if len(shares) != len(counts) else counts
    if (
        len(counts) < 2
        or counts.min() <= 0
        or (counts.max() < _RARE * counts.min() and counts.max() < 0.8 * counts.sum())
    ):
        return None
    real, ratio = counts / counts.sum(), counts.max() / counts.min()
    text = f"the largest class has {plain(ratio)} times the samples of the smallest"
    rare = real * _RARE <= real.max() if ratio >= _RARE else real < real.max()
    found = float(np.array(shares)[rare].sum() / real[rare].sum()) if len(shares) == len(counts) else np.nan
    accuracy, balanced = values(record, "val/accuracy"), values(record, "val/balanced_accuracy")
    recall, frequent = _rare_recall(end(balanced), end(accuracy), real, rare)
    is_left_out = is_late(record) and frequent > _FREQUENT and (recall < _POOR_RECALL or found < _LEFT_OUT / 5)
    if is_left_out:
        text += f", and the mean recall of rare ones is only {max(recall, 0):.2f}" if recall < _POOR_RECALL else ""
        text += f", and rare ones are {found:.0%} as frequent in predictions" if not recall < _POOR_RECALL else ""
    evidence = {"ratio": ratio, "predicted_share": found, "accuracy": end(accuracy), "balanced_accuracy": end(balanced)}
    severity = warning_if(is_left_out)
    advice = "try --model.class_weights balanced" if fact(record, "kind") == "classification" else "weigh the classes"
    return finding(record, "class_imbalance", severity, text, advice, evidence)


def _rare_recall(balanced: float, accuracy: float, shares: Values, rare: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the mean recall of rare classes and that of the others, solved from the two kinds of accuracy.

    Accuracy weighs recalls by the shares of the classes, and balanced accuracy weighs them equally.
    """
    part, few = float(shares[rare].sum()), float(rare.mean())
    if not 0 < few < 1 or abs(few - part) < 1e-9:
        return np.nan, np.nan
    recall, frequent = np.linalg.solve([[few, 1 - few], [part, 1 - part]], [balanced, accuracy])
    return float(recall), float(frequent)


def _predicted(record: Record) -> dict[str, float]:
    """Return the share of each class among the predictions, over the last validations."""
    found = {name: each.values[-3:] for name, each in record.layers("val/class_share").items() if len(each.values)}
    return {name: float(np.median(each)) for name, each in found.items()}


def _largest_share(record: Record) -> float:
    counts = np.array(fact(record, "class_counts") or [np.nan], dtype=float)
    return float(counts.max() / counts.sum())


RULES = (wrong_loss, class_collapse, class_imbalance)
