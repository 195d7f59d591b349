"""Faults in how a run is put together, measured at its start: gradients, modes, frozen layers, activations, weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from firstlight.data.quality.finding import Finding, Severity
from firstlight.insight.record import Record
from firstlight.insight.rules.reading import (
    fact,
    finding,
    initial_loss,
    is_late,
    layers,
    learned,
    matrices,
    number,
    plain,
    reference_loss,
    short,
    values,
    warning_if,
)

Layers = Sequence[Mapping[str, Any]]

# A function is affine if f(a) + f(b) - f(a + b) - f(0) vanishes. float32 rounds at 1e-7, a deep network at 1e-5.
_AFFINE = 1e-4
# Layers of a fine-tuned network are frozen on purpose: it learns anyway.
_LEARNS = 0.85
# PyTorch's layers start with a standard deviation of 1 / sqrt(3 inputs), so 1e-3 would need 300,000 inputs, and above
# 0.58 none at all (He et al., 2015: sqrt(2 / inputs), at most 1 for two inputs).
_TINY_WEIGHTS, _LARGE_WEIGHTS = 1e-4, 1.0
# Karpathy, A Recipe for Training Neural Networks (2019): verify that the loss starts at its value for a guess.
_FAR_FROM_CHANCE, _TOO_FAR, _STARTED, _POOR = 3.0, 8.0, 0.95, 0.5
# Losses in training and in evaluation mode differ by dropout. Set on the half development of the bench.
_MODES_DIFFER = 1.5
# Augmentation that shifts or flips keeps mean and deviation; noise and brightness change them by less than this.
_SHIFTED, _STRETCHED = 0.5, 1.5
# Rounding of float32 changes outputs by 1e-6 of the largest one.
MIXED = 1e-3
FIND_MIXING = "look for what acts over the first axis: a reshape, an index, a softmax, batch_first of a recurrent layer"
HIDE_FUTURE = "give attention a mask of later tokens, as nn.Transformer.generate_square_subsequent_mask makes it"
RANDOM_EVALUATION = "two passes in evaluation mode give different outputs"
DRAW_IN_TRAINING = "give dropout training=self.training, and draw random numbers in training mode only"
# After so many steps, running averages with a momentum of 0.1 have followed.
_FOLLOWED = 100


def gradient_not_zeroed(record: Record) -> Finding | None:
    """Gradients of one step are still there in the next one."""
    if fact(record, "zero_grad_seen") is not False:
        return None
    text = "each step uses the sum of all earlier gradients, because they are not zeroed"
    advice = "call optimizer.zero_grad() after each optimizer.step()"
    return finding(record, "gradient_not_zeroed", "fault", text, advice, {"zero_grad_seen": 0})


def frozen_layer(record: Record) -> Finding | None:
    """Some layers are excluded from training by `requires_grad`."""
    known = layers(record)
    frozen = [each for each in known if each.get("trainable") is False]
    if not frozen or not is_late(record):
        return None
    severity = warning_if(not (learned(record) > _LEARNS and _is_prefix(frozen, known)))
    names = _names(frozen)
    text = f"{len(frozen)} of {len(known)} layers are frozen: {names}"
    advice = "remove requires_grad=False, unless they are trained already"
    weights = sum(each.get("parameters") or 0 for each in frozen)
    return finding(record, "frozen_layer", severity, text, advice, {"layers": len(frozen), "parameters": weights})


def detached_layer(record: Record) -> Finding | None:
    """Some layers can be trained, but the loss has no gradient for them."""
    known = layers(record)
    detached = [each for each in known if each.get("trainable") and each.get("has_gradient") is False]
    if not detached:
        return None
    text = f"{len(detached)} of {len(known)} layers get no gradient: {_names(detached)}"
    advice = "look for detach() or no_grad() between them and the loss"
    return finding(record, "detached_layer", "warning", text, advice, {"layers": len(detached)})


def missing_nonlinearity(record: Record) -> Finding | None:
    """Several layers together are one affine map."""
    depth = len(matrices(record))
    affine = number(record, "affine_error")
    if depth < 2 or not affine < _AFFINE:
        return None
    text = f"{depth} layers act as one linear layer"
    advice = "put an activation, such as ReLU, after each layer except the last"
    return finding(record, "missing_nonlinearity", "warning", text, advice, {"layers": depth, "affine_error": affine})


def train_eval_mismatch(record: Record) -> Finding | None:
    """The network behaves differently in training and in evaluation, or not at all."""
    name = "train_eval_mismatch"
    asleep = fact(record, "modules_in_eval") or []
    if asleep:
        text = f"{len(asleep)} modules train in evaluation mode: {', '.join(map(short, asleep[:3]))}"
        advice = "call train() on them, unless their statistics are from an earlier training"
        return finding(record, name, "warning", text, advice, {"modules": len(asleep)})
    if fact(record, "evaluation_draws"):
        return finding(record, name, "warning", RANDOM_EVALUATION, DRAW_IN_TRAINING, {}, 0)
    mean, std = number(record, "inputs", "mean"), number(record, "inputs", "std")
    other_mean, other_std = (number(record, "inputs_in_evaluation", each) for each in ("mean", "std"))
    is_stretched = max(std, other_std) > _STRETCHED * min(std, other_std) > 0
    if fact(record, "augments") and (is_stretched or abs(mean - other_mean) > _SHIFTED * other_std):
        text = f"augmented inputs have mean {plain(mean)} and deviation {plain(std)}, and inputs in evaluation "
        text += f"{plain(other_mean)} and {plain(other_std)}"
        advice = "scale inputs in the data, not in augment, which acts on training samples only"
        evidence = {"mean": mean, "std": std, "mean_in_evaluation": other_mean, "std_in_evaluation": other_std}
        return finding(record, name, "fault", text, advice, evidence, 0)
    evaluated, trained = values(record, "fixed/loss_eval"), values(record, "fixed/loss_train")
    if not number(record, "done_steps") > _FOLLOWED:
        return None
    length = min(len(evaluated), len(trained), 5)
    if not length:
        return None
    evaluation, training = float(evaluated[-1]), float(trained[-1])
    evidence = {"loss_eval": evaluation, "loss_train": training}
    batch_norm = any("BatchNorm" in each for each in fact(record, "normalisation") or [])
    if batch_norm and length > 1 and np.array_equal(evaluated[-length:], trained[-length:]):
        text = "batch normalisation does the same in training and in evaluation mode"
        advice = "leave its mode to train() and eval()"
        return finding(record, name, "warning", text, advice, evidence)
    if evaluation > _MODES_DIFFER * training and evaluation - training > 0.1 * reference_loss(record):
        text = f"the same samples have a loss of {plain(training)} in training and {plain(evaluation)} in eval mode"
        advice = "use larger batches, momentum 0.1, or LayerNorm"
        return finding(record, name, "warning", text, advice, evidence)
    return None


def mixes_samples(record: Record) -> Finding | None:
    """The output of a sample depends on the others in its batch."""
    replaced, reordered = number(record, "mixes_samples"), number(record, "depends_on_order")
    if not (replaced > MIXED or reordered > MIXED):
        return None
    share = replaced if replaced > MIXED else reordered
    text = "the output of a sample depends on "
    text += "the others in its batch: another sample" if replaced > MIXED else "its place in the batch: another order"
    text += f" changes it by {share:.0%} of the largest output"
    return finding(record, "mixes_samples", "fault", text, FIND_MIXING, {"share": share}, 0)


def equal_outputs(record: Record) -> Finding | None:
    """All outputs rise and fall together, so they cannot say different things."""
    if not fact(record, "outputs_follow_one"):
        return None
    text = f"all {number(record, 'output_size'):.0f} outputs rise and fall together: the network gives one number"
    advice = "look for a layer that outputs share, or one with a single unit, before the last layer"
    # Two opposite logits, or the thresholds of ordered classes, follow one number by design, and learn.
    severity: Severity = "fault" if is_late(record) and learned(record) < _LEARNS else "info"
    return finding(record, "equal_outputs", severity, text, advice, {"outputs": number(record, "output_size")}, 0)


def sees_future(record: Record) -> Finding | None:
    """A network that predicts the next token gets it as input."""
    share = number(record, "sees_future")
    predicts = fact(record, "kind") == "language" or number(record, "token_offset") >= 1
    if not predicts or not share > MIXED:
        return None
    return finding(record, "sees_future", "fault", future_text(share), HIDE_FUTURE, {"share": share}, 0)


def future_text(share: float) -> str:
    """Return that outputs change by a share of the largest one when later tokens do."""
    text = f"the output of a token depends on later tokens, by {share:.0%} of the largest output: the network sees "
    return text + "what it must predict, and its score is too good"


def bad_initialisation(record: Record) -> Finding | None:
    """The initial weights are all equal, or far too small or too large."""
    name = "bad_initialisation"
    constant = fact(record, "constant_weights") or []
    known = [each["name"] for each in matrices(record)]
    # A last layer of zeros is a sound start: outputs are zero, and its own gradient is not.
    if [each for each in constant if not known or each != known[-1]]:
        text = f"all initial weights are equal in {', '.join(map(short, constant[:3]))}, so units learn the same"
        advice = "draw them at random, as torch does"
        return finding(record, name, "fault", text, advice, {"layers": len(constant)})
    spread = {each: std for each, std in (fact(record, "weights_std") or {}).items() if each in known and std}
    first, chance = initial_loss(record), reference_loss(record)
    evidence = {"initial_loss": first, "chance_loss": chance}
    large = [each for each, std in spread.items() if std > _LARGE_WEIGHTS]
    advice = "use the initialisation of torch, or kaiming_normal_"
    if large:
        text = f"initial weights have a standard deviation of {plain(spread[large[0]])} in {short(large[0])}"
        if first > chance:
            text += f", and the first loss is {plain(first)}, where a guess has {plain(chance)}"
        evidence["weights_std"] = spread[large[0]]
        return finding(record, name, "warning", text, advice, evidence, 0)
    small = [each for each, std in spread.items() if std < _TINY_WEIGHTS and each != known[-1]]
    if small:
        text = f"initial weights have a standard deviation of only {plain(spread[small[0]])} in {short(small[0])}"
        return finding(record, name, "warning", text, advice, {**evidence, "weights_std": spread[small[0]]}, 0)
    return None


def initial_loss_off(record: Record) -> Finding | None:
    """The loss before the first step is far from that of a guess."""
    first, chance = number(record, "initial_loss"), number(record, "chance_loss")
    if fact(record, "kind") == "classification":
        chance = max(chance, float(np.log(number(record, "classes"))))  # A network does not know rare classes yet.
    # An L1 penalty is part of the first loss.
    if fact(record, "l1") or not (chance > 0 and first > _FAR_FROM_CHANCE * chance):
        return None
    text = f"the first loss is {plain(first)}, and a guess without inputs has {plain(chance)}"
    advice = "remove a factor of the outputs, or start with smaller weights"
    evidence = {"initial_loss": first, "chance_loss": chance}
    mean, spread = number(record, "target_mean"), number(record, "target_spread")
    if fact(record, "loss_is") and mean**2 + spread**2 > (10 * number(record, "initial_output_std")) ** 2:
        text += f": targets have mean {plain(mean)} and standard deviation {plain(spread)}"
        advice = "scale the targets to mean 0 and standard deviation 1"
    # Deep residual networks start far off, and learn well: only what is not learned is a fault.
    known = learned(record)
    hurts = is_late(record) and (not known > _STARTED if first > _TOO_FAR * chance else known < _POOR)
    return finding(record, "initial_loss_off", warning_if(hurts), text, advice, {**evidence, "learned": known}, 0)


def _names(some: Layers) -> str:
    shown = ", ".join(short(each["name"]) for each in some[:3])
    return shown + (f" and {len(some) - 3} more" if len(some) > 3 else "")


def _is_prefix(some: Layers, known: Layers) -> bool:
    return known[: len(some)] == some


RULES = (
    mixes_samples,
    sees_future,
    equal_outputs,
    gradient_not_zeroed,
    frozen_layer,
    detached_layer,
    missing_nonlinearity,
    train_eval_mismatch,
    bad_initialisation,
    initial_loss_off,
)
