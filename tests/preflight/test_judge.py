import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from firstlight.data.quality.finding import Finding
from firstlight.preflight import judge
from firstlight.preflight.layers import watched
from firstlight.preflight.measure import (
    dependence,
    distance_to_targets,
    exact_batch_statistics,
    learning_rates,
    neutral_outputs,
    pull_to_targets,
)
from firstlight.schedules import Constant
from firstlight.tasks import Classification, Regression


def names(findings):
    return [f"{each.severity} {each.name}" for each in findings]


def test_cause_comes_before_its_symptoms_and_a_fault_before_a_warning():
    found = [
        Finding(name, severity, "", {}, "own")
        for name, severity in [
            ("no_learning", "fault"),
            ("dead_units", "warning"),
            ("vanishing_gradient", "fault"),
            ("quality", "info"),
        ]
    ]
    ordered = judge.in_order(found)
    assert [each.name for each in ordered] == ["vanishing_gradient", "no_learning", "dead_units", "quality"]
    assert "symptom" in ordered[1].advice and judge.in_order(found[:1])[0].advice == "own"


def test_frozen_network_is_the_cause_of_no_learning():
    found = [Finding(name, "fault", "", {}, "own") for name in ("no_learning", "frozen_parameters")]
    assert [each.name for each in judge.in_order(found)] == ["frozen_parameters", "no_learning"]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(2.5, []), (8.0, ["info"]), (30.0, ["warning"]), (0.5, ["warning"]), (math.nan, ["fault"])],
)
def test_first_loss_is_compared_with_chance(loss, expected):
    found = judge.judge_initial_loss(loss, math.log(10), "10 equal logits", 1.0)
    assert names(found) == [f"{severity} initial_loss_off" for severity in expected]


@pytest.mark.parametrize(
    ("size", "normalised", "is_found"),
    [(1, False, False), (120, False, True), (0.001, False, True), (120, True, False)],
)
def test_inputs_that_are_not_scaled_are_found_unless_the_network_normalises(size, normalised, is_found):
    assert bool(judge.judge_inputs(size, 255.0, normalised)) == is_found


def test_loss_that_falls_is_no_fault_and_one_that_jumps_is_a_warning():
    assert judge.judge_overfit([2.3, 2.0, 1.0], 0.1, {}) == []
    assert names(judge.judge_overfit([2.3, 99.0, 1.0], 0.1, {})) == ["warning learning_rate_too_high"]


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ({0.01: [2.3, 1.0], 10.0: [2.3, 2.3]}, "learning_rate_too_high"),
        ({0.01: [2.3, 2.3], 10.0: [2.3, 1.0]}, "learning_rate_too_low"),
        ({0.01: [2.3, 2.2], 10.0: [2.3, 2.2]}, "no_learning"),
    ],
)
def test_another_rate_that_learns_proves_that_the_rate_is_the_cause(others, name):
    assert names(judge.judge_overfit([2.3, 2.3, 2.3], 0.3, others)) == [f"fault {name}"]


def test_network_that_is_worse_in_evaluation_mode_is_found():
    assert judge.judge_modes(0.5, 0.4, 2.3, False) == judge.judge_modes(0.01, 0.5, 2.3, False) == []
    assert names(judge.judge_modes(0.5, 3.0, 2.3, False)) == ["warning train_eval_mismatch"]
    assert names(judge.judge_modes(0.5, math.nan, 2.3, False)) == ["warning train_eval_mismatch"]


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 0.1])])
def test_neutral_logits_have_the_loss_ln_classes_with_and_without_class_weights(weight):
    outputs, meaning = neutral_outputs("logits", torch.randn(6, 3), torch.arange(6) % 3)
    loss = nn.CrossEntropyLoss(weight)(outputs, torch.arange(6) % 3)
    assert float(loss) == pytest.approx(math.log(3)) and meaning == "3 equal logits"


def test_neutral_rates_are_the_mean_of_the_counts():
    targets = torch.tensor([[1.0], [3.0]])
    outputs, _ = neutral_outputs("log_rates", torch.zeros(2, 1), targets)
    assert outputs.exp().flatten().tolist() == pytest.approx([2, 2])


def test_dependence_is_the_change_of_the_outputs():
    inputs = torch.tensor([[1.0], [3.0]])
    assert dependence(lambda given: given + 1, inputs) == pytest.approx((3 / 4, 2 / 4))
    assert dependence(lambda given: 0 * given + 1, inputs) == (0, 0)
    with torch.no_grad():
        assert dependence(nn.Embedding(4, 2), torch.tensor([1, 2]))[0] is None


def test_distance_compares_classes_and_numbers_and_no_embeddings():
    logits = torch.eye(3)
    assert distance_to_targets(logits, torch.arange(3)) == pytest.approx(
        nn.functional.cross_entropy(logits, torch.arange(3))
    )
    assert distance_to_targets(torch.ones(4, 1), torch.zeros(4, 1)) == 1
    assert distance_to_targets(torch.randn(3, 64), torch.arange(3)) is None


def test_batch_normalisation_evaluates_as_it_trains_with_exact_statistics():
    torch.manual_seed(0)
    layer, inputs = nn.BatchNorm1d(2, momentum=0.001), 5 + torch.randn(512, 2)
    with exact_batch_statistics(layer):
        trained = layer(inputs)
        evaluated = layer.eval()(inputs)
    torch.testing.assert_close(evaluated, trained, rtol=0.01, atol=0.01)
    assert layer.momentum == 0.001


def test_layers_have_their_shapes_dead_units_and_memory():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh())
    nn.init.constant_(network[0].bias, -100)
    nn.init.constant_(network[2].bias, 100)
    with watched(network) as seen:
        network(torch.rand(5, 4))
    assert [(each.kind, each.shape, each.parameters) for each in seen.layers] == [
        ("Linear", (5, 3), 15),
        ("ReLU", (5, 3), 0),
        ("Linear", (5, 2), 8),
        ("Tanh", (5, 2), 0),
    ]
    assert seen.layers[1].dead == 1 and seen.layers[3].saturated == 1
    assert seen.kept_bytes == 4 * (5 * 4 + 5 * 3 + 5 * 2)  # Inputs, outputs of the ReLU and of the tanh.


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 3, 7), (5, 3, 4, 6)], ids=["tokens", "Conv1d", "images"])
def test_dead_units_are_those_of_features(shape):
    outputs = torch.ones(shape)
    outputs.select(shape.index(3), 0).zero_()  # One of three units.
    network = nn.Sequential(nn.ReLU())
    with watched(network) as seen:
        network(outputs)
    assert seen.layers[0].dead == pytest.approx(1 / 3)


def test_parameter_of_the_module_itself_belongs_to_a_module_that_is_called():
    network = nn.Sequential(nn.Linear(2, 2))
    network.scale = nn.Parameter(torch.ones(1))
    with watched(network) as seen:
        network(torch.ones(1, 2))
    assert seen.owner_was_called("scale") and seen.owner_was_called("0.weight")


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    "build",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
            ],
            [3],
        ),
    ],
)
def test_learning_rates_are_those_that_the_scheduler_sets(build, interval):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
    scheduler = build(optimizer)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    from lightning.pytorch.utilities.types import LRSchedulerConfig

    trainer.strategy.optimizers = [optimizer]
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(scheduler, interval=interval)]
    trainer.fit_loop.max_batches = 4
    found = learning_rates(trainer, 12, 13)
    expected = []
    for step in range(13):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if interval == "step" or step % 4 == 3:
            scheduler.step()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.PoissonNLLLoss()],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("targets", [[1.0, 2.0, 9.0], [7.0, 8.0, 9.0], [5.0, 5.0, 5.0]])
def test_sound_regression_loss_is_never_called_flipped(loss, targets):
    task = Regression(nn.Linear(1, 1), loss, torch.optim.SGD, Constant())
    task.target_mean.fill_(3)
    targets = torch.tensor(targets)[:, None]
    neutral, _ = neutral_outputs(task.outputs_are, torch.zeros(3, 1), targets)
    assert judge.judge_direction(pull_to_targets(task, neutral, targets), "loss") == []


def test_batch_without_a_target_that_counts_proves_nothing():
    task = Classification(nn.Linear(1, 3), nn.CrossEntropyLoss(ignore_index=0), torch.optim.SGD, Constant(), classes=3)
    for targets, is_known in (([0, 0], False), ([0, 1], True)):
        pull = pull_to_targets(task, torch.zeros(2, 3), torch.tensor(targets))
        assert math.isnan(pull) != is_known and judge.judge_direction(pull, "loss") == []
