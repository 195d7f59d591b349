import pytest
import torch

from firstlight.errors import UsageError
from firstlight.networks import NgramClassifier

TEXTS = [[3, 4, 5, 6, 7, 8, 256], [10], [5, 5, 5], [1, 2, 3, 4], [10, 256]]


def network(**options):
    torch.manual_seed(0)
    return NgramClassifier(**{"out_features": 3, "lengths": [1, 2, 4], "buckets": 50, "width": 8, **options}).eval()


def padded(texts, before=0, length=12):
    return torch.tensor([[0] * before + text + [0] * (length - before - len(text)) for text in texts])


def by_hand(network, text):
    """Return the outputs for a list of tokens, from a loop over its n-grams."""
    rows = []
    for length in network.lengths:
        for start in range(len(text) - length + 1):
            digits = text[start : start + length]
            code = sum(digit * 48_271 ** (length - 1 - index) for index, digit in enumerate(digits))
            rows.append(code % (2**31 - 1) % network.buckets + 1)
    table = network.embedding.weight.double()
    mean = table[rows].mean(0)
    return network.output.weight.double() @ mean + network.output.bias.double()


@pytest.mark.parametrize("lengths", [[1], [1, 3], [1, 2, 4], [5, 1]])
@pytest.mark.parametrize("buckets", [1, 50, 2**14])
def test_outputs_equal_a_loop_over_the_ngrams(lengths, buckets):
    made = network(lengths=lengths, buckets=buckets)
    outputs = made(padded(TEXTS))
    for row, text in zip(outputs, TEXTS, strict=True):
        torch.testing.assert_close(row.double(), by_hand(made, text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [0, 3])
def test_padding_does_not_change_the_outputs(before):
    made = network()
    alone = torch.cat([made(torch.tensor([text])) for text in TEXTS])
    torch.testing.assert_close(made(padded(TEXTS, before)), alone, rtol=0, atol=1e-7)


def test_ngrams_with_padding_between_tokens_do_not_count():
    made = network(lengths=[2])
    torch.testing.assert_close(made(torch.tensor([[7, 8, 0, 9]])), made(torch.tensor([[7, 8]])))


def test_text_shorter_than_every_ngram_has_the_outputs_of_an_empty_text():
    made = network(lengths=[3])
    assert torch.equal(made(torch.tensor([[7, 8, 0], [0, 0, 0]])), made.output.bias.expand(2, 3))
    assert torch.equal(made(torch.tensor([[7]])), made.output.bias[None])


def test_padding_gets_no_gradient_and_each_ngram_gets_its_share():
    made = network(lengths=[1], buckets=2**14)
    made(torch.tensor([[5, 5, 9, 0, 0]])).sum().backward()
    gradient = made.embedding.weight.grad
    assert gradient.any(1).nonzero().flatten().tolist() == [6, 10]
    torch.testing.assert_close(gradient[6], 2 * gradient[10])
    torch.testing.assert_close(gradient[10], made.output.weight.sum(0) / 3)


def test_large_tokens_are_hashed_exactly():
    text = [2**31 + 5, 70_000, 2**40]
    made = network(lengths=[3], buckets=1000)
    torch.testing.assert_close(made(torch.tensor([text]))[0].double(), by_hand(made, text), rtol=1e-5, atol=1e-6)


def test_buckets_are_used_evenly():
    ngrams = NgramClassifier(2, lengths=[3], buckets=100).hash(torch.randint(1, 257, (1000, 102)))
    counts = ngrams[:, :100].flatten().bincount(minlength=101)
    assert counts[0] == 0 and counts[1:].min() > 800 and counts.max() < 1200


def test_exported_network_takes_batches_and_texts_of_any_size():
    made = network()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    exported = torch.export.export(made, (padded(TEXTS),), dynamic_shapes=(sizes,)).module()
    for batch, length in ((1, 1), (1, 9), (3, 2), (7, 40)):
        tokens = torch.randint(0, 300, (batch, length))
        torch.testing.assert_close(exported(tokens), made(tokens))  # The exported form adds in another order.


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"lengths": [2, 0]}, r"lengths=\[2, 0\]: each must be at least 1"),
        ({"lengths": []}, r"lengths=\[\]: give at least one length"),
        ({"buckets": 0}, "NgramClassifier was given buckets=0: it must be at least 1"),
        ({"width": 0}, "width=0"),
        ({"out_features": 0}, "out_features=0"),
        ({"dropout": 1.0}, r"dropout=1.0: it must be in \[0, 1\)"),
    ],
)
def test_invalid_arguments_are_refused_by_name(options, found):
    with pytest.raises(UsageError, match=found):
        network(**options)
