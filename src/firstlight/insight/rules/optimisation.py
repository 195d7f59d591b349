"""The learning rate, the size of updates and gradients, and whether the run learns at all."""

import numpy as np

from firstlight.data.quality.finding import Finding
from firstlight.insight.record import Record
from firstlight.insight.rules.reading import (
    better_rate,
    by_layer,
    end,
    fact,
    fault_if,
    finding,
    first_updates,
    initial_loss,
    is_adam,
    is_late,
    is_over,
    layers,
    learned,
    median,
    number,
    option,
    plain,
    reference_loss,
    short,
    start,
    try_schedule,
    update_ratios,
    values,
    warning_if,
)

# Karpathy (CS231n notes): updates should be near 1/1000 of the weights. A hundred times more or less is far off.
_LARGE_UPDATE, _USUAL_UPDATE, _SMALL_UPDATE = 0.1, 1e-3, 1e-5
# A step as large as the weights replaces them.
_REPLACED = 1.0
# A loss of twice that of a guess, or of the start, has diverged; a fifth more in the first steps is no noise.
_DIVERGED, _RISEN = 2.0, 1.2
# Set on the half development of the bench: weights that move by less than a tenth of their size learn little.
_SHORT_PATH = 0.1
_LITTLE, _LEARNED = 0.5, 0.8
_MATRICES = ("Linear", "Conv")
# Nothing is learned if less than 2 % of the loss of a guess is gone. Set on the half development of the bench.
_NOTHING = 0.02
# AUTOTRAINER (Zhang et al., ICSE 2021) divides the norm of the first layer by that of the last: 1e-3 vanishes.
_VANISHED = 1e-3
# Gradients that grow a thousandfold, set on the half development of the bench.
_EXPLODED = 1e3
# Chosen by hand; AUTOTRAINER has the same share for gradients that are zero.
_DEAD = 0.7
_SATURATED = 0.5
# Adam divides by the root of the squared gradient plus eps; float32 squares below 1e-45 are zero.
_TINY_EPS = 1e-12
# With Adam, a factor of all gradients cancels, until they come near eps.
_SCALE_FREE = ("Adam", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "NAdam", "RAdam", "Lion", "Muon")
_CLIPPED, _CUT, _CUT_SCALE_FREE = 0.9, 10.0, 1e3


def learning_rate_too_high(record: Record) -> Finding | None:
    """Steps are so large that the loss rises, or that the network is broken in the first steps."""
    if number(record, "optimizer", "eps") < _TINY_EPS and is_adam(record):
        return None  # `updates_too_large` says it.
    losses, guess, size = values(record, "train/loss"), reference_loss(record), first_updates(record)
    first, last, known = initial_loss(record), end(losses), learned(record)
    worse = max(first, guess)
    overflowed, rate = _is_not_finite(record), number(record, "optimizer", "lr")
    peak = float(losses[: max(3, len(losses) // 5)].max()) if len(losses) else np.nan
    diverged = last > _DIVERGED * worse
    # Adam's first steps are about as large as the learning rate, also in a network that died before one was recorded.
    spread = [std for std in (fact(record, "weights_std") or {}).values() if std]
    stepped = rate / float(np.median(spread)) if spread and is_adam(record) else np.nan
    broken = (size > _LARGE_UPDATE or stepped > _REPLACED) and known < _LITTLE and is_late(record)
    risen = size > _LARGE_UPDATE / 3 and peak > _RISEN * worse and known < _LITTLE and is_late(record)
    if not (overflowed or diverged or broken or risen):
        return None
    text = f"the first steps change the weights by {size:.0%} of their size; about 1% is usual"
    if not size > _LARGE_UPDATE / 3 and stepped > _REPLACED:
        text = f"a step of the size of the learning rate is {plain(stepped)} times the size of the weights at the start"
    if overflowed:
        text = "the loss or the gradient is not finite any more"
    elif diverged:
        text = f"the loss rises from {plain(first)} to {plain(last)}"
    severity = fault_if(overflowed or diverged or known < _NOTHING)
    evidence = {"learning_rate": rate, "update_ratio": size, "loss_start": first, "loss_end": last, "loss_peak": peak}
    better = min(better_rate(record), rate / 3)
    advice = f"try {option(record)} {better:g}" if better > 0 else "lower the learning rate to a tenth"
    return finding(record, "learning_rate_too_high", severity, text, advice, evidence)


def learning_rate_too_low(record: Record) -> Finding | None:
    """Weights move too little for the run to learn, while the loss still falls."""
    ratios, losses, rate = update_ratios(record), values(record, "train/loss"), number(record, "optimizer", "lr")
    if not is_late(record) or len(losses) < 3 or not len(ratios):
        return None
    size, known = median(ratios), learned(record)
    path = float(np.mean(ratios)) * number(record, "done_steps")
    if not (path < _SHORT_PATH and size < _USUAL_UPDATE and known < _LITTLE):
        return None
    text = f"a step changes the weights by only {plain(size)} of their size, usual is 0.001 to 0.01"
    better = max(better_rate(record), rate * 3)
    advice = f"try {option(record)} {better:g}" if better > 0 else "raise the learning rate tenfold"
    severity = fault_if(known < _NOTHING)
    evidence = {"learning_rate": rate, "update_ratio": size, "path": path, "learned": known}
    return finding(record, "learning_rate_too_low", severity, text, advice, evidence)


def updates_too_large(record: Record) -> Finding | None:
    """Updates are large relative to the weights, or Adam divides by almost nothing."""
    size, eps = first_updates(record), number(record, "optimizer", "eps")
    if eps < _TINY_EPS and is_adam(record):
        text = f"the optimiser's eps is only {plain(eps)}, so weights with a tiny gradient make huge steps"
        advice = f"use the default: {option(record, 'eps')} 1e-8"
        return finding(record, "updates_too_large", "warning", text, advice, {"eps": eps, "update_ratio": size})
    if not size > _LARGE_UPDATE:
        return None
    text = f"the first steps change the weights by {size:.0%} of their size; about 1% is usual"
    return finding(record, "updates_too_large", "info", text, f"lower {option(record)}", {"update_ratio": size})


def updates_too_small(record: Record) -> Finding | None:
    """Updates of some layers are tiny relative to their weights."""
    sizes = {name: median(each) for name, each in by_layer(record, "update/ratio").items()}
    small = {name: size for name, size in sizes.items() if size < _SMALL_UPDATE}
    if not small or learned(record) > _LITTLE:
        return None
    name = min(small, key=small.__getitem__)
    text = f"updates of {len(small)} of {len(sizes)} layers are below 1e-05 of their weights, as in {short(name)}"
    advice = f"raise {option(record)}, or see whether the gradient reaches them"
    return finding(
        record, "updates_too_small", "warning", text, advice, {"layers": len(small), "update_ratio": small[name]}
    )


def vanishing_gradient(record: Record) -> Finding | None:
    """At the start, the gradient of the first layers, or the signal in the last ones, is nearly zero."""
    sizes = {name: start(each) for name, each in by_layer(record, "gradient/norm", kinds=_MATRICES).items()}
    signal = {name: float(each[0]) for name, each in by_layer(record, "activation/std", kinds=_MATRICES).items()}
    if len(sizes) < 3 or learned(record) > _LEARNED:
        return None
    known = layers(record)
    frozen = {each["name"] for each in known if not each.get("trainable", True) or each.get("has_gradient") is False}
    *before, last = sizes.values()
    name = min([*sizes][:-1], key=sizes.__getitem__)
    ratio = min(before) / max(last, 1e-300)
    shrunk = min(signal.values()) / max([*signal.values(), 1e-300]) if len(signal) > 2 else np.nan
    if ratio < _VANISHED and name not in frozen:
        text = f"the gradient of {short(name)} is {plain(ratio)} of that of the last layer"
    elif shrunk < _VANISHED:
        text = f"outputs of {short(min(signal, key=signal.__getitem__))} hardly differ between samples at the start"
    else:
        return None
    advice = "use ReLU, normalisation or fewer layers"
    evidence = {"gradient": min(before), "ratio": ratio, "signal": shrunk, "layers": len(sizes)}
    severity = fault_if(learned(record) < _LITTLE)
    return finding(record, "vanishing_gradient", severity, text, advice, evidence)


def exploding_gradient(record: Record) -> Finding | None:
    """The gradient grows a thousandfold, or is that large from the start."""
    norms = values(record, "grad_norm/total")
    if not len(norms):
        return None
    first, largest = float(norms[0]), float(norms.max())
    if not (largest > _EXPLODED * max(start(norms), 1e-3) or start(norms) > _EXPLODED):
        return None
    text = f"the norm of the gradient reaches {plain(largest)}, from {plain(first)} at first"
    advice = f"clip it with --trainer.gradient_clip_val 1.0, or lower {option(record)}"
    severity = warning_if(learned(record) < _LITTLE)
    series = record.series["grad_norm/total"]
    step = int(series.steps[np.isfinite(series.values)][norms.argmax()])
    return finding(record, "exploding_gradient", severity, text, advice, {"first": first, "largest": largest}, step)


def dead_units(record: Record) -> Finding | None:
    """Most units of a hidden layer are zero for all samples."""
    shares = {name: end(each) for name, each in by_layer(record, "activation/dead").items()}
    dead = {name: share for name, share in shares.items() if share > _DEAD}
    if not dead:
        return None
    name = max(dead, key=dead.__getitem__)
    # Where the gradient vanishes from the start, units that die later follow from it.
    at_start = float(by_layer(record, "activation/dead")[name][0]) > _DEAD
    severity = warning_if(learned(record) < _LITTLE and (at_start or vanishing_gradient(record) is None))
    text = f"{dead[name]:.0%} of the units before {short(name)} are zero for all samples"
    advice = f"lower {option(record)}, or use LeakyReLU or GELU"
    return finding(record, "dead_units", severity, text, advice, {"share": dead[name], "layers": len(dead)})


def saturated_units(record: Record) -> Finding | None:
    """Most units of a hidden layer are at the ends of their range."""
    shares = {name: end(each) for name, each in by_layer(record, "activation/saturated").items()}
    full = {name: share for name, share in shares.items() if share > _SATURATED}
    if not full:
        return None
    name = max(full, key=full.__getitem__)
    severity = warning_if(learned(record) < _LITTLE)
    text = f"{full[name]:.0%} of the units before {short(name)} are saturated, where the gradient vanishes"
    advice = "scale the inputs, start with smaller weights, or use ReLU"
    return finding(record, "saturated_units", severity, text, advice, {"share": full[name], "layers": len(full)})


def clipping_always(record: Record) -> Finding | None:
    """Nearly all gradients are cut to a small part."""
    limit, norms, clipped = number(record, "clip_value"), values(record, "grad_norm/total"), values(record, "clipped")
    if not limit > 0 or not len(norms):
        return None
    share = float(np.mean(clipped)) if len(clipped) else float(np.mean(norms > limit))
    cut = median(norms) / limit
    if share < _CLIPPED or cut < 2:
        return None
    enough = _CUT_SCALE_FREE if _is_scale_free(record) else _CUT
    severity = warning_if(cut > enough)
    text = f"{share:.0%} of the gradients are clipped, the median one to {plain(1 / cut)} of its size"
    advice = f"try --trainer.gradient_clip_val {plain(float(f'{np.quantile(norms, 0.9):.1g}'))}"
    return finding(record, "clipping_always", severity, text, advice, {"share": share, "cut": cut, "limit": limit})


def batch_too_small(record: Record) -> Finding | None:
    """Each step sees one or two samples."""
    # The batch is that of a process.
    times = [max(1.0, np.nan_to_num(number(record, name), nan=1.0)) for name in ("accumulate", "processes")]
    size = number(record, "batch_size") * times[0] * times[1]
    if not size <= 2 or fact(record, "kind") in ("language", "other", None):
        return None
    batch_norm = any("BatchNorm" in each for each in fact(record, "normalisation") or [])
    text = f"each step sees {size:.0f} sample{'s' if size > 1 else ''}, so its gradient is mostly noise"
    if batch_norm:
        text += ", and batch normalisation has nothing to average"
    advice = "try --data.batch_size 32"
    return finding(record, "batch_too_small", "warning", text, advice, {"batch_size": size})


def no_learning(record: Record) -> Finding | None:
    """The loss stays that of a guess."""
    losses, known = values(record, "train/loss"), learned(record)
    if len(losses) < 3 or not is_late(record) or not known < _NOTHING:
        return None
    text = f"it learns nothing: the loss is {plain(end(losses))}, and a guess has {plain(reference_loss(record))}"
    advice = "look at the samples, their targets, and what the network gets"
    evidence = {"loss": end(losses), "chance_loss": reference_loss(record), "learned": known}
    simple = number(record, "relation", "r2")
    if simple > _LITTLE:
        evidence["simple_r2"] = simple
        advice = f"the data are learnable (a simple method has an R² of {plain(simple)}): look at network and optimiser"
    return finding(record, "no_learning", "fault", text, advice, evidence)


def plateau(record: Record) -> Finding | None:
    """The loss stops falling in the first half of the run, far from its goal."""
    losses = values(record, "train/loss")
    if len(losses) < 10 or not is_over(record):
        return None
    half = losses[len(losses) // 2 :]
    middle, last, known = start(half), end(losses), learned(record)
    if not (_NOTHING <= known < _LITTLE and last > 0.98 * middle):
        return None
    text = f"the loss stays near {plain(last)} in the second half"
    advice = " or ".join(filter(None, [try_schedule(record), "try a larger network, or other inputs"]))
    return finding(record, "plateau", "info", text, advice, {"loss_middle": middle, "loss_end": last})


def _is_scale_free(record: Record) -> bool:
    return str(fact(record, "optimizer", "class")).startswith(_SCALE_FREE)


def _is_not_finite(record: Record) -> bool:
    names = ("train/loss", "grad_norm/total", "val/loss")
    recorded = any(not np.isfinite(record.series[name].values).all() for name in names if name in record.series)
    return recorded or "not finite" in str(fact(record, "ending")).lower()


RULES = (
    learning_rate_too_high,
    learning_rate_too_low,
    updates_too_large,
    updates_too_small,
    vanishing_gradient,
    exploding_gradient,
    dead_units,
    saturated_units,
    clipping_always,
    batch_too_small,
    no_learning,
    plateau,
)
