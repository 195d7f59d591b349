"""What is measured before the first step tells the end of a network, the aim of its loss, and what data can tell."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from firstlight.callbacks.facts.data import _PENALTIES, _kernel, of_order, of_relation
from firstlight.callbacks.facts.losses import of_first_loss, of_loss, of_path, of_token_offset
from firstlight.callbacks.facts.outputs import of_head
from firstlight.networks import MLP, TransformerLM
from firstlight.schedules import Constant
from firstlight.tasks import BinaryClassification, Classification, LanguageModel, Regression, Task
from tests.callbacks.test_insight import Foreign, fit

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
SGD = partial(torch.optim.SGD, lr=0.1)


class DropsAlways(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        return F.dropout(self.last(inputs), 0.5)


class Ends(nn.Module):
    def __init__(self, function, outputs=3):
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, outputs)
        self.function = function

    def forward(self, inputs):
        return self.function(self.last(self.hidden(inputs).relu()))


class Loss(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, outputs, targets):
        return self.function(outputs, targets)


@pytest.mark.parametrize(
    ("function", "head"),
    [
        (lambda outputs: outputs, "linear"),
        (lambda outputs: 100 * outputs - 3, "linear"),
        (lambda outputs: outputs.softmax(1) + 1e-7, "probabilities"),
        (lambda outputs: outputs.log_softmax(1), "log-probabilities"),
        (lambda outputs: 1 / (1 + (-outputs).exp()), "in [0, 1]"),
        (lambda outputs: outputs.clamp(min=0) + 1e-7, "non-negative"),
        (lambda outputs: outputs / (1 + outputs.abs()), "in [-1, 1]"),
        (F.gelu, "at least -1"),
        (F.logsigmoid, "at most 1"),
        (lambda outputs: outputs**3, "logits"),
        (lambda outputs: 0.5 * outputs.tanh() - 1, "logits"),
    ],
)
def test_the_range_of_a_function_after_the_last_layer_is_seen_whatever_its_code(function, head):
    network = Ends(function)
    assert of_head(network, INPUTS) == {"head": head}
    nn.init.zeros_(network.last.weight)
    assert of_head(network, INPUTS) == {"head": head}


def test_the_path_of_a_loss_names_what_lies_between_it_and_the_last_layer():
    targets = torch.arange(16) % 3
    twice = of_path(F.cross_entropy(Ends(lambda outputs: outputs.softmax(1))(INPUTS), targets))
    assert twice == {"loss_path": ["NllLoss", "LogSoftmax", "Softmax"], "loss_broadcasts": False}
    assert of_path(F.nll_loss(Ends(lambda outputs: outputs)(INPUTS), targets))["loss_path"] == ["NllLoss"]


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_compares_each_output_with_all_targets_is_seen():
    outputs, targets = Ends(lambda outputs: outputs, 1)(INPUTS), INPUTS[:, 0]
    assert of_path((outputs - targets).square().mean())["loss_broadcasts"]
    assert of_path(F.mse_loss(outputs, targets))["loss_broadcasts"]
    assert not of_path(F.mse_loss(outputs, targets[:, None]))["loss_broadcasts"]
    mean, _ = Ends(lambda outputs: outputs, 2)(INPUTS).unbind(1)
    assert of_path((mean - targets[:, None]).square().mean())["loss_broadcasts"]
    assert not of_path((mean - targets).square().mean())["loss_broadcasts"]
    assert not of_path((outputs - outputs.T - (targets[:, None] - targets)).square().mean())["loss_broadcasts"]


def test_a_first_loss_is_recognised_by_its_value():
    outputs = Ends(lambda outputs: outputs)(INPUTS)
    targets = torch.arange(16) % 3
    found = of_first_loss(F.cross_entropy(outputs, targets), outputs, targets, targets)
    assert found["loss_is"] == "cross_entropy" and found["raises_right_output"] == 1
    shares = torch.tensor([6, 5, 5]) / 16
    assert found["chance_loss"] == pytest.approx(float(-(shares * shares.log()).sum()))
    flipped = of_first_loss(-F.cross_entropy(outputs, targets), outputs, targets, targets)
    assert flipped["loss_is"] is None and flipped["raises_right_output"] == 0
    numbers = 3 + INPUTS[:, :3]
    found = of_first_loss(F.mse_loss(outputs, numbers), outputs, numbers, numbers)
    assert found["loss_is"] == "mse_loss"
    assert found["chance_loss"] == pytest.approx(float(numbers.var(0, correction=0).mean()))


def task(kind, loss):
    outputs = 4 if kind is Classification else 1
    options = {"classes": 4} if kind is Classification else {}
    return kind(network=MLP(4, [4], outputs), optimizer=SGD, schedule=Constant(), loss=loss, **options)


def focal(negative):
    return -((1 + negative) ** 2 * (-negative).log()).mean()


SOUND = {
    "cross-entropy": (Classification, nn.CrossEntropyLoss()),
    "smoothed": (Classification, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "likelihood": (Classification, nn.NLLLoss()),
    "focal": (Classification, Loss(lambda o, t: focal(F.nll_loss(o.softmax(1), t, reduction="none")))),
    "one-hot squares": (Classification, Loss(lambda o, t: (o - F.one_hot(t, 4)).square().mean())),
    "binary": (BinaryClassification, nn.BCEWithLogitsLoss()),
    "probabilities": (BinaryClassification, nn.BCELoss()),
    "squares": (Regression, nn.MSELoss()),
    "absolute": (Regression, nn.L1Loss()),
}
WRONG = {
    "squared index": (Classification, Loss(lambda o, t: (o - t[:, None]).square().mean()), "loss_fit"),
    "flipped": (Classification, Loss(lambda o, t: -F.cross_entropy(o, t)), "loss_fit"),
    "absolute one-hot": (Classification, Loss(lambda o, t: (o - F.one_hot(t, 4)).abs().mean()), "loss_ranks"),
    "without log-softmax": (Classification, Loss(lambda o, t: F.nll_loss(o, t)), "loss_ranks"),
    "mean of a batch": (BinaryClassification, Loss(lambda o, t: (o.mean() - t.mean()).square()), "loss_pairs"),
    "broadcast": (Regression, Loss(lambda o, t: (o - t.T).square().mean()), "loss_pairs"),
    "classes of numbers": (Regression, Loss(F.binary_cross_entropy_with_logits), "loss_fit"),
}


def aim(kind, loss):
    if kind is Regression:
        module, name, targets = task(kind, loss), "regression", INPUTS[:, :1]
        module.target_mean, module.target_std = torch.zeros(1), torch.ones(1)
    elif kind is Classification:
        module, name, targets = task(kind, loss), "classification", torch.arange(16) % 4
    else:
        module, name, targets = task(kind, loss), "binary", (INPUTS[:, :1] > 0).float()
    return of_loss(module, name, targets, 4 if kind is Classification else 1)


@pytest.mark.parametrize(("kind", "loss"), SOUND.values(), ids=SOUND)
def test_free_outputs_become_right_by_a_sound_loss(kind, loss):
    found = aim(kind, loss)
    assert found["loss_fit"] > 0.98 and found["loss_pairs"]
    assert found["loss_ranks"] == (1 if kind is Classification else None)


@pytest.mark.parametrize(("kind", "loss", "shows"), WRONG.values(), ids=WRONG)
def test_free_outputs_do_not_become_right_by_a_wrong_loss(kind, loss, shows):
    found = aim(kind, loss)
    if shows == "loss_pairs":
        assert found["loss_pairs"] is False
    else:
        assert found[shows] < 0.2


class Likelihood(Task):
    """A task of a user: the network returns a mean and the logarithm of a variance."""

    def __init__(self, compare):
        super().__init__(network=MLP(4, [8], 2), loss=None, optimizer=SGD, schedule=Constant(), metrics={})
        self.compare = compare

    def compute_loss(self, outputs, targets):
        mean, log_variance = outputs.unbind(1)
        return (log_variance + self.compare(mean, targets).square() * torch.exp(-log_variance)).mean()


COMPARED = {
    "its own target": (lambda mean, targets: mean - targets[:, 0], True),
    "all targets": (lambda mean, targets: mean - targets, False),
    "no target": (lambda mean, targets: mean, None),
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("name", COMPARED)
def test_the_first_loss_of_a_users_task_shows_with_which_targets_outputs_are_compared(name, tmp_path):
    compare, expected = COMPARED[name]
    batches = DataLoader(TensorDataset(INPUTS, INPUTS[:, :1]), 8)
    insight, trainer = fit(Likelihood(compare), tmp_path, batches)
    assert insight.facts(trainer)["loss_pairs"] is expected
    insight.evaluate(trainer)
    assert ["wrong_loss"] * (expected is False) == [each.name for each in insight.findings if each.name == "wrong_loss"]


class Heads(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.hidden, self.heads = nn.Linear(4, 8), nn.ModuleList(heads)

    def forward(self, inputs):
        hidden = self.hidden(inputs).relu()
        return torch.cat([head(hidden) for head in self.heads], 1)


HEADS = {
    "one shared head": ([nn.Linear(8, 1)] * 3, True),
    "three heads": ([nn.Linear(8, 1) for _ in range(3)], False),
    "zeros": ([nn.utils.skip_init(nn.Linear, 8, 3)], None),
}


@pytest.mark.parametrize("name", HEADS)
def test_outputs_of_a_shared_layer_rise_and_fall_together(name, tmp_path):
    heads, expected = HEADS[name]
    if name == "zeros":
        nn.init.zeros_(heads[0].weight), nn.init.ones_(heads[0].bias)
    insight, trainer = fit(Foreign(Heads(heads)), tmp_path, loader_of_three())
    assert insight.facts(trainer)["outputs_follow_one"] is expected
    insight.evaluate(trainer)
    assert ("equal_outputs" in [each.name for each in insight.findings]) is (expected is True)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("network", [DropsAlways(), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))])
def test_a_network_that_draws_in_evaluation_mode_is_named(network, tmp_path):
    insight, trainer = fit(Foreign(network), tmp_path, loader_of_three())
    draws = isinstance(network, DropsAlways)
    assert insight.facts(trainer)["evaluation_draws"] is draws
    insight.evaluate(trainer)
    assert ("train_eval_mismatch" in [each.name for each in insight.findings]) is draws


def loader_of_three():
    return DataLoader(TensorDataset(INPUTS, INPUTS[:, :3]), 8)


class Recurrent(nn.Module):
    def __init__(self, bidirectional):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=bidirectional)
        self.output = nn.Linear(16 if bidirectional else 8, 20)

    def forward(self, tokens):
        return self.output(self.gru(self.embedding(tokens))[0])


class Masked(nn.Module):
    """A transformer whose mask is boolean, as torch asks for, or a float that is added to the scores."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding, self.output = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mask = torch.ones(12, 12).triu(1).to(dtype)

    def forward(self, tokens):
        embedded = self.embedding(tokens)
        return self.output(self.attention(embedded, embedded, embedded, attn_mask=self.mask, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    ("network", "sees"),
    [
        (TransformerLM(vocabulary=20, max_length=12, width=8, heads=2, layers=1), False),
        (Recurrent(bidirectional=False), False),
        (Recurrent(bidirectional=True), True),
        (Masked(torch.bool), False),
        (Masked(torch.float), True),
    ],
    ids=["TransformerLM", "a GRU", "a bidirectional GRU", "a boolean mask", "a mask of floats"],
)
def test_a_language_model_that_sees_later_tokens_is_named(network, sees, tmp_path):
    tokens = torch.randint(1, 20, (16, 12), generator=torch.Generator().manual_seed(0))
    task = LanguageModel(network, nn.CrossEntropyLoss(), SGD, Constant())
    insight, trainer = fit(task, tmp_path, DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), 8))
    insight.evaluate(trainer)
    assert ("sees_future" in [each.name for each in insight.findings]) is sees


@pytest.mark.parametrize("shape", [(200, 5), (200, 12), (200, 1, 6, 6)])
def test_a_relation_of_targets_to_inputs_is_told_from_chance(shape):
    torch.manual_seed(0)
    inputs = torch.randint(0, 30, shape) if shape == (200, 12) else torch.randn(shape)
    first = inputs.flatten(1).float()[:, :2]
    if not inputs.is_floating_point():
        first = torch.stack([(inputs == 3).sum(1), (inputs == 4).sum(1)], 1).float()
    targets = (first[:, 0] > first[:, 1]).long()
    related, shuffled = of_relation(inputs, targets), of_relation(inputs, targets[torch.randperm(200)])
    assert related["r2"] > 0.1 and related["p_value"] == 1 / 40
    assert shuffled["r2"] < 0.05 and shuffled["p_value"] > 1 / 40


def test_the_r2_of_samples_left_out_is_that_of_fitting_again():
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 3), torch.randn(40, 1)
    targets = (targets + inputs[:, :1]).double()
    kernel, wanted = _kernel(inputs), (targets - targets.mean()) / targets.std()
    best = -torch.inf
    for penalty in _PENALTIES:
        errors = []
        for left in range(40):
            rest = torch.arange(40) != left
            solved = torch.linalg.solve(kernel[rest][:, rest] + penalty * torch.eye(39).double(), wanted[rest])
            errors.append(wanted[left] - kernel[left, rest] @ solved)
        best = max(best, float(1 - torch.stack(errors).square().sum() / wanted.square().sum()))
    assert of_relation(inputs, targets)["r2"] == pytest.approx(best, rel=1e-6)


def test_sorted_numbers_are_told_from_shuffled_ones():
    numbers = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    assert of_order(numbers.sort(0).values)["autocorrelation"] > 0.9
    assert abs(of_order(numbers)["autocorrelation"]) < 0.2


def test_a_module_of_a_user_has_the_facts_of_its_first_loss(tmp_path):
    insight, trainer = fit(Foreign(), tmp_path)
    facts = json.loads(json.dumps(insight.facts(trainer)))
    assert facts["loss_path"][-1] == "MseLoss" and facts["loss_is"] == "mse_loss" and facts["head"] == "linear"
    assert facts["not_recorded"] == []


@pytest.mark.parametrize(("shift", "offset"), [(0, 0), (1, 1), (2, 2)])
def test_the_token_that_the_loss_wants_is_seen_in_its_gradient(shift, offset):
    tokens = torch.randint(30, (4, 24), generator=torch.Generator().manual_seed(1))
    outputs = nn.Embedding(30, 30)(tokens)
    loss = F.cross_entropy(outputs[:, : 24 - shift].transpose(1, 2), tokens[:, shift:])
    assert of_token_offset(loss, outputs, tokens) == offset
    assert of_token_offset(loss, outputs, torch.zeros_like(tokens)) is None  # Equal tokens are at all places.


class AlongTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(4, 4)  # Takes the first axis for time.
        self.last = nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(self.rows(inputs[:, None])[0][:, 0])


class OfItsPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(inputs) + torch.arange(len(inputs))[:, None]


def test_a_network_whose_outputs_depend_on_the_place_in_the_batch_is_seen(tmp_path):
    insight, trainer = fit(Foreign(OfItsPlace()), tmp_path)
    facts = insight.facts(trainer)
    assert facts["mixes_samples"] == 0 and facts["depends_on_order"] > 0.1


def test_a_network_that_mixes_the_samples_of_a_batch_is_seen(tmp_path):
    insight, trainer = fit(Foreign(AlongTheBatch()), tmp_path)
    assert insight.facts(trainer)["mixes_samples"] > 0.01
    assert fit(Foreign(), tmp_path)[0].measured["mixes_samples"] < 1e-5


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, inputs):
        if len(inputs) != 8:
            raise ValueError("a batch of 8 only")
        return {"out": self.first(inputs).sum(1, keepdim=True)}


class OddModule(Foreign):
    def training_step(self, batch, batch_idx):
        return self.network(batch[0])["out"].square().mean()


def test_a_network_that_no_probe_understands_trains_anyway(tmp_path):
    insight, trainer = fit(OddModule(Odd()), tmp_path)
    assert trainer.global_step == 4 and insight.facts(trainer)["loss_path"] is not None
