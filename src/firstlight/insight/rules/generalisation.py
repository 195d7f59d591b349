"""Training against validation: too much or too little capacity, noise in labels, and the time to stop."""

import numpy as np

from firstlight.data.quality.finding import Finding
from firstlight.insight.record import Record
from firstlight.insight.rules.reading import (
    CLASSES,
    end,
    fact,
    finding,
    first_updates,
    is_late,
    is_over,
    learned,
    median,
    number,
    option,
    plain,
    reference_loss,
    share_done,
    skill,
    skills,
    try_schedule,
    update_ratios,
    values,
    warning_if,
)

# Goodfellow et al., Deep Learning (2016), 7.8: the validation loss rises while the training loss still falls.
_AUGMENTED, _LEARNED = 1.3, 0.75
# All thresholds below are set on the half development of the bench.
_RISEN, _GAP, _BY_HEART = 1.2, 0.15, 30.0
_RISEN_FREELY, _GAP_FREELY = 1.05, 0.1
_EXTREME, _REACHED = 0.9, 0.95
# Of targets in random orders, one in twenty is as good by chance.
_UNRELATED, _ENOUGH = 0.05, 100
_FIXED = 256  # `callbacks.fixed_sample` scores at most so many training samples.
_UNDERFIT = 0.15
_STRONG_DROPOUT, _STRONG_DECAY, _STRONG_DECOUPLED, _SHRINKS, _PENALTY = 0.7, 0.05, 0.5, 2e-3, 2.0
_STILL_FALLING, _IMPATIENT, _REACHED_END = 0.1, 2, 0.9
_SHORT_PATH, _USUAL_UPDATE = 0.5, 1e-3
_MEMORISED, _NO_RELATION = 0.3, 0.05
# Of the sound runs of the bench that this rule judges, none is worse by more than 0.19.
_SIMPLE = 0.25
_NOISY = 0.5
_WIDE = 0.2
_EVEN, _UNSURE, _FEW_ERRORS, _DONE = 0.85, 1.3, 0.9, 0.03


def overfitting(record: Record) -> Finding | None:
    """The validation loss rises while the training loss falls."""
    logged, own = values(record, "val/loss"), values(record, "fixed/loss_eval")
    if len(logged) < 3:
        return None
    # Judged by a mean of three, so that one lucky validation is not the best one. The text has what was logged.
    losses = np.convolve(logged, np.ones(3) / 3, "valid") if len(logged) > 4 else logged
    best, last = int(losses.argmin()), float(losses[-1])
    trained, validated = skills(record)
    gap = trained - validated
    by_heart = bool(len(own) and last > _BY_HEART * own[-1] > 0 and gap > _GAP / 2)
    # A likelihood may be negative: a rise is then measured by what was gained.
    scale = float(losses[best] if losses[best] > 0 else max(losses[0] - losses[best], -losses[best]))
    rise = (last - float(losses[best])) / max(scale, 1e-12)
    rises = rise > _RISEN - 1 and not (len(own) and own[-1] > last - 0.2 * abs(last))
    # Without any regularisation, a smaller rise has a known remedy.
    risen_freely = _is_free(record) and rise > _RISEN_FREELY - 1 and gap > _GAP_FREELY
    risen_freely = risen_freely and bool(len(own)) and own[-1] < last - 0.5 * abs(last)
    if not (rises or by_heart or risen_freely):
        return None
    rises = rises or risen_freely
    series, least, final = record.series["val/loss"], float(logged.min()), float(logged[-1])
    steps = series.steps[np.isfinite(series.values)]
    severity = warning_if(gap > _GAP or by_heart or risen_freely)
    text = f"it overfits: val/loss {'rises from ' + plain(least) + ' to' if rises else 'ends at'} {plain(final)}"
    evidence = {"val_loss_best": least, "val_loss_end": final}
    if len(own):
        # The fixed sample is scored now and then: the loss of the last batches may be newer.
        logged_late = record.series.get("train/loss")
        is_old = logged_late is not None and record.series["fixed/loss_eval"].steps[-1] < 0.75 * steps[-1]
        trained_to = end(values(record, "train/loss")) if is_old else float(own[-1])
        text += f", training ends at {plain(trained_to)}"
        evidence |= {"train_loss_end": trained_to, "gap": gap}
    advice = "use more data, augmentation, dropout or weight decay"
    return finding(record, "overfitting", severity, text, advice, evidence, int(steps[logged.argmin()]))


def generalisation_gap(record: Record) -> Finding | None:
    """Training samples are predicted far better than validation samples, though the loss may not rise."""
    if not is_late(record) or overfitting(record):
        return None
    for name in ("accuracy", "r2"):
        trained = values(record, f"fixed/{name}_eval")[-1:] if len(values(record, f"fixed/{name}_eval")) else None
        known = float(trained[0]) if trained is not None else end(values(record, f"train/{name}"))
        validated = end(values(record, f"val/{name}"))
        if known - validated > _WIDE:
            text = f"{name} is {plain(known)} on training samples, and {plain(validated)} on validation samples"
            advice = (
                "use more data or regularisation; or look for what differs in validation: samples, evaluation mode, "
            )
            advice += "averaged weights"
            evidence = {"train": known, "val": validated}
            return finding(record, "generalisation_gap", "info", text, advice, evidence)
    return None


def _is_free(record: Record) -> bool:
    """Return whether nothing regularises: no dropout, weight decay, L1 penalty or augmentation."""
    decays = number(record, "optimizer", "weight_decay") > 0 or number(record, "l1") > 0
    return not (dropout_of(record) or decays or fact(record, "augments") or fact(record, "label_smoothing"))


def underfitting(record: Record) -> Finding | None:
    """Training samples are hardly better than a guess, and validation is as good."""
    known = learned(record)
    if not is_over(record) or not known < _UNDERFIT:
        return None
    validated = skill(record, "val")
    if len(validated) and not median(validated[-3:]) > known - 0.15:
        return None
    severity = warning_if(not number(record, "done_epochs") <= 2)  # Two epochs tell little about the network.
    text = f"it underfits: even training samples are only {max(known, 0):.0%} better than a guess"
    advice = "use a larger network, train longer, or regularise less"
    return finding(record, "underfitting", severity, text, advice, {"learned": known})


def worse_than_simple(record: Record) -> Finding | None:
    """A simple method that has seen few samples predicts better than the network."""
    related, validated = _related(record), skill(record, "val")
    if fact(record, "kind") not in (*CLASSES, "regression") or not is_over(record) or not len(validated):
        return None
    best = float(validated.max())
    if is_unrelated(record) is not False or not related - best > _SIMPLE:
        return None
    samples = number(record, "relation", "samples")
    text = f"validation is at most {max(best, 0):.0%} better than a guess; ridge regression with a kernel on "
    text += f"{samples:,.0f} samples has an R² of {plain(related)} on samples left out"
    advice = "look at what is between inputs and loss: axes, reshapes and indices, masks, inputs that mean something "
    advice += "else in validation; or train longer"
    evidence = {"r2": related, "val_best": best}
    severity = warning_if(not number(record, "done_epochs") <= 2)  # Two epochs tell little about the network.
    return finding(record, "worse_than_simple", severity, text, advice, evidence)


def dropout_of(record: Record) -> float:
    """Return the largest dropout probability, 0 without dropout."""
    return float(max(fact(record, "dropout") or [0.0]))


def over_regularised(record: Record) -> Finding | None:
    """Dropout, weight decay or augmentation is so strong that even training samples are not learned."""
    if not is_over(record):
        return None
    evaluated, trained = values(record, "fixed/loss_eval"), values(record, "fixed/loss_train")
    seen, known = values(record, "train/loss"), learned(record)
    dropout = dropout_of(record)
    if len(evaluated) and len(trained):
        evaluation, training = end(evaluated), end(trained)
        evidence = {"loss_eval": evaluation, "loss_train": training, "dropout": dropout, "learned": known}
        # Srivastava et al. (2014) drop 0.2 to 0.5; above 0.9, less than a tenth of the units is left.
        hides = dropout > _EXTREME and known < _REACHED
        hides = hides or (
            dropout >= _STRONG_DROPOUT and (known < _LEARNED or (training > 1.5 * evaluation and known < 0.9))
        )
        if hides or (dropout >= 0.5 and training > 1.1 * evaluation and known < 0.4):
            text = f"dropout of {dropout:g} hides much: training has a loss of {plain(training)} with it, "
            text += f"{plain(evaluation)} without"
            advice = "lower dropout to 0.1 to 0.5"
            return finding(record, "over_regularised", "warning", text, advice, evidence)
        augmented = end(seen) if fact(record, "augments") and len(seen) else np.nan
        if augmented > _AUGMENTED * max(training, evaluation) and known < _LEARNED:
            text = f"training samples have a loss of {plain(augmented)} augmented, and {plain(training)} as they are"
        elif np.isfinite(augmented) and known < _LEARNED:
            text = f"augmented training samples are only {max(known, 0):.0%} better than a guess"
        else:
            return _over_decayed(record) or _over_penalised(record)
        advice = "weaken the augmentation: it must not change what the label says"
        evidence = {"loss_augmented": augmented, "loss_train": training, "learned": known}
        return finding(record, "over_regularised", "warning", text, advice, evidence)
    return _over_decayed(record) or _over_penalised(record)


def _over_decayed(record: Record) -> Finding | None:
    """Return whether weight decay takes much of the weights in each step."""
    decay, rate = number(record, "optimizer", "weight_decay"), number(record, "optimizer", "lr")
    shrink, known = decay * rate, learned(record)
    # Decay that is added to the gradient is scaled with it by Adam, and acts whatever the learning rate is.
    is_coupled = not fact(record, "optimizer", "decoupled_weight_decay")
    is_strong = decay > _STRONG_DECAY if is_coupled else decay >= _STRONG_DECOUPLED and shrink > _SHRINKS
    # What helps leaves training samples learned for the greater part.
    if not (is_strong and known < (0.9 if is_coupled else _LEARNED)):
        return None
    text = f"weight decay of {decay:g} takes {plain(100 * shrink)} % of the weights in each step"
    if is_coupled:
        text = f"weight decay of {decay:g} is added to the gradient, and outweighs the loss"
    evidence = {"weight_decay": decay, "learning_rate": rate, "learned": known}
    return finding(record, "over_regularised", "warning", text, f"try {option(record, 'weight_decay')} 0.01", evidence)


def _over_penalised(record: Record) -> Finding | None:
    """Return whether the L1 penalty is larger than the loss."""
    l1, losses = number(record, "l1"), values(record, "train/loss")
    if not l1 > 0 or not len(losses):
        return None
    penalty, known = number(record, "initial_loss") - float(losses[0]), learned(record)
    if not (penalty > _PENALTY * reference_loss(record) and known < 0.9):
        return None
    text = f"the L1 penalty starts at {plain(penalty)}, and a guess has a loss of {plain(reference_loss(record))}"
    advice = f"try --model.l1 {plain(l1 / 10)}"
    evidence = {"l1": l1, "penalty": penalty, "learned": known}
    return finding(record, "over_regularised", "warning", text, advice, evidence)


def label_noise(record: Record) -> Finding | None:
    """Labels disagree with the inputs: they are learned by heart, or not at all."""
    if fact(record, "kind") not in (*CLASSES, "regression"):
        return None
    fixed, validated = skill(record, "fixed"), skill(record, "val")
    if len(validated) < 2 or not len(fixed):
        return None
    own, best = float(fixed[-1]), float(validated.max())
    trained, other = skills(record)
    evidence = {"learned": own, "val_best": best}
    if is_late(record) and trained > _MEMORISED and max(best, other) < _NO_RELATION:
        text = f"training samples are {trained:.0%} better than a guess, and validation stays a guess"
        advice = "see whether each target belongs to its input"
        return finding(record, "label_noise", "fault", text, advice, evidence)
    unrelated = is_unrelated(record)
    # Twice the standard error of a share of the validation samples.
    if unrelated and is_late(record) and other < _NO_RELATION + 1 / np.sqrt(max(number(record, "val_samples"), 1)):
        text = f"targets do not follow from inputs: a simple method has an R² of {plain(_related(record))} on samples "
        text += "left out, as with shuffled targets"
        advice = "see whether each target belongs to its input: were inputs or targets sorted or shuffled alone?"
        evidence |= {"r2": _related(record), "p_value": number(record, "relation", "p_value")}
        return finding(record, "label_noise", "fault", text, advice, evidence)
    usual = 1e-3 < first_updates(record) < 3e-2 and unrelated is not False
    if is_over(record) and usual and own < _NO_RELATION and best < _NO_RELATION:
        text = "updates are usual, and nothing is learned: targets may not follow from inputs"
        advice = "see whether each target belongs to its input"
        return finding(record, "label_noise", "warning", text, advice, evidence)
    # Twice the standard errors of a share of the validation samples, and of one of the fixed sample.
    fixed_samples = min(number(record, "train_samples"), _FIXED)
    margin = 0.1 + 1 / np.sqrt(max(number(record, "val_samples"), 1)) + 1 / np.sqrt(max(fixed_samples, 1))
    if is_over(record) and other > max(trained + margin, 0.3) and fact(record, "kind") in CLASSES:
        text = f"training samples are worse than validation ({trained:.0%} and {other:.0%} better than a guess)"
        advice = "check the labels of samples with a high loss"
        evidence = {"learned": trained, "val_learned": other}
        return finding(record, "label_noise", "warning", text, advice, evidence)
    return _random_labels(record)


def is_unrelated(record: Record) -> bool | None:
    """Return whether a simple method finds no relation of training targets to inputs; None if that is unknown."""
    found, samples = number(record, "relation", "p_value"), number(record, "relation", "samples")
    if not samples >= _ENOUGH or not np.isfinite(found):
        return None
    return bool(found > _UNRELATED and _related(record) < _NO_RELATION)


def _related(record: Record) -> float:
    return number(record, "relation", "r2")


def _random_labels(record: Record) -> Finding | None:
    """Return whether the validation loss is as high as if the errors were spread evenly over samples and classes.

    Errors that follow from the inputs concentrate: few samples are hard, and each between few classes. With accuracy
    `a` and `C` classes, evenly spread errors have the loss `H(a) + (1 - a) ln(C - 1)`, where `H` is the entropy, and
    errors that are coin flips between two classes `2 (1 - a) ln 2`.
    """
    accuracy, losses, classes = values(record, "val/accuracy"), values(record, "val/loss"), number(record, "classes")
    log_losses = values(record, "val/log_loss")
    losses = log_losses if len(log_losses) == len(losses) else losses
    if fact(record, "kind") not in ("classification", "binary") or len(accuracy) != len(losses) or len(losses) < 5:
        return None
    if fact(record, "class_weights") or fact(record, "label_smoothing") or not is_over(record):
        return None
    best = int(losses.argmin())
    right, loss = float(accuracy[best]), float(losses[best])
    # Without an end of the fall, the network is not done, and unsure for that reason.
    is_done = best < 0.8 * len(losses) or losses[len(losses) // 2] - loss < _DONE * reference_loss(record)
    # Of few errors, the share is not sure.
    if not is_done or not 0 < right < _FEW_ERRORS or not skill(record, "val")[best] > 0.2:
        return None
    if loss > 0.9 * reference_loss(record):
        return None
    even = -right * np.log(right) - (1 - right) * np.log((1 - right) / max(classes - 1, 1))
    share = (loss - 2 * (1 - right) * np.log(2)) / (even - 2 * (1 - right) * np.log(2))
    if not _EVEN < share < _UNSURE or dropout_of(record) >= 0.5:
        return None
    text = f"a loss of {plain(loss)} at an accuracy of {right:.2f} is that of {1 - right:.0%} random labels"
    advice = "check the labels of samples with a high loss"
    evidence = {"val_loss": loss, "val_accuracy": right, "evenness": share}
    return finding(record, "label_noise", "warning", text, advice, evidence)


def noisy_validation(record: Record) -> Finding | None:
    """The validation loss jumps from epoch to epoch."""
    losses = values(record, "val/loss")
    if len(losses) < 8:
        return None
    half = losses[len(losses) // 2 :]
    jumps = float(np.median(np.abs(np.diff(half))) / max(abs(float(np.median(half))), 1e-12))
    if not jumps > _NOISY:
        return None
    text = f"val/loss changes by {jumps:.0%} from one validation to the next"
    advice = " or ".join(filter(None, [try_schedule(record), "use a larger validation split"]))
    return finding(record, "noisy_validation", "info", text, advice, {"jumps": jumps})


def stopped_too_early(record: Record) -> Finding | None:
    """The run ends while it still learns."""
    if not is_over(record):
        return None
    losses, steps = values(record, "val/loss"), number(record, "done_steps")
    stopped = bool(fact(record, "early_stopping", "stopped"))
    advice = "raise the patience of early stopping" if stopped else "train longer: --trainer.max_epochs"
    tail = max(1, round(len(losses) * 0.25))
    last = losses[-tail - 1 :]
    if len(losses) >= 3:
        gain, falls = float(last[0] - last[-1]), float(np.mean(np.diff(last) < 0))
        # What is known of all training samples, longer training does not teach; a schedule that is at its end was meant
        # to end.
        is_open = learned(record) < _REACHED_END and not _is_annealed(record)
        if gain > _STILL_FALLING * reference_loss(record) and falls > 0.7 and is_open:
            text = f"val/loss still falls at the end, by {plain(gain)} in the last {tail} validations"
            evidence = {"gain": gain, "val_loss_end": float(losses[-1])}
            return finding(record, "stopped_too_early", "warning", text, advice, evidence)
    impatient = number(record, "early_stopping", "patience") <= _IMPATIENT
    if stopped and impatient and share_done(record) < 0.5 and learned(record) < 0.9:
        text = f"early stopping ends the run after {share_done(record):.0%} of its steps, with a patience of "
        text += f"{number(record, 'early_stopping', 'patience'):.0f}"
        return finding(record, "stopped_too_early", "warning", text, advice, {"share": share_done(record)})
    # The sum of all updates, relative to the weights: how far the weights could have moved.
    path, known = float(np.sum(update_ratios(record)) / max(len(update_ratios(record)), 1)) * steps, learned(record)
    is_short = len(losses) < 3 and path < _SHORT_PATH and first_updates(record) > _USUAL_UPDATE
    if is_short and known < _LEARNED:
        text = f"{steps:,.0f} steps are few: weights move by {path:.0%}, and it is {known:.0%} better than a guess"
        evidence = {"path": path, "learned": known, "steps": steps}
        # With two epochs, somebody has chosen a number; with one, samples were seen once.
        severity = warning_if(number(record, "done_epochs") <= 1 and share_done(record) >= 1)
        return finding(record, "stopped_too_early", severity, text, advice, evidence)
    return None


def _is_annealed(record: Record) -> bool:
    """Return whether the schedule is at its end: the learning rate is below a tenth of its peak."""
    rates = values(record, "lr")
    return bool(len(rates) > 1 and not fact(record, "early_stopping", "stopped") and rates[-1] < 0.1 * rates.max())


RULES = (
    overfitting,
    underfitting,
    worse_than_simple,
    generalisation_gap,
    over_regularised,
    label_noise,
    noisy_validation,
    stopped_too_early,
)
