import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import text

from firstlight.errors import UsageError
from firstlight.networks import TransformerLM
from firstlight.tasks import LanguageModel
from firstlight.tasks.language_model import BitsPerByte, Perplexity
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


def test_a_split_is_scored_by_the_mean_over_its_scored_tokens(tmp_path):
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
def test_perplexity_is_that_of_the_likelihood_whatever_the_loss_is(loss):
    task = make(loss=loss)
    for batch in batches():
        task.shared_step(batch, task.val_metrics)
    nats = [value for batch in batches() for value in surprises(task, *batch)]
    assert task.val_metrics.compute()["val/perplexity"].item() == pytest.approx(
        math.exp(sum(nats) / len(nats)), rel=1e-5
    )


def test_a_batch_of_which_nothing_is_scored_costs_nothing():
    bits = BitsPerByte()
    bits.update(torch.tensor([math.nan, 2.0]), torch.tensor([0, 3]))
    assert bits.compute().item() == pytest.approx(2 / math.log(2))


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
    assert task.val_metrics.metrics.compute_groups == {0: ["bits_per_byte", "perplexity"]}


def test_perplexity_equals_that_of_torchmetrics():
    logits, targets = torch.randn(4, 6, 7), torch.randint(0, 7, (4, 6))
    own, bits, reference = Perplexity(), BitsPerByte(), text.Perplexity(ignore_index=0)
    for part in (slice(0, 1), slice(1, 4)):
        flat = targets[part].flatten()
        nats = nn.functional.cross_entropy(logits[part].flatten(0, 1), flat, ignore_index=0)
        for metric in (own, bits):
            metric.update(nats[None], (flat != 0).sum()[None])
        reference.update(logits[part], targets[part])
    torch.testing.assert_close(own.compute(), reference.compute())
    torch.testing.assert_close(bits.compute(), reference.compute().log2())


def test_a_token_that_was_held_impossible_costs_its_bits_and_not_infinity():
    task = make()
    with torch.no_grad():
        task.network.weight.zero_()[:, 2] = 200.0
    task.shared_step((torch.tensor([[3]]), torch.tensor([[1]])), task.val_metrics)
    assert task.val_metrics.compute()["val/bits_per_byte"].item() == pytest.approx(200 / math.log(2))


def test_a_prediction_is_what_each_sequence_costs():
    task = make()
    tokens, targets = batches()[0]
    targets[0] = torch.tensor([1, 0, 2, 3, 0])
    found = task.predict_step((tokens, targets), 0)
    nats = [surprises(task, row, target) for row, target in zip(tokens, targets, strict=True)]
    assert found["bytes"].tolist() == [3, 1, 1]
    expected = [sum(row) / len(row) / math.log(2) for row in nats]
    assert found["bits_per_byte"].tolist() == pytest.approx(expected, rel=1e-5)


def test_fitting_samples_pass_the_check_and_the_task_goes_on_as_it_was():
    task = make(network=TransformerLM(vocabulary=VOCABULARY, width=16, dropout=0.5)).train()
    tokens, targets = batches()[1]
    task.check((tokens[:3], targets[:3]), targets)
    assert task.training


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"network": Bigrams(out=5)}, "Bigrams has a vocabulary of 5, so tokens are 0 to 4, but there is a token 8"),
        ({"network": Bigrams(vocabulary=5)}, "Bigrams cannot take samples of shape .*: index out of range"),
        ({"network": nn.Sequential(Bigrams(), nn.Flatten())}, r"Sequential gives outputs of shape \(2, 72\)"),
        ({"network": nn.Linear(8, 9)}, r"Linear cannot take samples of shape \(8,\)"),
        ({"loss": nn.CrossEntropyLoss()}, "CrossEntropyLoss scores targets that are 0.*ignore_index=0"),
        ({"network": TransformerLM(max_length=7)}, "sequences of 8 tokens: they must have at most max_length=7"),
    ],
)
def test_samples_that_do_not_fit_are_refused_in_one_line(changes, found):
    tokens, targets = batches()[1]
    tokens[0, 0] = targets[0, 0] = VOCABULARY - 1
    with pytest.raises(UsageError, match=found) as error:
        make(**changes).check((tokens, targets), targets)
    assert "\n" not in str(error.value)


def test_a_token_that_no_checked_row_holds_is_refused_too():
    tokens = torch.ones(50, 3, dtype=torch.int64)
    targets = tokens.clone()
    targets[49, 2] = VOCABULARY
    with pytest.raises(UsageError, match=f"there is a token {VOCABULARY}"):
        make().check((tokens[:3], targets[:3]), targets)
