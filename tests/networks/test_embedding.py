import pytest
import torch
from torch import nn

from firstlight.errors import UsageError
from firstlight.networks import MLP, EmbeddingNet


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_an_embedding_is_linear_relu_linear_of_the_backbone_scaled_to_length_one():
    network, inputs = EmbeddingNet(MLP(12, [8], 6), features=6, dimensions=3), inputs_of((5, 12))
    first, _, last = network.head
    hidden = (network.backbone(inputs) @ first.weight.T + first.bias).clamp(min=0)
    outputs = hidden @ last.weight.T + last.bias
    embeddings = network(inputs)
    torch.testing.assert_close(embeddings, outputs / outputs.square().sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_the_backbone_learns_with_the_head():
    network = EmbeddingNet(nn.Linear(4, 6), features=6, dimensions=3)
    network(inputs_of((5, 4)))[:, 0].sum().backward()
    assert network.backbone.weight.grad.any()


@pytest.mark.parametrize(
    ("features", "dimensions", "message"),
    [
        (0, 2, "EmbeddingNet was given features=0: it is at least 1"),
        (6, 1, "EmbeddingNet was given dimensions=1: an embedding has at least 2"),
    ],
)
def test_numbers_that_are_too_small_are_refused(features, dimensions, message):
    with pytest.raises(UsageError) as error:
        EmbeddingNet(nn.Linear(4, 6), features, dimensions)
    assert str(error.value) == message
