import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from firstlight.errors import UsageError
from firstlight.networks import TransformerClassifier, TransformerLM
from firstlight.networks.transformer import EncoderBlock

SMALL = {"vocabulary": 11, "width": 16, "layers": 2, "heads": 2, "max_length": 12}
SEQUENCES = [[3, 4, 5, 6, 7, 8, 9], [10], [5, 5, 5], [1, 2, 3, 4]]

both_norms = pytest.mark.parametrize("norm", ["pre", "post"])


def classifier(**options):
    torch.manual_seed(0)
    return spread(TransformerClassifier(out_features=3, **SMALL, **options)).eval()


def language_model(**options):
    torch.manual_seed(0)
    return spread(TransformerLM(**SMALL, **options)).eval()


def spread(network):
    """Draw weights so large that every position changes the outputs by more than rounding."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def padded(sequences, before=0, length=12):
    rows = [[0] * before + row + [0] * (length - before - len(row)) for row in sequences]
    return torch.tensor(rows)


@both_norms
@pytest.mark.parametrize("before", [0, 3])
def test_padding_does_not_change_classifier_outputs(norm, before):
    network = classifier(norm=norm)
    alone = torch.cat([network(torch.tensor([sequence])) for sequence in SEQUENCES])
    torch.testing.assert_close(network(padded(SEQUENCES, before)), alone)


@both_norms
@pytest.mark.parametrize("before", [0, 3])
def test_padding_does_not_change_language_model_outputs(norm, before):
    network = language_model(norm=norm)
    outputs = network(padded(SEQUENCES, before))
    for row, sequence in zip(outputs, SEQUENCES, strict=True):
        alone = network(torch.tensor([sequence]))[0]
        torch.testing.assert_close(row[before : before + len(sequence)], alone)


@both_norms
@pytest.mark.parametrize("network", [classifier, language_model])
def test_row_of_only_padding_gives_finite_outputs_and_gradients(network, norm):
    network = network(norm=norm)
    outputs = network(torch.tensor([[0, 0, 0], [1, 2, 3]]))
    outputs.square().sum().backward()
    assert outputs.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def gradients(network, outputs_of):
    """Return for each position the norm of the gradient of the selected outputs with respect to its embedding."""
    seen = {}

    def keep(module, inputs, outputs):
        outputs.retain_grad()
        seen["embedded"] = outputs

    handle = network.embedding.register_forward_hook(keep)
    outputs_of(network(torch.tensor([[1, 2, 3, 4, 5, 6]]))).sum().backward()
    handle.remove()
    return seen["embedded"].grad[0].norm(dim=-1)


@both_norms
@pytest.mark.parametrize("position", range(6))
def test_language_model_attends_to_the_past_and_never_to_the_future(norm, position):
    found = gradients(language_model(norm=norm), lambda outputs: outputs[0, position].square())
    assert (found[: position + 1] > 1e-6).all()
    assert (found[position + 1 :] == 0).all()


def test_classifier_attends_to_every_position():
    assert (gradients(classifier(), lambda outputs: outputs.square()) > 1e-6).all()


def test_order_of_the_tokens_changes_the_outputs():
    network = classifier()
    outputs = network(torch.tensor([[1, 2, 3, 4], [4, 2, 3, 1]]))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def by_hand(block, x, causal):
    """Compute attention with complex rotations and loops over heads and queries."""
    batch, length, width = x.shape
    size = width // block.heads
    projected = functional.linear(x, block.attention_inputs.weight, block.attention_inputs.bias)
    read = torch.zeros(batch, length, width)
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    for head in range(block.heads):
        columns = slice(head * size, (head + 1) * size)
        queries, keys, values = (part[..., columns] for part in projected.split(width, dim=-1))
        queries, keys = (torch.complex(*part.chunk(2, dim=-1)) * turn for part in (queries, keys))
        for query in range(length):
            last = query + 1 if causal else length
            scores = (queries[:, query : query + 1] * keys[:, :last].conj()).real.sum(-1) / math.sqrt(size)
            read[:, query, columns] = (scores.softmax(-1)[..., None] * values[:, :last]).sum(1)
    return functional.linear(read, block.attention_output.weight, block.attention_output.bias)


@both_norms
@pytest.mark.parametrize("causal", [True, False])
def test_encoder_block_equals_its_formula(norm, causal):
    torch.manual_seed(0)
    block = spread(EncoderBlock(width=8, heads=2, hidden=20, dropout=0.5, norm=norm)).eval()
    x = torch.randn(3, 5, 8)
    network = TransformerLM(width=8, heads=2)
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    outputs = block(x, (network.cosine[:5], network.sine[:5]), visible.tril() if causal else visible)
    first, second = block.attention_norm, block.feed_forward_norm
    feed_forward = nn.Sequential(block.hidden, nn.GELU(), block.hidden_output)
    if norm == "post":
        middle = first(by_hand(block, x, causal) + x)
        expected = second(feed_forward(middle) + middle)
    else:
        middle = x + by_hand(block, first(x), causal)
        expected = middle + feed_forward(second(middle))
    torch.testing.assert_close(outputs, expected)


def test_tied_language_model_shares_one_tensor_between_embedding_and_output():
    tied, untied = language_model(), language_model(tied=False)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in (tied, untied)]
    assert count[1] - count[0] == 11 * 16


def test_untrained_language_model_has_the_loss_of_a_uniform_distribution():
    torch.manual_seed(0)
    tokens = torch.randint(1, 257, (4, 64))
    loss = functional.cross_entropy(TransformerLM()(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(257), rel=0.05)


@pytest.mark.parametrize("network", [classifier, language_model])
def test_dropout_is_applied_only_in_training_mode(network):
    tokens = padded(SEQUENCES)
    dropping, plain = network(dropout=0.5), network()
    assert torch.equal(dropping(tokens), plain(tokens))
    dropping.train()
    assert not torch.equal(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize("network", [classifier, language_model])
def test_sequence_longer_than_max_length_is_refused_in_one_line(network):
    network().forward(torch.ones(1, 12, dtype=torch.int64))
    with pytest.raises(UsageError, match="sequences of 13 tokens: they must have at most max_length=12") as error:
        network().forward(torch.ones(1, 13, dtype=torch.int64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"width": 12, "heads": 4}, "width=12 and heads=4: width must be a multiple of 2 \\* heads, which is 8"),
        ({"layers": 0}, "layers=0"),
        ({"heads": 0}, "heads=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"vocabulary": -1}, "vocabulary=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"dropout": 1.0}, r"TransformerClassifier was given dropout=1.0: it must be in \[0, 1\)"),
        ({"norm": "per"}, r"norm=per: it must be one of pre, post"),
        ({"out_features": 0}, "out_features=0"),
    ],
)
def test_invalid_arguments_are_refused_by_name(options, found):
    with pytest.raises(UsageError, match=found):
        TransformerClassifier(**{"out_features": 2, **options})
