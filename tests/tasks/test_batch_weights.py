"""A mean over batches, windows and processes does not depend on how samples were cut."""

import copy
import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from firstlight.callbacks import RandomState
from firstlight.data import Tensors
from firstlight.losses import SupervisedContrastiveLoss
from firstlight.schedules import Constant
from firstlight.tasks import Classification, Embedding, LanguageModel, Task
from tests.helpers import CONFIG, ROOT, Ranks, called, newest
from tests.tasks.helpers import loader, parts, trainer

SGD = partial(torch.optim.SGD, lr=0.5)
WEIGHTS = torch.tensor([1.0, 20.0, 0.0])
LOSSES = {
    "plain": nn.CrossEntropyLoss,
    "default ignored": nn.CrossEntropyLoss,
    "ignored": partial(nn.CrossEntropyLoss, ignore_index=0),
    "weights": partial(nn.CrossEntropyLoss, WEIGHTS),
    "weights, ignored": partial(nn.CrossEntropyLoss, WEIGHTS, ignore_index=0),
    "smoothing, ignored": partial(nn.CrossEntropyLoss, ignore_index=0, label_smoothing=0.2),
    # With smoothing, torch's mean over samples of a class with weight 0 is infinite.
    "all": partial(nn.CrossEntropyLoss, torch.tensor([1.0, 20.0, 3.0]), ignore_index=0, label_smoothing=0.2),
    "likelihood": partial(nn.NLLLoss, WEIGHTS, ignore_index=0),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
INPUTS = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 2, 2, 0, 2, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 1, 2, 2, 1, 0, 0, 1])


def labels(name):
    return LABELS.where(LABELS != 0, -100) if name == "default ignored" else LABELS


def classification(name, **changes):
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    if name == "likelihood":
        network = nn.Sequential(network, nn.LogSoftmax(1))
    options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "classes": 3, **changes}
    return Classification(**parts(network, LOSSES[name]()) | options)


def whole_loss(task, name, rows=slice(None)):
    return task.loss(task.network(INPUTS[rows]), labels(name)[rows])


@every_loss
def test_logged_losses_do_not_depend_on_the_batch_size(name, tmp_path):
    task = classification(name)
    expected = whole_loss(task, name).item()
    is_scored = labels(name) != task.loss.ignore_index
    right = (task.network(INPUTS).argmax(1) == labels(name))[is_scored].double().mean().item()
    for size in (1, 2, 4, 7, 11, 12, 22, 23):
        (found,) = trainer(tmp_path).validate(task, loader(INPUTS, labels(name), batch_size=size), verbose=False)
        kept = {"val/loss": found["val/loss"], "val/accuracy": found["val/accuracy"]}
        assert kept == pytest.approx({"val/loss": expected, "val/accuracy": right}, rel=1e-5), size


def test_batches_of_wine_without_a_scored_target_count_for_nothing(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    options = ["--config", "configs/wine.yaml", "--trainer.max_epochs=3", "--model.loss.ignore_index=0"]
    called("fit", *options, cwd=tmp_path)
    run = newest(tmp_path, "wine")
    found = {}
    for size in (1, 2, 5, 16, 64):
        called("validate", "--run", str(run), f"--data.batch_size={size}", cwd=tmp_path)
        results = max((run / "evaluations").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        found[size] = json.loads(results.read_text())["metrics"]["val/loss"]
    assert found == pytest.approx(dict.fromkeys(found, found[64]), rel=1e-5)


def test_two_batches_with_ignored_targets_weigh_as_one(tmp_path):
    logits, targets = torch.randn(8, 3), torch.tensor([0, 0, 0, 1, 2, 1, 2, 0])
    task = Classification(**parts(nn.Identity(), nn.CrossEntropyLoss(ignore_index=0)), classes=3)
    (found,) = trainer(tmp_path).validate(task, loader(logits, targets, batch_size=4), verbose=False)
    scored = targets != 0
    assert found["val/loss"] == pytest.approx(cross_entropy(logits[scored], targets[scored]).item(), rel=1e-6)


@pytest.mark.parametrize(("window", "size"), [(2, 5), (4, 1), (4, 2), (64, 2)])
@every_loss
def test_a_step_follows_the_mean_over_its_window(name, window, size, tmp_path):
    task, by_hand = classification(name), classification(name)
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=window)
    run.fit(task, loader(INPUTS, labels(name), batch_size=size), loader(INPUTS, labels(name)))
    for rows in torch.arange(23).split(size * window):
        targets = labels(name)[rows]
        weight = torch.ones(3) if by_hand.loss.weight is None else by_hand.loss.weight
        if (weight[targets.clamp(min=0)] * (targets != by_hand.loss.ignore_index)).any():
            (gradient, bias) = torch.autograd.grad(whole_loss(by_hand, name, rows), list(by_hand.network.parameters()))
            for parameter, change in zip(by_hand.network.parameters(), (gradient, bias), strict=True):
                parameter.data -= 0.5 * change
    for found, expected in zip(task.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_window_of_one_batch_at_the_end_of_an_epoch_has_its_gradient(tmp_path):
    class Halves(nn.Module):
        def forward(self, outputs, targets):
            return (outputs - targets).square().mean()

    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    task = Task(**parts(network, Halves()) | {"optimizer": partial(torch.optim.SGD, lr=0.5)})
    targets = torch.tensor([0.0] * 8 + [1.0] * 2).unsqueeze(1)
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=4)
    batches = loader(torch.ones(10, 1), targets, batch_size=2)
    run.fit(task, batches, batches)
    assert run.global_step == 2
    assert network.weight.item() == pytest.approx(1.0)  # The gradient of the last batch is -2.


def test_full_windows_of_equal_batches_have_the_bits_of_lightning(tmp_path):
    class Plain(Classification):
        def backward(self, loss, *args, **kwargs):
            loss.backward(*args, **kwargs)

    found = []
    for kind in (Classification, Plain):
        torch.manual_seed(0)
        task = kind(**parts(nn.Linear(4, 3), nn.CrossEntropyLoss()), classes=3)
        run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
        run.fit(task, loader(INPUTS[:20], LABELS[:20], 5), loader(INPUTS, LABELS))
        found.append(task.network.weight)
    assert torch.equal(*found)


def test_a_language_model_trains_on_sequences_without_a_scored_token(tmp_path):
    tokens = torch.randint(1, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    tokens[::2] = 0
    expected = None
    for size in (1, 2, 6):
        torch.manual_seed(0)
        task = LanguageModel(**parts(nn.Embedding(7, 7), nn.CrossEntropyLoss(ignore_index=0)))
        if expected is None:
            logits = task(tokens).flatten(0, 1)
            expected = cross_entropy(logits, tokens.flatten(), ignore_index=0).item()
        batches = loader(tokens, tokens, batch_size=size)
        (found,) = trainer(tmp_path).validate(task, batches, verbose=False)
        assert found["val/loss"] == pytest.approx(expected, rel=1e-6)
        trainer(tmp_path, max_epochs=1).fit(task, batches, batches)
        assert all(parameter.isfinite().all() for parameter in task.parameters())


SEQUENCES = torch.randint(1, 7, (11, 5), generator=torch.Generator().manual_seed(0))
SEQUENCES[torch.arange(11)[:, None] * 3 % 7 < torch.arange(5)] = 0  # Sequences of several lengths, padded.


@pytest.mark.parametrize(("window", "size"), [(1, 3), (2, 2), (4, 1), (64, 4)])
def test_a_language_model_does_not_depend_on_batches_and_windows(window, size, tmp_path):
    torch.manual_seed(0)
    network = nn.Embedding(7, 7)
    by_hand = copy.deepcopy(network)
    task = LanguageModel(**parts(network, nn.CrossEntropyLoss(ignore_index=0)) | {"optimizer": SGD})
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=window)
    run.fit(task, loader(SEQUENCES, SEQUENCES, batch_size=size), loader(SEQUENCES, SEQUENCES))
    for rows in torch.arange(11).split(size * window):
        loss = cross_entropy(by_hand(SEQUENCES[rows]).flatten(0, 1), SEQUENCES[rows].flatten(), ignore_index=0)
        (gradient,) = torch.autograd.grad(loss, by_hand.weight)
        by_hand.weight.data -= 0.5 * gradient
    torch.testing.assert_close(network.weight, by_hand.weight, rtol=1e-6, atol=1e-6)
    nats = cross_entropy(network(SEQUENCES).flatten(0, 1), SEQUENCES.flatten(), ignore_index=0).double().item()
    (found,) = run.validate(task, loader(SEQUENCES, SEQUENCES, batch_size=size), verbose=False)
    expected = {"val/loss": nats, "val/perplexity": math.exp(nats), "val/bits_per_byte": nats / math.log(2)}
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("window", "size"), [(1, 6), (2, 5), (64, 6)])
def test_an_embedding_weighs_the_batches_of_a_window_by_samples_with_a_pair(window, size, tmp_path):
    torch.manual_seed(0)
    network, loss = nn.Linear(4, 3), SupervisedContrastiveLoss()
    by_hand = copy.deepcopy(network)
    task = Embedding(**parts(network, loss) | {"optimizer": SGD})
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=window)
    run.fit(task, loader(INPUTS, LABELS, batch_size=size), loader(INPUTS, LABELS))
    batches = torch.arange(23).split(size)
    for start in range(0, len(batches), window):
        weighted, total = torch.zeros(()), 0
        for rows in batches[start : start + window]:
            pairs = sum((LABELS[rows] == label).sum().item() > 1 for label in LABELS[rows])
            weighted, total = weighted + pairs * loss(by_hand(INPUTS[rows]), LABELS[rows]), total + pairs
        for parameter in by_hand.parameters():
            (gradient,) = torch.autograd.grad(weighted / total, parameter, retain_graph=True)
            parameter.grad = gradient
        for parameter in by_hand.parameters():
            parameter.data -= 0.5 * parameter.grad
    torch.testing.assert_close(network.weight, by_hand.weight, rtol=1e-5, atol=1e-6)
    (found,) = run.validate(task, loader(INPUTS, LABELS, batch_size=size), verbose=False)
    whole = run.validate(task, loader(INPUTS, LABELS, batch_size=23), verbose=False)[0]
    assert found["val/nn_accuracy"] == whole["val/nn_accuracy"]
    assert found["val/recall_at_k"] == whole["val/recall_at_k"]


def test_class_weights_of_a_language_model_weigh_its_batches(tmp_path):
    tokens = torch.randint(1, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    task = LanguageModel(**parts(nn.Embedding(7, 7), nn.CrossEntropyLoss(torch.arange(7.0), ignore_index=0)))
    expected = task.loss(task(tokens).flatten(0, 1), tokens.flatten()).item()
    for size in (1, 4):
        (found,) = trainer(tmp_path).validate(task, loader(tokens, tokens, batch_size=size), verbose=False)
        assert found["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_a_task_without_metrics_leaves_out_ignored_pixels(tmp_path):
    targets = torch.randint(0, 3, (6, 4, 5), generator=torch.Generator().manual_seed(0))
    targets[:2], targets[4, :3] = -100, -100
    images = torch.randn(6, 3, 4, 5)
    task = Task(**parts(nn.Conv2d(3, 3, 1), nn.CrossEntropyLoss()))
    expected = task.loss(task(images), targets).item()
    for size in (1, 4):
        (found,) = trainer(tmp_path).validate(task, loader(images, targets, batch_size=size), verbose=False)
        assert found["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_batches_of_longer_samples_weigh_more_for_a_mean_over_elements(tmp_path):
    batches = [(torch.randn(2, length), torch.randn(2, length)) for length in (3, 50)]
    task = Task(**parts(nn.Identity(), nn.MSELoss()))
    (found,) = trainer(tmp_path).validate(task, DataLoader(batches, batch_size=None), verbose=False)
    errors = torch.cat([(inputs - targets).flatten() for inputs, targets in batches])
    assert found["val/loss"] == pytest.approx(errors.square().mean().item(), rel=1e-6)


def test_a_loss_of_the_user_may_have_its_own_batch_weight(tmp_path):
    class Positives(nn.Module):
        def batch_weight(self, targets):
            return (targets > 0).sum()

        def forward(self, outputs, targets):
            return outputs[targets > 0].mean()

    task = Task(**parts(nn.Flatten(0), Positives()))
    (found,) = trainer(tmp_path).validate(task, loader(INPUTS[:, :1], LABELS, batch_size=2), verbose=False)
    assert found["val/loss"] == pytest.approx(INPUTS[LABELS > 0, 0].mean().item(), rel=1e-5)


def test_contrastive_batches_weigh_as_many_samples_as_have_a_positive():
    assert SupervisedContrastiveLoss().batch_weight(torch.tensor([0, 1, 1, 2, 3, 3])) == 4


PROCESSES = [(name, window) for name in LOSSES if "default" not in name for window in (1, 3, 64)]


def fitted(ranks, precision):
    found = {}
    for window in (1, 3, 64):
        torch.manual_seed(0)
        task = LanguageModel(**parts(nn.Embedding(7, 7), nn.CrossEntropyLoss(ignore_index=0)) | {"optimizer": SGD})
        split = ["train"] * 10 + ["val"] * 10 + ["test"] * 10
        data = Tensors(
            SEQUENCES[:10].repeat(3, 1), SEQUENCES[:10].repeat(3, 1), split=split, batch_size=4, batch_size_is="global"
        )
        run = trainer(
            ".", max_epochs=2, accumulate_grad_batches=window, devices=ranks, precision=precision,
            strategy="ddp" if ranks > 1 else "auto", limit_val_batches=0,
        )  # fmt: skip
        run.fit(task, datamodule=data)
        found[f"language {window}"] = [task.network.weight.tolist()]
    for name, window in PROCESSES:
        seed_everything(0, verbose=False)
        task = classification(name, network=nn.Linear(4, 3), schedule=Constant()) if name != "likelihood" else None
        task = task or classification(name)
        split = ["train"] * 22 + ["val"] * 22 + ["test"] * 22
        data = Tensors(
            INPUTS[:22].repeat(3, 1), LABELS[:22].repeat(3), split=split, batch_size=8, batch_size_is="global"
        )
        run = trainer(
            ".", max_epochs=2, accumulate_grad_batches=window, devices=ranks, precision=precision,
            strategy="ddp" if ranks > 1 else "auto", limit_val_batches=0,
        )  # fmt: skip
        run.fit(task, datamodule=data)
        found[f"{name} {window}"] = [value.tolist() for value in task.state_dict().values()]
    Path(f"{ranks}-{run.global_rank}").write_text(json.dumps(found))


# The precisions differ in rounding only: in float64, what is left of the difference in float32 is gone.
@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("32-true", 1e-6, marks=pytest.mark.slow), ("64-true", 1e-13)]
)
def test_two_processes_end_with_the_weights_of_one(precision, tolerance, tmp_path):
    for ranks in (1, 2):
        Ranks(fitted, ranks, precision, cwd=tmp_path, ranks=ranks).succeed()
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    for name, weights in one.items():
        for other in two:
            for mine, theirs in zip(weights, other[name], strict=True):
                expected = torch.tensor(mine, dtype=torch.float64)
                found = torch.tensor(theirs, dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_window_longer_than_an_epoch_is_told_before_the_run(tmp_path):
    options = ["--config", CONFIG, "--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=64"]
    message = "accumulate_grad_batches is 64, but an epoch has 40 batches: an epoch makes one step, of 40 batches"
    assert message in called("check", *options, cwd=tmp_path).stdout
    printed = called("fit", *options, cwd=tmp_path).stdout
    assert printed.index(message) < printed.index("fit    1 epoch")


def collectives(ranks):
    """Count what processes ask each other in backward, for equal batches and for class weights."""
    counts = {}
    for name, loss in {"plain": nn.CrossEntropyLoss(), "weights": nn.CrossEntropyLoss(torch.arange(3.0))}.items():
        asked = []

        class Counting(Classification):
            def backward(self, loss, *args, asked=asked, **kwargs):
                strategy = self.trainer.strategy
                reduce = strategy.reduce
                strategy.reduce = lambda *args, **kwargs: asked.append(1) or reduce(*args, **kwargs)
                super().backward(loss, *args, **kwargs)
                strategy.reduce = reduce

        task = Counting(**parts(nn.Linear(4, 3), loss), classes=3)
        run = trainer(".", max_epochs=1, devices=ranks, strategy="ddp", limit_val_batches=0)
        split = ["train"] * 22 + ["val"] * 22 + ["test"] * 22
        data = Tensors(
            INPUTS[:22].repeat(3, 1), LABELS[:22].repeat(3), split=split, batch_size=4, batch_size_is="global"
        )
        run.fit(task, datamodule=data)
        counts[name] = len(asked)
    Path(f"{run.global_rank}").write_text(json.dumps(counts))


def test_processes_ask_each_other_only_where_weights_may_differ(tmp_path):
    Ranks(collectives, 2, cwd=tmp_path, ranks=2).succeed()
    assert json.loads((tmp_path / "0").read_text()) == {"plain": 1, "weights": 6}


class Counted:
    """Counts how often processes ask each other in backward."""

    asked = 0

    def backward(self, *args, **kwargs):
        strategy = self.trainer.strategy
        reduce = strategy.reduce

        def count(*args, **kwargs):
            self.asked += 1
            return reduce(*args, **kwargs)

        strategy.reduce = count
        super().backward(*args, **kwargs)
        strategy.reduce = reduce


class CountedModel(Counted, LanguageModel):
    pass


class CountedTask(Counted, Task):
    pass


class Positives(nn.CrossEntropyLoss):
    """Scores targets above 0, and tells their number as an integer."""

    def batch_weight(self, targets):
        return int((targets > 0).sum())

    def forward(self, outputs, targets):
        return cross_entropy(outputs, targets, ignore_index=0)


def with_padding(samples):
    inputs, targets = default_collate(samples)
    return inputs, targets.where(inputs[:, :1] > 3, 0)


TOKENS = torch.randint(1, 7, (22, 5), generator=torch.Generator().manual_seed(0))
PADDED = TOKENS.where(torch.arange(5) < torch.arange(22)[:, None] % 5 + 1, 0)
LANGUAGE = {
    "no padding": (TOKENS, CountedModel, nn.CrossEntropyLoss(ignore_index=0), None, 1),
    "padding": (PADDED, CountedModel, nn.CrossEntropyLoss(ignore_index=0), None, 3),
    "padding by the collate function": (TOKENS, CountedModel, nn.CrossEntropyLoss(ignore_index=0), with_padding, 3),
    "an integer weight of the loss": (PADDED[:, 3], CountedTask, Positives(), None, 3),
}


def language(ranks):
    found = {}
    for name, (targets, kind, loss, collate, _) in LANGUAGE.items():
        torch.manual_seed(0)
        network = nn.Embedding(7, 7)
        if targets.ndim == 1:
            network = nn.Sequential(network, nn.Flatten(), nn.Linear(35, 7))
        task = kind(**parts(network, loss) | {"optimizer": partial(torch.optim.SGD, lr=0.5)})
        run = trainer(
            ".", max_epochs=1, devices=ranks, strategy="ddp" if ranks > 1 else "auto", limit_val_batches=0,
            callbacks=[RandomState()],
        )  # fmt: skip
        sampler = DistributedSampler(TOKENS, ranks, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        run.fit(task, loader(TOKENS, targets, batch_size=8 // ranks, sampler=sampler, collate_fn=collate))
        found[name] = task.asked, [value.tolist() for value in task.state_dict().values()]
    Path(f"{ranks}-{run.global_rank}").write_text(json.dumps(found))


def test_language_models_ask_other_processes_only_if_there_is_padding(tmp_path):
    for ranks in (1, 2):
        Ranks(language, ranks, cwd=tmp_path, ranks=ranks).succeed()
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0"))
    for name, (*_, asked) in LANGUAGE.items():
        assert (name, one[name][0], two[name][0]) == (name, 0, asked)
        for mine, theirs in zip(one[name][1], two[name][1], strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-5, atol=1e-6)
