import inspect
import math

import pytest
import torch
from pytorch_metric_learning import losses as reference
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn

import firstlight.losses
from firstlight.errors import UsageError
from firstlight.losses import (
    ContrastiveLoss,
    SupervisedContrastiveLoss,
    contrastive_loss,
    supervised_contrastive_loss,
)

LOSSES = [
    loss
    for name in firstlight.losses.__all__
    if inspect.isclass(loss := getattr(firstlight.losses, name))
    and list(inspect.signature(loss.forward).parameters) == ["self", "embeddings", "labels"]
]
"""The losses that compare embeddings."""
BATCHES = {
    "several samples per label": [0, 1, 2, 0, 1, 2, 0, 0, 1],
    "some labels once": [0, 1, 2, 3, 0, 1],
    "one pair": [0, 0, 1],
}

every_embedding_loss = pytest.mark.parametrize("loss", LOSSES)
every_batch = pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)


def embeddings_of(labels, dtype=torch.float64, scale=0.4):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(len(labels), 5, dtype=dtype, generator=generator)).requires_grad_()


def value_and_gradient(loss, embeddings, labels):
    value = loss(embeddings, torch.tensor(labels))
    return value, torch.autograd.grad(value, embeddings)[0]


class HalfSquares(MeanReducer):
    """Turn the distance `d` that the reference charges for a pair into the paper's `d**2 / 2`."""

    def element_reduction(self, losses, *args):
        return super().element_reduction(losses.square() / 2, *args)


@every_batch
@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_contrastive_loss_equals_the_reference(labels, margin):
    embeddings = embeddings_of(labels)
    theirs = reference.ContrastiveLoss(
        neg_margin=margin, distance=LpDistance(normalize_embeddings=False), reducer=HalfSquares()
    )
    torch.testing.assert_close(
        value_and_gradient(ContrastiveLoss(margin), embeddings, labels), value_and_gradient(theirs, embeddings, labels)
    )


@every_batch
@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_supervised_contrastive_loss_equals_the_reference(labels, temperature):
    embeddings = embeddings_of(labels)
    ours, theirs = SupervisedContrastiveLoss(temperature), reference.SupConLoss(temperature)
    torch.testing.assert_close(
        value_and_gradient(ours, embeddings, labels), value_and_gradient(theirs, embeddings, labels)
    )


def test_contrastive_loss_equals_equation_4_summed_over_pairs():
    labels, margin = BATCHES["some labels once"], 0.9
    embeddings = embeddings_of(labels).detach()
    equal, unequal = [], []
    for i in range(len(labels)):
        for j in range(i):
            distance = torch.linalg.vector_norm(embeddings[i] - embeddings[j]).item()
            if labels[i] == labels[j]:
                equal.append(distance**2 / 2)
            else:
                unequal.append(max(0, margin - distance) ** 2 / 2)
    expected = sum(equal) / len(equal) + sum(unequal) / len(unequal)
    assert contrastive_loss(embeddings, torch.tensor(labels), margin).item() == pytest.approx(expected)


def test_supervised_contrastive_loss_equals_equation_2_summed_over_samples():
    labels, temperature = BATCHES["some labels once"], 0.3
    embeddings = embeddings_of(labels).detach()
    directions = embeddings / embeddings.norm(dim=1, keepdim=True)
    per_sample = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        total = sum((directions[i] @ directions[j] / temperature).exp() for j in others)
        of_label = [(directions[i] @ directions[j] / temperature).exp() / total for j in others if labels[j] == label]
        if of_label:
            per_sample.append(-sum(p.log() for p in of_label) / len(of_label))
    found = supervised_contrastive_loss(embeddings, torch.tensor(labels), temperature)
    torch.testing.assert_close(found, sum(per_sample) / len(per_sample))


@every_embedding_loss
@every_batch
def test_gradient_equals_finite_differences(loss, labels):
    function, labels = loss(), torch.tensor(labels)
    assert torch.autograd.gradcheck(lambda embeddings: function(embeddings, labels), embeddings_of(labels))


DEGENERATE = {
    "no equal labels": (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3]),
    "one label only": (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [2, 2, 2, 2]),
    "one sample": (torch.ones(1, 3), [0]),
    "identical embeddings": (torch.ones(4, 3), [0, 0, 1, 1]),
    "embeddings of zero": (torch.zeros(4, 3), [0, 0, 1, 1]),
    "large embeddings": (1e4 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1]),
}


@every_embedding_loss
@pytest.mark.parametrize(("embeddings", "labels"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_batches_have_a_finite_loss_and_gradient(loss, embeddings, labels):
    value, gradient = value_and_gradient(loss(), embeddings.clone().requires_grad_(), labels)
    assert value.isfinite() and value >= 0
    assert gradient.isfinite().all()


def test_small_temperature_does_not_overflow():
    labels = BATCHES["some labels once"]
    value, gradient = value_and_gradient(SupervisedContrastiveLoss(1e-3), embeddings_of(labels, torch.float32), labels)
    assert value.isfinite() and gradient.isfinite().all()
    exact, _ = value_and_gradient(
        SupervisedContrastiveLoss(1e-3), embeddings_of(labels, torch.float32).double(), labels
    )
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)


@every_embedding_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(loss, dtype):
    labels = BATCHES["several samples per label"]
    halves = embeddings_of(labels).detach().to(dtype).requires_grad_()
    value, gradient = value_and_gradient(loss(), halves, labels)
    expected, wanted = value_and_gradient(loss(), halves.detach().float().requires_grad_(), labels)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, wanted.to(dtype))


@every_embedding_loss
def test_autocast_does_not_change_the_loss(loss):
    labels = BATCHES["several samples per label"]
    embeddings = embeddings_of(labels, torch.float32)
    expected, wanted = value_and_gradient(loss(), embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()(embeddings, torch.tensor(labels))
    (gradient,) = torch.autograd.grad(value, embeddings)
    assert torch.equal(value, expected) and torch.equal(gradient, wanted)


@every_embedding_loss
def test_compiled_loss_equals_the_eager_one(loss):
    function = loss()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for labels in BATCHES.values():
        embeddings = embeddings_of(labels)
        torch.testing.assert_close(
            value_and_gradient(compiled, embeddings, labels), value_and_gradient(function, embeddings, labels)
        )


# With eight samples of a label, the seven others share the probability.
@pytest.mark.parametrize(("loss", "least"), [(ContrastiveLoss, 0), (SupervisedContrastiveLoss, math.log(7))])
def test_training_comes_close_to_the_minimum_of_the_loss(loss, least):
    labels = torch.arange(4).repeat(8)
    torch.manual_seed(0)
    inputs = nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(32, 4)
    network, function = nn.Linear(4, 2), loss()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    start = function(network(inputs), labels).item()
    for _ in range(100):
        optimizer.zero_grad()
        value = function(network(inputs), labels)
        value.backward()
        optimizer.step()
    assert least <= value.item() < least + 0.2 * (start - least)


@every_embedding_loss
@pytest.mark.parametrize("shapes", [((4, 3), (4, 1)), ((4, 3), (3,)), ((4, 3, 2), (4,)), ((4,), (4,))])
def test_mismatched_shapes_are_refused(loss, shapes):
    embeddings, labels = (torch.ones(shape) for shape in shapes)
    with pytest.raises(UsageError, match=r"they must be \(B, D\) and \(B,\)"):
        loss()(embeddings, labels)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_options_outside_their_range_are_refused(value):
    with pytest.raises(UsageError, match=f"ContrastiveLoss was given margin={value}: it must be above 0"):
        ContrastiveLoss(value)
    with pytest.raises(
        UsageError, match=f"SupervisedContrastiveLoss was given temperature={value}: it must be above 0"
    ):
        SupervisedContrastiveLoss(value)
