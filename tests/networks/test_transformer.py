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
    """Weights wide enough that every position makes a difference well above rounding."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def padded(sequences, before=0, length=12):
    rows = [[0] * before + row + [0] * (length - before - len(row)) for row in sequences]
    return torch.tensor(rows)


@both_norms
@pytest.mark.parametrize("before", [0, 3])
def test_a_padded_batch_is_classified_as_each_sequence_by_itself(norm, before):
    network = classifier(norm=norm)
    alone = torch.cat([network(torch.tensor([sequence])) for sequence in SEQUENCES])
    torch.testing.assert_close(network(padded(SEQUENCES, before)), alone)


@both_norms
@pytest.mark.parametrize("before", [0, 3])
def test_a_padded_batch_is_continued_as_each_sequence_by_itself(norm, before):
    network = language_model(norm=norm)
    outputs = network(padded(SEQUENCES, before))
    for row, sequence in zip(outputs, SEQUENCES, strict=True):
        alone = network(torch.tensor([sequence]))[0]
        torch.testing.assert_close(row[before : before + len(sequence)], alone)


@both_norms
@pytest.mark.parametrize("network", [classifier, language_model])
def test_a_row_of_padding_alone_gives_finite_outputs_and_gradients(network, norm):
    network = network(norm=norm)
    outputs = network(torch.tensor([[0, 0, 0], [1, 2, 3]]))
    outputs.square().sum().backward()
    assert outputs.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def gradients(network, outputs_of):
    """Norm of the gradient of the outputs that are asked for, with regard to the embedding of each position."""
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
def test_no_position_of_a_language_model_sees_its_future_and_each_sees_its_past(norm, position):
    found = gradients(language_model(norm=norm), lambda outputs: outputs[0, position].square())
    assert (found[: position + 1] > 1e-6).all()
    assert (found[position + 1 :] == 0).all()


def test_a_classifier_sees_every_position():
    assert (gradients(classifier(), lambda outputs: outputs.square()) > 1e-6).all()


def test_the_order_of_the_tokens_makes_a_difference():
    network = classifier()
    outputs = network(torch.tensor([[1, 2, 3, 4], [4, 2, 3, 1]]))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def by_hand(block, x, causal):
    """Attention written out: complex numbers turn the pairs, loops go over heads and queries."""
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
def test_a_block_computes_what_its_formula_says(norm, causal):
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


def test_a_tied_language_model_has_one_tensor_for_its_embedding_and_its_output():
    tied, untied = language_model(), language_model(tied=False)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in (tied, untied)]
    assert count[1] - count[0] == 11 * 16


def test_an_untrained_language_model_is_as_unsure_as_a_uniform_one():
    torch.manual_seed(0)
    tokens = torch.randint(1, 257, (4, 64))
    loss = functional.cross_entropy(TransformerLM()(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(257), rel=0.05)


@pytest.mark.parametrize("network", [classifier, language_model])
def test_dropout_acts_only_while_the_network_trains(network):
    tokens = padded(SEQUENCES)
    dropping, plain = network(dropout=0.5), network()
    assert torch.equal(dropping(tokens), plain(tokens))
    dropping.train()
    assert not torch.equal(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize("network", [classifier, language_model])
def test_a_sequence_above_the_limit_is_refused_in_one_line(network):
    network().forward(torch.ones(1, 12, dtype=torch.int64))
    with pytest.raises(UsageError, match="max_length=12, but was given sequences of 13 tokens") as error:
        network().forward(torch.ones(1, 13, dtype=torch.int64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"width": 12, "heads": 4}, "width=12 and heads=4"),
        ({"layers": 0}, "layers=0"),
        ({"heads": 0}, "heads=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"vocabulary": -1}, "vocabulary=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"out_features": 0}, "out_features=0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(options, found):
    with pytest.raises(UsageError, match=found):
        TransformerClassifier(**{"out_features": 2, **options})
