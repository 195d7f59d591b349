"""Find what is wrong with a run: all rules, ordered by what causes what."""

from collections.abc import Sequence
from dataclasses import replace

from firstlight.data.quality.finding import Finding
from firstlight.insight.record import Record
from firstlight.insight.rules import data, generalisation, optimisation, outputs, setup

RULES = (*setup.RULES, *outputs.RULES, *data.RULES, *optimisation.RULES, *generalisation.RULES)

# A finding is likelier the cause the earlier it stands here.
# Measured directly, and true whatever the curves say.
MEASURED: tuple[str, ...] = (
    "gradient_not_zeroed",
    "leakage",
    "duplicate_samples",
    "wrong_loss",
    "mixes_samples",
    "sees_future",
    "bad_initialisation",
    "equal_outputs",
    "missing_nonlinearity",
    "unscaled_inputs",
    "not_shuffled",
    "initial_loss_off",
    "detached_layer",
    "frozen_layer",
    "train_eval_mismatch",
    "batch_too_small",
    "clipping_always",
    "schedule_mismatch",
)
# Told from how the run went.
CAUSES: tuple[str, ...] = (
    "over_regularised",
    "updates_too_large",
    "learning_rate_too_high",
    "dead_units",
    "saturated_units",
    "vanishing_gradient",
    "learning_rate_too_low",
    "class_imbalance",
    "label_noise",
    "overfitting",
    "generalisation_gap",
    "stopped_too_early",
)
# What follows from a cause, and says little about it.
SYMPTOMS: tuple[str, ...] = (
    "exploding_gradient",
    "updates_too_small",
    "no_learning",
    "class_collapse",
    "underfitting",
    "plateau",
    "noisy_validation",
    "worse_than_simple",
    "slow_loader",
)

# Told from clocks, so that the same run has them on one machine only.
TIMED = ("slow_loader",)

_GROUPS = {name: group for group, names in enumerate((MEASURED, CAUSES, SYMPTOMS)) for name in names}


def find(record: Record) -> list[Finding]:
    """Return what is wrong with a run and its data: the likeliest cause first, then its symptoms, information last."""
    found = in_order([each for rule in RULES if (each := rule(record)) is not None])
    if not found or found[0].severity == "info":
        return found
    # The advice for what follows from a cause may contradict that for the cause.
    group = _GROUPS[found[0].name]
    advice = f"this may follow from {found[0].name}"
    # A simple method that does better shows that there is more to find than what was told from curves.
    keeps = ("worse_than_simple",) if found[0].name in CAUSES else ()
    follows = [_GROUPS[each.name] > group and each.name not in keeps for each in found]
    return [replace(each, advice=advice) if after else each for each, after in zip(found, follows, strict=True)]


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings with causes before symptoms, and information last. Names without a place keep their order."""
    place = {name: index for index, name in enumerate(_GROUPS)}
    return sorted(findings, key=lambda each: (each.severity == "info", place.get(each.name, len(place))))
