import pytest
import torch
from torch import nn

from firstlight.errors import UsageError
from firstlight.networks import MLP, EmbeddingNet


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_embedding_is_the_normalised_output_of_the_projection_head():
    network, inputs = EmbeddingNet(MLP(12, [8], 6), features=6, dimensions=3), inputs_of((5, 12))
    first, _, last = network.head
    hidden = (network.backbone(inputs) @ first.weight.T + first.bias).clamp(min=0)
    outputs = hidden @ last.weight.T + last.bias
    embeddings = network(inputs)
    torch.testing.assert_close(embeddings, outputs / outputs.square().sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_gradient_reaches_the_backbone():
    network = EmbeddingNet(nn.Linear(4, 6), features=6, dimensions=3)
    network(inputs_of((5, 4)))[:, 0].sum().backward()
    assert network.backbone.weight.grad.any()


@pytest.mark.parametrize(
    ("features", "dimensions", "message"),
    [
        (0, 2, "EmbeddingNet was given features=0: it must be at least 1"),
        (6, 1, "EmbeddingNet was given dimensions=1: it must be at least 2"),
    ],
)
def test_sizes_that_are_too_small_are_refused(features, dimensions, message):
    with pytest.raises(UsageError) as error:
        EmbeddingNet(nn.Linear(4, 6), features, dimensions)
    assert str(error.value) == message
