"""Findings from synthetic records: each rule says its name first, and a sound run is silent."""

import numpy as np
import pytest

from firstlight.data.quality.finding import Finding
from firstlight.insight.findings import CAUSES, MEASURED, RULES, SYMPTOMS, find, in_order
from firstlight.insight.record import Record
from tests.insight.synthetic import EPOCHS, FACTS, LAYERS, falling, sound_run

GUESS = float(np.log(10))
STUCK = {
    "train/loss": np.full(40, GUESS),
    "val/loss": np.full(EPOCHS, GUESS),
    "val/accuracy": np.full(EPOCHS, 0.1),
    "fixed/loss_eval": np.full(EPOCHS, GUESS),
    "fixed/loss_train": np.full(EPOCHS, GUESS),
    "fixed/accuracy_eval": np.full(EPOCHS, 0.1),
}
SLOW = {
    **STUCK,
    "train/loss": np.linspace(2.35, 2.25, 40),
    "fixed/loss_eval": np.linspace(2.34, 2.25, EPOCHS),
    "val/loss": np.linspace(2.34, 2.25, EPOCHS),
    "fixed/accuracy_eval": np.linspace(0.1, 0.2, EPOCHS),
}


def with_layers(prefix, *values):
    return {f"{prefix}/{name}": np.full(40, value) for name, value in zip(LAYERS, values, strict=True)}


def layer(index, **changes):
    return {"layers": [{**each, **(changes if at == index else {})} for at, each in enumerate(FACTS["layers"])]}


COLLAPSED = {f"val/class_share/{name}": np.full(EPOCHS, float(name == 3)) for name in range(10)}

HALF_LEARNED = {
    "fixed/accuracy_eval": np.full(EPOCHS, 0.6),
    "val/accuracy": np.full(EPOCHS, 0.6),
    "fixed/loss_eval": np.full(EPOCHS, 1.3),
    "fixed/loss_train": np.full(EPOCHS, 1.3),
    "train/loss": falling(2.3, 1.3, 40),
}
CASES = {
    "gradient_not_zeroed": (STUCK, {"zero_grad_seen": False}),
    "frozen_layer": ({}, layer(1, trainable=False)),
    "detached_layer": ({}, layer(0, has_gradient=False)),
    "missing_nonlinearity": ({}, {"affine_error": 1e-7, "activations": []}),
    "train_eval_mismatch": ({"fixed/loss_eval": np.full(EPOCHS, 2.0)}, {"normalisation": ["BatchNorm1d"]}),
    "bad_initialisation": (STUCK, {"constant_weights": ["hidden0", "hidden1"]}),
    "initial_loss_off": (
        {
            "fixed/loss_eval": np.full(EPOCHS, 0.5),
            "fixed/accuracy_eval": np.full(EPOCHS, 0.8),
            "fixed/loss_train": None,
        },
        {"initial_loss": 40.0},
    ),
    "wrong_loss": ({"train/loss": -np.linspace(2.3, 500, 40)}, {}),
    "class_collapse": (COLLAPSED, {}),
    "class_imbalance": (
        {f"val/class_share/{name}": np.full(EPOCHS, float(name == 0)) for name in range(2)}
        | {f"val/class_share/{name}": None for name in range(2, 10)}
        | {"val/accuracy": np.full(EPOCHS, 0.95), "val/balanced_accuracy": np.full(EPOCHS, 0.5)},
        {"classes": 2, "class_counts": [950, 50]},
    ),
    "unscaled_inputs": ({}, {"inputs": {"mean": 33.0, "std": 78.0, "min": 0, "max": 255, "kind": "images"}}),
    "not_shuffled": ({}, {"shuffled": {"label_runs": 12.0}}),
    "schedule_mismatch": ({"lr": np.where(np.arange(40) < 10, 0.003, 0.0)}, {}),
    "slow_loader": ({"seconds/wait": np.full(40, 0.03), "seconds/step": np.full(40, 0.05)}, {}),
    "learning_rate_too_high": (
        {"train/loss": np.linspace(2.3, 500, 40)} | with_layers("update/ratio", 0.5, 0.5, 0.5),
        {"optimizer": {"lr": 3.0}},
    ),
    "learning_rate_too_low": ({**SLOW} | with_layers("update/ratio", 1e-5, 1e-5, 2e-5), {"optimizer": {"lr": 1e-6}}),
    "updates_too_large": ({}, {"optimizer": {"class": "Adam", "eps": 1e-30}}),
    "vanishing_gradient": ({**SLOW} | with_layers("gradient/norm", 1e-9, 1e-5, 0.1), {}),
    "exploding_gradient": ({"grad_norm/total": falling(1e6, 1e4, 40)}, {}),
    "dead_units": (
        {**SLOW} | {"activation/dead/hidden1": np.full(40, 0.95)},
        {},
    ),
    "saturated_units": ({**SLOW, "activation/saturated/hidden1": np.full(40, 0.9)}, {}),
    "clipping_always": (
        {"clipped": np.ones(40)},
        {"clip_value": 0.001, "optimizer": {"class": "SGD"}},
    ),
    "batch_too_small": ({}, {"batch_size": 1}),
    "overfitting": (
        {
            "val/loss": np.concatenate([falling(1.5, 0.8, 6), np.linspace(0.85, 2.0, 14)]),
            "val/accuracy": falling(0.4, 0.7, EPOCHS),
        },
        {},
    ),
    "over_regularised": (
        {"fixed/loss_eval": np.full(EPOCHS, 1.2), "fixed/loss_train": np.full(EPOCHS, 2.1)}
        | {"fixed/accuracy_eval": np.full(EPOCHS, 0.6), "train/loss": falling(2.3, 2.1, 40)}
        | {"val/accuracy": np.full(EPOCHS, 0.6)},
        {"dropout": [0.9]},
    ),
    "label_noise": ({"val/accuracy": np.full(EPOCHS, 0.1), "val/loss": np.linspace(2.4, 3.5, EPOCHS)}, {}),
    "stopped_too_early": (
        {"val/loss": np.linspace(2.2, 0.9, EPOCHS), "val/accuracy": np.linspace(0.2, 0.7, EPOCHS)}
        | {"fixed/loss_eval": np.linspace(2.1, 0.8, EPOCHS), "fixed/loss_train": np.linspace(2.1, 0.8, EPOCHS)}
        | {"fixed/accuracy_eval": np.linspace(0.2, 0.72, EPOCHS), "lr": np.full(40, 0.003)}
        | {"train/loss": np.linspace(2.2, 0.8, 40)},
        {},
    ),
    "worse_than_simple": (HALF_LEARNED, {"relation": {"r2": 0.9, "p_value": 0.025, "samples": 400}}),
    "mixes_samples": (HALF_LEARNED, {"mixes_samples": 0.12}),
    "sees_future": ({}, {"token_offset": 1, "sees_future": 0.4}),
    "equal_outputs": (STUCK, {"outputs_follow_one": True, "output_size": 10}),
    "generalisation_gap": ({"fixed/accuracy_eval": np.full(EPOCHS, 0.95), "val/accuracy": np.full(EPOCHS, 0.7)}, {}),
    "no_learning": ({**STUCK} | with_layers("update/ratio", 0.09, 0.09, 0.09), {}),
    "underfitting": (
        SLOW | {"fixed/accuracy_eval": np.full(EPOCHS, 0.2), "val/accuracy": np.full(EPOCHS, 0.2)},
        {},
    ),
    "updates_too_small": (SLOW | with_layers("update/ratio", 1e-6, 0.01, 0.01), {}),
    "plateau": (
        {"train/loss": np.maximum(falling(2.3, 0.5, 40), 1.5), "val/loss": np.maximum(falling(2.3, 0.5, EPOCHS), 1.5)}
        | {"fixed/loss_eval": np.maximum(falling(2.3, 0.5, EPOCHS), 1.5), "fixed/loss_train": None}
        | {"fixed/accuracy_eval": np.full(EPOCHS, 0.45), "val/accuracy": np.full(EPOCHS, 0.45)},
        {"relation": {"r2": 0.4, "p_value": 0.025, "samples": 400}},
    ),
    "noisy_validation": ({"val/loss": np.tile([0.8, 0.4], EPOCHS // 2)}, {}),
}


REGRESSION = {
    "kind": "regression",
    "loss": "MSELoss",
    "outputs_are": "standardised",
    "loss_path": ["MseLoss"],
    "loss_ranks": None,
    "class_counts": None,
    "classes": None,
    "chance_loss": 1.0,
}
OWN = {"kind": None, "loss": None, "outputs_are": None, "class_counts": None, "loss_fit": None, "loss_ranks": None}
POOR_NUMBERS = {
    "fixed/accuracy_eval": None,
    "val/accuracy": None,
    "fixed/loss_eval": np.full(EPOCHS, 0.6),
    "fixed/loss_train": np.full(EPOCHS, 0.6),
    "val/loss": np.full(EPOCHS, 0.6),
    "train/loss": falling(1.0, 0.6, 40),
}
WRONG_LOSSES = {
    "softmax twice": (
        {},
        {"loss_path": ["NllLoss", "LogSoftmax", "Add", "Softmax"], "head": "probabilities"},
        "softmax",
    ),
    "softmax of a user's module": ({}, OWN | {"loss_path": ["NllLoss", "LogSoftmax", "Softmax"]}, "softmax"),
    "sigmoid twice": (
        {},
        {"kind": "binary", "loss_path": ["BinaryCrossEntropyWithLogits", "Sigmoid"], "head": "in [0, 1]"},
        "sigmoid",
    ),
    "ReLU before one logit": (
        {},
        {"kind": "binary", "loss_path": ["BinaryCrossEntropyWithLogits", "Relu"], "head": "non-negative"},
        "ReLU",
    ),
    "log-sigmoid before one logit": (
        {},
        {"kind": "binary", "loss_path": ["BinaryCrossEntropyWithLogits", "LogSigmoid"], "head": "at most 1"},
        "LogSigmoid",
    ),
    "GELU for standardised numbers": (
        POOR_NUMBERS,
        REGRESSION | {"loss_path": ["MseLoss", "Gelu"], "head": "at least -1"},
        "stay at -1 or more",
    ),
    "ReLU before logits that do not learn": (
        HALF_LEARNED,
        {"loss_path": ["NllLoss", "LogSoftmax", "Relu"], "head": "non-negative"},
        "ReLU",
    ),
    "sigmoid for standardised numbers": (
        POOR_NUMBERS,
        REGRESSION | {"loss_path": ["MseLoss", "Sigmoid"], "head": "in [0, 1]"},
        "sigmoid",
    ),
    "a softmax by hand for standardised numbers": (
        POOR_NUMBERS,
        REGRESSION | {"loss_path": ["MseLoss"], "head": "probabilities"},
        "stay between 0 and 1",
    ),
    "a forgotten log-softmax": ({}, {"loss_path": ["NllLoss"]}, "log_softmax"),
    "a forgotten softmax": ({}, {"loss_path": ["NllLoss", "Log", "Clamp"], "loss_fit": 0.3}, "CrossEntropyLoss"),
    "a forgotten sigmoid": ({}, {"kind": "binary", "loss_path": ["BinaryCrossEntropy", "Clamp"]}, "BCEWithLogitsLoss"),
    "shapes that broadcast": ({}, OWN | {"loss_broadcasts": True}, "same shape"),
    "targets shifted twice": ({}, {"kind": "language", "token_offset": 2}, "2 places after"),
    "targets that are the inputs": ({}, {"kind": "language", "token_offset": 0}, "the token at it"),
    "a mean over the batch": ({}, {"loss_pairs": False}, "own target"),
    "a loss that aims elsewhere": ({}, {"loss_fit": -0.1}, "CrossEntropyLoss"),
    "a step away from the right class": (
        {},
        OWN | {"loss_is": None, "raises_right_output": 0.0, "output_size": 10, "loss_path": ["Mean", "Pow"]},
        "CrossEntropyLoss",
    ),
    "a loss that does not rank": (HALF_LEARNED, {"loss_ranks": 0.0, "loss": "Own"}, "CrossEntropyLoss"),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_the_kind_of_a_wrong_loss_is_named_with_what_to_change(name):
    changes, facts, advice = WRONG_LOSSES[name]
    first = find(sound_run(changes, facts))[0]
    assert first.name == "wrong_loss" and first.severity != "info"
    assert advice in f"{first.text} {first.advice}"


def test_augmentation_that_scales_training_samples_only_is_named():
    inputs = {"inputs": {"mean": -1.02, "std": 2.28}, "inputs_in_evaluation": {"mean": 0.01, "std": 1.01}}
    first = find(sound_run({}, {"augments": True, **inputs}))[0]
    assert first.name == "train_eval_mismatch" and "augment" in first.advice
    alike = {"inputs": {"mean": 0.1, "std": 0.9}, "inputs_in_evaluation": {"mean": 0.0, "std": 1.0}}
    assert find(sound_run({}, {"augments": True, **alike})) == []


def test_data_without_a_relation_are_told_from_a_network_that_does_not_learn():
    unrelated = {"relation": {"r2": -0.02, "p_value": 0.7, "samples": 400}}
    stuck = {**STUCK} | with_layers("update/ratio", 0.09, 0.09, 0.09)
    assert find(sound_run(stuck, unrelated))[0].name == "label_noise"
    first = find(sound_run(stuck))[0]
    assert first.name == "no_learning" and "the data are learnable" in first.advice
    assert find(sound_run({}, unrelated)) == []


def test_numbers_in_the_order_of_their_size_are_not_shuffled():
    found = find(sound_run({}, {"shuffled": {"label_runs": None, "autocorrelation": 0.98}}))
    assert [each.name for each in found] == ["not_shuffled"]


def test_a_network_without_regularisation_overfits_from_a_smaller_rise():
    changes = {"val/loss": np.concatenate([falling(1.5, 0.34, 8), np.full(12, 0.39)])}
    changes |= {"val/accuracy": falling(0.5, 0.85, EPOCHS)}
    free = {"dropout": [], "optimizer": {"weight_decay": 0.0}}
    assert [each.name for each in find(sound_run(changes, free))] == ["overfitting"]
    assert find(sound_run(changes)) == []


def test_unscaled_targets_are_named():
    facts = REGRESSION | {"initial_loss": 30_000.0, "chance_loss": 6_000.0, "loss_is": "mse_loss"}
    changes = POOR_NUMBERS | {name: np.full(EPOCHS, 5_000.0) for name in ("fixed/loss_eval", "fixed/loss_train")}
    changes |= {"val/loss": np.full(EPOCHS, 5_000.0), "train/loss": falling(30_000.0, 5_000.0, 40)}
    first = find(sound_run(changes, facts | {"target_mean": 155.0, "target_spread": 79.0}))[0]
    assert first.name == "initial_loss_off" and "scale the targets" in first.advice


@pytest.mark.parametrize("name", CASES)
def test_a_record_with_one_fault_has_its_name_first(name):
    found = find(sound_run(*CASES[name]))
    assert found and found[0].name == name, [each.name for each in found]


def test_a_sound_run_has_no_finding():
    assert find(sound_run()) == []


SOUND = {
    "a short run of a binary task, whose accuracy is far above what its loss tells": (
        {
            "fixed/accuracy_eval": None,
            "fixed/loss_eval": falling(0.66, 0.24, EPOCHS),
            "val/loss": falling(0.6, 0.2, EPOCHS),
        }
        | {"fixed/loss_train": None, "train/loss": falling(0.7, 0.25, 40), "val/accuracy": falling(0.6, 0.96, EPOCHS)},
        {"kind": "binary", "classes": 2, "class_counts": [500, 760], "chance_loss": 0.67, "initial_loss": 0.7},
    ),
    "batch normalisation whose averages follow late": (
        {"fixed/loss_eval": [2.0, 0.5], "fixed/loss_train": [0.7, 0.5]},
        {},
    ),
    "class weights and rare classes": (
        {"val/balanced_accuracy": falling(0.5, 0.93, EPOCHS)},
        {"class_weights": True, "class_counts": [720, *[60] * 9]},
    ),
    "strong weight decay with which most is learned": (
        {"fixed/accuracy_eval": falling(0.5, 0.82, EPOCHS), "val/accuracy": falling(0.5, 0.8, EPOCHS)}
        | {"fixed/loss_eval": falling(1.5, 0.5, EPOCHS), "fixed/loss_train": falling(1.5, 0.5, EPOCHS)}
        | {"train/loss": falling(2.3, 0.5, 40)},
        {"optimizer": {"class": "AdamW", "lr": 0.003, "weight_decay": 1.0, "decoupled_weight_decay": True}},
    ),
    "a validation that is better by what few samples may differ": (
        {"fixed/accuracy_eval": falling(0.3, 0.55, EPOCHS), "val/accuracy": falling(0.3, 0.7, EPOCHS)}
        | {"fixed/loss_eval": falling(1.5, 0.9, EPOCHS), "fixed/loss_train": falling(1.5, 0.9, EPOCHS)}
        | {"train/loss": falling(2.3, 0.9, 40), "val/loss": falling(1.5, 0.8, EPOCHS)},
        {"val_samples": 4846, "train_samples": 30000},
    ),
    "a last layer of zeros": ({}, {"constant_weights": ["output"], "outputs_look_like": "constant"}),
    "three validations, of which the last ones differ little": (
        {"val/loss": [1.54, 1.26, 1.21], "fixed/loss_eval": [1.49, 1.17], "fixed/loss_train": [1.48, 1.24]}
        | {"val/accuracy": [0.52, 0.69, 0.71], "fixed/accuracy_eval": [0.5, 0.76]},
        {},
    ),
    "numbers that the network bounds on purpose": (
        {"fixed/accuracy_eval": None, "val/accuracy": None},
        {
            "kind": "regression",
            "loss": "MSELoss",
            "outputs_are": "standardised",
            "head": "in [-1, 1]",
            "loss_path": ["MseLoss"],
        }
        | {"class_counts": None, "classes": None},
    ),
    "a deep residual network, whose first loss is far off": ({}, {"initial_loss": 40.0}),
    "unequal classes that are learned": (
        {"val/balanced_accuracy": np.full(EPOCHS, 0.75)},
        {"class_counts": [720, *[60] * 9]},
    ),
    "two epochs": (
        {name: each.values[:2] for name, each in sound_run().series.items()}
        | with_layers("update/ratio", 0.005, 0.005, 0.005)
        | {"fixed/loss_eval": [2.0, 1.7], "fixed/loss_train": [2.0, 1.7], "train/loss": [2.2, 1.8]}
        | {"val/loss": [2.0, 1.7], "fixed/accuracy_eval": [0.3, 0.4], "val/accuracy": [0.3, 0.4]},
        {"done_steps": 20, "planned_steps": 20, "done_epochs": 2, "epochs": 2},
    ),
    "one layer of ReLU before many classes": (
        {},
        {"loss_path": ["NllLoss", "LogSoftmax", "Mean", "Relu"], "head": "non-negative"},
    ),
    "a sequence of tokens": ({}, {"inputs": {"kind": "tokens", "mean": None, "std": None}}),
    "clipping of a transformer": ({"clipped": np.ones(40)}, {"clip_value": 0.25}),
    "a run of one step": (
        {name: each.values[:1] for name, each in sound_run().series.items()},
        {"done_steps": 1, "shuffled": {"label_runs": None, "order_repeats": None}},
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_an_unusual_but_sound_run_has_no_warning(name):
    assert [each for each in find(sound_run(*SOUND[name])) if each.severity != "info"] == []


@pytest.mark.parametrize(("rate", "ratio", "advised"), [(1e-6, 1.4e-5, 1e-3), (3.0, 0.5, 1e-3), (0.5, 3.0, 1e-3)])
def test_the_advised_learning_rate_follows_from_the_size_of_the_weights(rate, ratio, advised):
    changes = {**SLOW} | with_layers("update/ratio", ratio, ratio, ratio) | {"lr": np.full(40, rate)}
    first, *_ = find(sound_run(changes, {"optimizer": {"lr": rate}, "weights_std": dict.fromkeys(LAYERS, 0.07)}))
    assert first.name == ("learning_rate_too_low" if rate < 1 / 1000 else "learning_rate_too_high")
    assert first.advice == f"try --model.optimizer.lr {advised:g}"


def test_a_rate_of_adam_that_replaces_the_weights_is_too_high_in_a_network_that_has_died():
    dead = {**STUCK} | with_layers("update/ratio", 0.0, 0.0, 0.01) | {"activation/dead/hidden1": np.ones(40)}
    first, *_ = find(sound_run(dead, {"optimizer": {"lr": 3.0}, "weights_std": dict.fromkeys(LAYERS, 0.05)}))
    assert first.name == "learning_rate_too_high" and "60 times the size of the weights" in first.text


def test_the_advice_for_a_symptom_names_the_cause():
    found = find(sound_run(*CASES["learning_rate_too_low"]))
    by_name = {each.name: each.advice for each in found}
    assert by_name["underfitting"] == "this may follow from learning_rate_too_low"


def test_a_record_without_anything_has_no_finding():
    assert find(Record({}, {})) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("without", ["series", "facts"])
def test_rules_accept_records_that_lack_half_of_what_they_read(name, without):
    record = sound_run(*CASES[name])
    find(Record({}, record.facts) if without == "series" else Record(record.series, {}))


@pytest.mark.parametrize("fact", FACTS)
def test_rules_accept_a_fact_that_is_unknown(fact):
    for changes, facts in CASES.values():
        find(sound_run(changes, {**facts, fact: None}))


@pytest.mark.parametrize("name", sorted(sound_run().series))
def test_rules_accept_series_of_one_value_and_of_nan(name):
    for values in ([0.5], [np.nan] * 5, [np.inf, np.nan, 0.0], []):
        find(sound_run({name: values}))


def test_warm_up_in_steps_is_shortened_in_steps():
    changes = {"warmup_steps": 300, "schedule": {"class": "WarmupCosine", "warmup_steps": 300}}
    (found,) = find(sound_run({}, changes))
    assert found.name == "schedule_mismatch"
    assert found.advice == f"shorten the warm-up: --model.schedule.warmup_steps {round(0.05 * FACTS['planned_steps'])}"


def test_network_that_reads_the_place_in_the_batch_is_told_apart_from_one_that_reads_other_samples():
    texts = [
        find(sound_run({}, {"mixes_samples": a, "depends_on_order": b}))[0].text for a, b in ((0.2, 0.3), (0, 0.3))
    ]
    assert "another sample changes it by 20%" in texts[0] and "another order changes it by 30%" in texts[1]


def test_outputs_that_follow_one_number_by_design_are_information():
    (found,) = find(sound_run({}, {"outputs_follow_one": True, "output_size": 2}))
    assert (found.name, found.severity) == ("equal_outputs", "info")


def test_network_that_labels_each_token_may_see_later_ones():
    assert find(sound_run({}, {"token_offset": 0, "kind": None, "sees_future": 0.4}))[:1] != ["sees_future"]
    found = find(sound_run({}, {"token_offset": None, "sees_future": 0.4}))
    assert "sees_future" not in [each.name for each in found]


def test_schedule_that_steps_once_an_epoch_by_mistake_is_told_what_to_change():
    epochs = np.arange(40) // 4
    (found,) = find(sound_run({"lr": 1e-4 * (epochs + 1)}, {"warmup_steps": None}))
    assert found.name == "schedule_mismatch" and "'interval': 'step'" in found.advice


def test_warm_up_to_a_constant_rate_is_sound():
    assert find(sound_run({"lr": 1e-3 * np.minimum(np.arange(1, 41) / 8, 1)}, {})) == []


def test_schedule_whose_rate_is_logged_once_an_epoch_is_not_said_to_step_once_an_epoch():
    steps = sound_run().series["lr"].steps
    found = find(sound_run({"lr": 1e-5 * (1.0 + steps)}, {"done_epochs": 40}))
    assert [each.name for each in found] == ["schedule_mismatch"] and "'interval'" not in found[0].advice


@pytest.mark.parametrize(("losses", "is_named"), [((1.0, -1.22, -1.221, -1.219), False), ((1.0, -1.2, -0.2), True)])
def test_loss_that_may_be_negative_overfits_if_it_rises_by_a_part_of_what_was_gained(losses, is_named):
    ends = np.interp(np.linspace(0, 1, EPOCHS), np.linspace(0, 1, len(losses)), losses)
    gone = {name: None for name in ("val/accuracy", "fixed/accuracy_eval", "fixed/loss_train")}
    record = sound_run({**gone, "val/loss": ends, "fixed/loss_eval": np.linspace(1, -2.5, EPOCHS)})
    assert ("overfitting" in [each.name for each in find(record)]) is is_named


def test_gradient_that_overflows_later_explodes_at_its_largest_finite_value():
    values = np.ones(40)
    values[5], values[6] = 5000, np.inf
    record = sound_run({"grad_norm/total": values})
    found = next(each for each in find(record) if each.name == "exploding_gradient")
    assert found.evidence["largest"] == 5000 and found.step == record.series["grad_norm/total"].steps[5]


@pytest.mark.parametrize("name", CASES)
def test_advice_for_another_module_names_no_options_of_a_task(name):
    changes, facts = CASES[name]
    found = find(sound_run(changes, {**facts, "kind": None, "schedule": None, "early_stopping": None}))
    assert not [each.advice for each in found if "--model." in each.advice]


def test_each_name_of_a_rule_has_a_place_in_the_order():
    assert len(RULES) == len({*RULES})
    names = (*MEASURED, *CAUSES, *SYMPTOMS)
    assert sorted(rule.__name__ for rule in RULES) == sorted(names)


def test_causes_come_before_symptoms_and_information_comes_last():
    made = [
        Finding(name, severity, "", {}, "")
        for name, severity in (("no_learning", "fault"), ("wrong_loss", "info"), ("learning_rate_too_high", "warning"))
    ]
    assert [each.name for each in in_order(made)] == ["learning_rate_too_high", "no_learning", "wrong_loss"]


def test_overfitting_states_losses_and_the_epoch_that_were_logged():
    losses = np.concatenate([[np.nan, 1.5, 0.9, 0.4, 0.8], np.linspace(0.9, 2.0, EPOCHS - 5)])
    record = sound_run({"val/loss": losses})
    found = next(each for each in find(record) if each.name == "overfitting")
    assert found.text.startswith("it overfits: val/loss rises from 0.4 to 2, training ends at ")
    assert (found.evidence["val_loss_best"], found.evidence["val_loss_end"]) == (0.4, 2.0)
    assert found.step == record.series["val/loss"].steps[3]


def test_the_batch_of_a_step_is_that_of_all_processes():
    names = [{each.name for each in find(sound_run({}, {"batch_size": 1, "processes": count}))} for count in (1, 4)]
    assert "batch_too_small" in names[0]
    assert "batch_too_small" not in names[1]
