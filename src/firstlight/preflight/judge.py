"""What the figures of a dry run mean: pure functions from figures to findings.

A threshold without a source is one that all shipped configurations pass with room to spare.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from firstlight.data.quality.finding import SEVERITIES, Finding, Severity, listed
from firstlight.insight.rules.setup import DRAW_IN_TRAINING, RANDOM_EVALUATION

CAUSES_FIRST = (
    "frozen_parameters",
    "wrong_loss",
    "detached_parameters",
    "unused_parameters",
    "gradient_not_zeroed",
    "vanishing_gradient",
    "exploding_gradient",
    "ignores_inputs",
    "unscaled_inputs",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "mixes_samples",
    "sees_future",
    "train_eval_mismatch",
    "dead_units",
    "saturated_units",
    "initial_loss_off",
    "no_learning",
    "long_accumulation",
)
"""Names of findings: a cause comes before its symptoms."""

LEARNS = 0.1
"""Smallest fall of the loss on one batch, relative to the first loss, that counts as learning."""
CLEARLY = 0.2
"""Fall of the loss at another rate that proves that the rate is the cause."""
_FAR = 3.0
"""Initial loss, relative to that of outputs that say nothing, from which it is told. A deep network reaches 5."""
_TOO_FAR = 10.0
_STAYS = 0.02
"""Change of the loss, relative to the first one, that dropout explains."""
_SPIKE = 20.0
"""Largest loss on one batch, relative to the first one, that a sound rate may reach."""
_ALONG = 1e-3
"""Cosine below which a direction is rounding."""
_WORSE = 10.0
"""Growth of the distance to the targets, in a training, that no sound loss explains."""
_UNSCALED = 20.0
"""Root mean square of inputs from which they are not scaled; standardised ones have 1, pixels in [0, 255] about 100."""
_TINY = 0.01
"""Root mean square of inputs below which they were scaled twice: pixels divided by 255 twice have 0.001."""
_VANISHED = 1e-5
"""Largest gradient of the first weights, relative to that of the last ones, below which the first do not learn."""
_GONE = 1e-8
_EXPLODED = 1e4
_DEAD = 0.9
"""Share of the units of a layer that give 0 for a whole batch."""
_SATURATED = 0.9
_NAMED = 6
"""Parameters that a text names."""
_IGNORED = 1e-6
"""Change of the outputs with the inputs, relative to the outputs: rounding of float32 reaches 1e-6."""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings by severity, and within it causes before symptoms."""

    def place(finding: Finding) -> tuple[int, int]:
        known = CAUSES_FIRST.index(finding.name) if finding.name in CAUSES_FIRST else -1
        return SEVERITIES.index(finding.severity), known

    found = sorted(findings, key=place)
    for index, each in enumerate(found):
        if each.name == "no_learning" and index and found[index - 1].severity == "fault":
            found[index] = replace(each, advice="a symptom: mend what stands above it first")
    return found


def judge_direction(pull: float, loss: str) -> list[Finding]:
    """Return a finding if a smaller loss moves outputs away from the targets.

    Args:
        pull: Cosine between a step against the gradient and the way to the targets; NaN if unknown.
        loss: Name of the loss.
    """
    if pull and not pull < -_ALONG:
        return []
    if pull == 0:
        text = f"{loss} does not change when the outputs move towards the targets"
        return [Finding("wrong_loss", "fault", text, {"pull": pull}, "let it depend on outputs and targets")]
    text = f"{loss} rises when the outputs move towards the targets, so training makes them worse"
    return [Finding("wrong_loss", "fault", text, {"pull": pull}, "change its sign")]


def judge_predictions(before: float, after: float) -> list[Finding]:
    """Return a finding if outputs are further from the targets after a training in which the loss fell."""
    if not after > _WORSE * before:
        return []
    text = "training on one batch lowers the loss, but moves the outputs away from the targets"
    return [Finding("wrong_loss", "fault", text, {"before": before, "after": after}, "look at the sign of the loss")]


def judge_initial_loss(loss: float, neutral: float | None, meaning: str, spread: float) -> list[Finding]:
    """Return a finding if the loss of the untrained network is far from that of outputs that say nothing.

    Args:
        loss: Of the first batch.
        neutral: Of the same batch with equal outputs for all samples; None if unknown.
        meaning: What the neutral outputs are.
        spread: Root mean square of the outputs.
    """
    if not math.isfinite(loss):
        text, advice = f"the first loss is {loss:g}", "look for a logarithm or root of 0, a division by 0, or overflow"
        return [Finding("initial_loss_off", "fault", text, {"outputs": spread}, advice)]
    if neutral is None or neutral <= 0:
        return []
    evidence = {"loss": loss, "chance": neutral, "outputs": spread}
    compared = f"the first loss is {loss:.4g}, and {neutral:.4g} for {meaning}"
    if loss > _FAR * neutral:
        text = f"{compared}: the outputs of the untrained network are too large (root mean square {spread:.3g})"
        advice = "scale the inputs, or initialise the last layer with smaller weights"
        severity: Severity = "warning" if loss > _TOO_FAR * neutral else "info"
        return [Finding("initial_loss_off", severity, text, evidence, advice)]
    if loss < neutral / _FAR:
        text = f"{compared}: an untrained network should not be better than that"
        advice = "check that the loss is a mean with the right sign, and that the targets differ"
        return [Finding("initial_loss_off", "warning", text, evidence, advice)]
    return []


def judge_inputs(size: float, largest: float, is_normalised: bool) -> list[Finding]:
    """Return a finding if inputs are not scaled.

    Args:
        size: The largest root mean square of a column of a table, or that of all inputs.
        largest: The largest absolute value.
        is_normalised: Whether the first layer of the network normalises them.
    """
    if is_normalised or not size or _TINY <= size <= _UNSCALED:
        return []
    evidence = {"root_mean_square": size, "largest": largest}
    if size < _TINY:
        text = f"the inputs are at most {largest:.3g}, with a root mean square of {size:.3g}: they may be scaled twice"
    else:
        text = f"the inputs reach {largest:,.4g}, with a root mean square of {size:,.3g}: they are not scaled"
    return [Finding("unscaled_inputs", "warning", text, evidence, "subtract their mean and divide by their deviation")]


def judge_gradients(
    unused: Sequence[str], detached: Sequence[str], frozen: Sequence[str], total: int, sizes: Mapping[str, float]
) -> list[Finding]:
    """Return findings about parameters without a gradient, and about gradients that vanish or explode.

    Args:
        unused: Trainable parameters whose module is not called.
        detached: Trainable parameters whose module is called, but that get no gradient.
        frozen: Parameters that are not trainable.
        total: Number of trainable parameters, as tensors.
        sizes: Largest absolute gradient of each weight, in the order of the layers; without those that are 0.
    """
    found = []
    if not total:
        text = "no parameter is trainable"
        found.append(Finding("frozen_parameters", "fault", text, {}, "at least one must have requires_grad=True"))
    if unused:
        text = f"{len(unused)} of {total} parameters get no gradient, because their modules are not called: "
        advice = "use them in forward, or remove or freeze them"
        found.append(_names("unused_parameters", text, unused, advice))
    if detached:
        text = f"{len(detached)} of {total} parameters get no gradient, although their modules are called: "
        advice = "look for detach, no_grad, item, argmax or a new tensor between them and the loss, or freeze them"
        found.append(_names("detached_parameters", text, detached, advice))
    if frozen and total:
        shown = f"{len(frozen)} of {total + len(frozen)} parameters are frozen: {listed(frozen, _NAMED)}"
        found.append(
            Finding("frozen_parameters", "info", shown, {"parameters": len(frozen)}, "they should have trained weights")
        )
    names = list(sizes)
    if len(names) > 2 and all(map(math.isfinite, sizes.values())):
        ratio = sizes[names[0]] / sizes[names[-1]]
        evidence = {"first": sizes[names[0]], "last": sizes[names[-1]]}
        compared = (
            f"the largest gradient is {sizes[names[0]]:.1e} in {names[0]}, and {sizes[names[-1]]:.1e} in {names[-1]}"
        )
        if ratio < _VANISHED:
            text = f"the gradient vanishes on its way to the first layers: {compared}"
            advice = "use ReLU or GELU, normalisation, residual connections, or fewer layers"
            severity: Severity = "fault" if ratio < _GONE else "warning"
            found.append(Finding("vanishing_gradient", severity, text, evidence, advice))
        elif ratio > _EXPLODED:
            text = f"the gradient explodes on its way to the first layers: {compared}"
            advice = "use normalisation or smaller initial weights, and clip the gradient"
            found.append(Finding("exploding_gradient", "warning", text, evidence, advice))
    return found


def judge_units(dead: Mapping[str, float], saturated: Mapping[str, float]) -> list[Finding]:
    """Return findings about layers most of whose units are dead or saturated at the start, by the layer's name."""
    found = []
    for name, shares, limit, what, advice in (
        ("dead_units", dead, _DEAD, "of the units are 0 for all samples of a batch", "their biases"),
        ("saturated_units", saturated, _SATURATED, "of the values are at a bound of the activation", "the inputs"),
    ):
        if bad := {layer: share for layer, share in shares.items() if share > limit}:
            worst = max(bad, key=lambda layer: bad[layer])
            evidence = {"share": bad[worst], "layers": float(len(bad))}
            text = f"{bad[worst]:.0%} {what} in {worst}" + (f" and {len(bad) - 1} more layers" if len(bad) > 1 else "")
            advice = f"use smaller initial weights, and look at {advice}: such units pass no gradient"
            found.append(Finding(name, "warning", text, evidence, advice))
    return found


def judge_dependence(zeroed: float | None, shuffled: float | None) -> list[Finding]:
    """Return a finding if the outputs do not depend on the inputs.

    Args:
        zeroed: Change of the outputs when the inputs are 0, relative to the largest output; None if not tried.
        shuffled: Change when each sample is replaced by another; None if not tried.
    """
    tried = {"zeroed": zeroed, "shuffled": shuffled}
    known = {name: change for name, change in tried.items() if change is not None}
    if not known or max(known.values()) > _IGNORED:
        return []
    how = "exactly the same" if max(known.values()) == 0 else f"the same within {max(known.values()):.0e}"
    text = f"the outputs are {how} for {' and '.join(known)} inputs, so the network does not see its inputs"
    advice = "look for a layer whose output does not change, and for units that are dead or saturated"
    return [Finding("ignores_inputs", "fault", text, known, advice)]


def judge_modes(train: float, evaluated: float, neutral: float | None, is_random: bool) -> list[Finding]:
    """Return findings about the network in evaluation mode.

    Args:
        train: Loss of the batch in training mode, after the network was trained on it.
        evaluated: Loss of the same batch in evaluation mode.
        neutral: Loss of outputs that say nothing; None if unknown.
        is_random: Whether two passes in evaluation mode give different outputs.
    """
    if is_random:
        return [Finding("train_eval_mismatch", "warning", RANDOM_EVALUATION, {}, DRAW_IN_TRAINING)]
    scale = max(abs(train), 0.3 * abs(neutral or 0))
    if math.isfinite(train) and scale and not evaluated - train < 2 * scale:  # "not", so that NaN is found.
        text = f"the loss of one batch is {train:.4g} in training mode, but {evaluated:.4g} in evaluation mode"
        advice = "look at batch normalisation (momentum, batch size, its mode) and at code that asks self.training"
        evidence = {"train": train, "evaluation": evaluated}
        return [Finding("train_eval_mismatch", "warning", text, evidence, advice)]
    return []


def judge_overfit(
    losses: Sequence[float], rate: float | None, others: Mapping[float, Sequence[float]], best: float | None = None
) -> list[Finding]:
    """Return why the loss of one batch does not fall, or spikes.

    Args:
        losses: Of the steps at the peak learning rate.
        rate: The peak learning rate; None if unknown.
        others: Losses of steps at other rates, from the same weights; empty if not tried.
        best: The loss that the best constant outputs have; None if unknown.
    """
    how = fall(losses)
    spike = max(losses[1:], default=0.0) / abs(losses[0]) if losses[0] else 0.0
    is_learning = math.isfinite(losses[-1]) and how >= LEARNS
    if is_learning and not spike > _SPIKE:
        return []
    if rate == 0:
        text = "the learning rate is 0, so no weight changes"
        return [Finding("learning_rate_too_low", "fault", text, {"rate": 0.0}, "give the optimiser a rate above 0")]
    better = {other: fall(each) for other, each in others.items() if fall(each) >= max(CLEARLY, how + LEARNS)}
    figures = f"on one batch, {_course(losses, spike)}"
    evidence = {"first": losses[0], "last": losses[-1], "steps": len(losses) - 1}
    if rate is not None and better:
        chosen = max(better, key=lambda other: better[other])
        tried = others[chosen]
        text = f"{figures} at a learning rate of {rate:.3g}; at {chosen:.3g}, {_course(tried, 0)}"
        evidence |= {"rate": rate, "better": chosen}
        if chosen < rate:
            severity: Severity = "warning" if is_learning else "fault"
            return [Finding("learning_rate_too_high", severity, text, evidence, f"try {chosen:.1g}, or a warm-up")]
        return [Finding("learning_rate_too_low", "fault", text, evidence, f"try {chosen:.1g}")]
    if is_learning:
        text, advice = f"{figures}, before it falls", "try a smaller learning rate, or a warm-up"
        return [Finding("learning_rate_too_high", "warning", text, evidence, advice)]
    where = f"; rates from {min(others):.1g} to {max(others):.1g} do not help" if others else ""
    near = best is not None and abs(losses[-1] - best) < 0.15 * abs(best)
    constant = ", which constant outputs reach, too" if near else ""
    advice = "look at the targets, the loss and the first layers"
    return [Finding("no_learning", "fault", figures + constant + where, evidence, advice)]


def fall(losses: Sequence[float]) -> float:
    """Return by how much a loss falls, relative to the first one; dropout makes one noisy, so the last three count.

    >>> fall([2.0, 1.5, 1.0, 1.0, 1.0]), fall([1.0, float("nan")])
    (0.5, -inf)
    """
    last = losses[-3:] if len(losses) > 3 else losses[-1:]
    reached = sum(last) / len(last)
    if not math.isfinite(reached) or not losses[0]:
        return -math.inf
    return (losses[0] - reached) / abs(losses[0])


def _course(losses: Sequence[float], spike: float) -> str:
    steps = f"{len(losses) - 1} step{'s' * (len(losses) != 2)}"
    if not math.isfinite(losses[-1]):
        return f"the loss becomes {losses[-1]:g} after {steps}"
    if spike > _SPIKE:
        return f"the loss jumps from {losses[0]:.4g} to {max(losses[1:]):.4g}"
    if abs(fall(losses)) < _STAYS:
        return f"the loss stays at about {losses[0]:.3g} for {steps}"
    verb = "falls" if fall(losses) > 0 else "rises"
    return f"the loss {verb} from {losses[0]:.4g} to {losses[-1]:.4g} in {steps}"


def _names(name: str, text: str, names: Sequence[str], advice: str) -> Finding:
    return Finding(name, "fault", text + listed(names, _NAMED), {"parameters": len(names)}, advice)
