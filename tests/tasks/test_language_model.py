import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from firstlight.errors import UsageError
from firstlight.networks import TransformerLM
from firstlight.preflight.probe import probe
from firstlight.tasks import LanguageModel
from tests.tasks.helpers import parts, trainer

VOCABULARY = 9


class Bigrams(nn.Embedding):
    """The least language model: a row of logits for each token."""

    def __init__(self, vocabulary=VOCABULARY, out=VOCABULARY):
        super().__init__(vocabulary, out)


def make(**changes):
    torch.manual_seed(0)
    given = parts(Bigrams(), nn.CrossEntropyLoss(ignore_index=0), lr=0.1)
    return LanguageModel(**{**given, **changes})


def batches():
    """Batches of other lengths and other numbers of scored tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for shape, scored in (((3, 5), 1), ((2, 8), 8), ((1, 4), 2)):
        tokens = torch.randint(1, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
        inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
        targets[:, scored:] = 0
        made.append((inputs, targets))
    return made


def surprises(task, tokens, targets):
    """Nats of each scored token, one by one."""
    rows = zip(tokens.flatten().tolist(), targets.flatten().tolist(), strict=True)
    weight = task.network.weight.detach().double()
    return [-weight[token].log_softmax(0)[target].item() for token, target in rows if target]


def test_metrics_of_a_split_are_means_over_its_scored_tokens(tmp_path):
    task = make()
    (found,) = trainer(tmp_path).validate(task, DataLoader(batches(), batch_size=None), verbose=False)
    nats = [value for batch in batches() for value in surprises(task, *batch)]
    mean = sum(nats) / len(nats)
    assert len(nats) == 3 + 16 + 2
    assert found["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["val/bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.3),
        nn.CrossEntropyLoss(ignore_index=0, weight=torch.linspace(0.5, 2, VOCABULARY)),
        nn.CrossEntropyLoss(ignore_index=0, reduction="sum"),
    ],
)
def test_perplexity_is_computed_from_the_likelihood_with_any_loss(loss):
    task = make(loss=loss)
    for batch in batches():
        task.shared_step(batch, task.val_metrics)
    nats = [value for batch in batches() for value in surprises(task, *batch)]
    assert task.val_metrics.compute()["val/perplexity"].item() == pytest.approx(
        math.exp(sum(nats) / len(nats)), rel=1e-5
    )


def test_training_logs_the_same_metrics_and_learns(tmp_path):
    task, run = make(), trainer(tmp_path, max_epochs=30)
    before = sum(surprises(task, *batches()[1]))
    loader = DataLoader(batches(), batch_size=None)
    run.fit(task, loader, loader)
    assert {"train/loss", "train/perplexity", "train/bits_per_byte"} <= run.callback_metrics.keys()
    assert sum(surprises(task, *batches()[1])) < 0.7 * before


def test_the_metrics_share_their_sums():
    task = make()
    task.shared_step(batches()[0], task.val_metrics)
    task.val_metrics.compute()
    assert task.val_metrics._metrics.compute_groups == {0: ["bits_per_byte", "perplexity"]}


def test_a_token_with_probability_zero_in_float32_has_finite_bits():
    task = make()
    with torch.no_grad():
        task.network.weight.zero_()[:, 2] = 200.0
    task.shared_step((torch.tensor([[3]]), torch.tensor([[1]])), task.val_metrics)
    assert task.val_metrics.compute()["val/bits_per_byte"].item() == pytest.approx(200 / math.log(2))


def test_prediction_holds_the_bits_of_each_sequence():
    task = make()
    tokens, targets = batches()[0]
    targets[0] = torch.tensor([1, 0, 2, 3, 0])
    found = task.predict_step((tokens, targets), 0)
    nats = [surprises(task, row, target) for row, target in zip(tokens, targets, strict=True)]
    assert found["bytes"].tolist() == [3, 1, 1]
    expected = [sum(row) / len(row) / math.log(2) for row in nats]
    assert found["bits_per_byte"].tolist() == pytest.approx(expected, rel=1e-5)


def test_probe_accepts_good_samples_and_keeps_the_mode():
    task = make(network=TransformerLM(vocabulary=VOCABULARY, width=16, dropout=0.5)).train()
    tokens, targets = batches()[1]
    probe(task, (tokens[:3], targets[:3]), targets)
    assert task.training


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"network": Bigrams(out=5)},
            "Bigrams has a vocabulary of 5, so tokens must be 0 to 4.*token 8",
        ),
        ({"network": Bigrams(vocabulary=5)}, "Bigrams cannot take samples of shape .*: index out of range"),
        ({"network": nn.Sequential(Bigrams(), nn.Flatten())}, r"Sequential returns outputs of shape \(2, 72\)"),
        ({"network": nn.Linear(8, 9)}, r"Linear cannot take samples of shape \(8,\)"),
        ({"loss": nn.CrossEntropyLoss()}, "CrossEntropyLoss scores targets that are 0.*ignore_index=0"),
        ({"network": TransformerLM(max_length=7)}, "sequences of 8 tokens: they must have at most max_length=7"),
    ],
)
def test_probe_refuses_wrong_samples_in_one_line(changes, found):
    tokens, targets = batches()[1]
    tokens[0, 0] = targets[0, 0] = VOCABULARY - 1
    with pytest.raises(UsageError, match=found) as error:
        probe(make(**changes), (tokens, targets), targets)
    assert "\n" not in str(error.value)


def test_probe_checks_the_tokens_of_all_rows():
    tokens = torch.ones(50, 3, dtype=torch.int64)
    targets = tokens.clone()
    targets[49, 2] = VOCABULARY
    with pytest.raises(UsageError, match=f"there is a token {VOCABULARY}"):
        probe(make(), (tokens[:3], targets[:3]), targets)
