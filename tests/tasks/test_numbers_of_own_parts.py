"""Numbers that are logged with losses, networks, loaders and data sets of the user, compared with a plain loop."""

import copy
import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from torchmetrics import MeanAbsoluteError

from firstlight.callbacks import RandomState
from firstlight.errors import UsageError
from firstlight.losses import ContrastiveLoss
from firstlight.optim import build
from firstlight.tasks import (
    BinaryClassification,
    Classification,
    Embedding,
    MultilabelClassification,
    Regression,
    Task,
)
from firstlight.tasks.gradient_weights import holds_even_batches
from firstlight.tasks.notices import repeated_samples
from firstlight.tasks.weight_check import terms_of_other_weight
from tests.helpers import Ranks
from tests.tasks.helpers import loader, parts, trainer

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(60, 5, generator=GENERATOR)
LABELS = torch.randint(0, 3, (60,), generator=GENERATOR)
NUMBERS = torch.randn(60, 1, generator=GENERATOR)
SGD = partial(torch.optim.SGD, lr=0.1)
STILL = partial(torch.optim.SGD, lr=0.0)


class Last(Callback):
    """Keeps what was logged last."""

    def on_train_end(self, trainer, pl_module):
        self.values = {name: value.item() for name, value in trainer.callback_metrics.items()}


def logged(task, batches, tmp_path, **options):
    last = Last()
    run = trainer(tmp_path, **{"max_epochs": 1, "log_every_n_steps": 6, **options, "callbacks": [last]})
    run.fit(task, batches, batches)
    return last.values


class Flat(nn.Module):
    def forward(self, outputs, targets):
        return (outputs - targets).square().mean(dim=0)


class FlatWeight(nn.MSELoss):
    def batch_weight(self, targets):
        return (targets > 0).sum(dim=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(Flat(), r"the loss of a val batch has the shape \(1,\)"), (FlatWeight(), r"batch_weight ret")],
)
def test_a_loss_or_weight_with_an_axis_is_refused(loss, message, tmp_path):
    task = Task(**parts(nn.Linear(5, 1), loss))
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path).validate(task, loader(INPUTS, NUMBERS), verbose=False)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 0.01, -0.01]))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), 3)


def test_outputs_that_are_a_view_of_a_parameter_count_as_they_were(tmp_path):
    task = Classification(**parts(Constant(), nn.CrossEntropyLoss()) | {"optimizer": partial(SGD, lr=1.0)}, classes=3)
    found = logged(task, loader(INPUTS, LABELS, 10), tmp_path)["train/accuracy"]
    logits, right = Constant().logits, 0
    for labels in LABELS.split(10):
        outputs = logits.expand(10, 3)
        right += (outputs.argmax(1) == labels).sum().item()
        (gradient,) = torch.autograd.grad(cross_entropy(outputs, labels), logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert found == pytest.approx(right / 60)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, targets):
        loss = (outputs - targets).square().mean()
        self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        return {"mse": loss, "running": self.mean}


def test_a_term_that_is_a_buffer_counts_as_it_was(tmp_path):
    task = Task(**parts(nn.Linear(5, 1), Running()) | {"optimizer": STILL})
    found = logged(task, loader(INPUTS, NUMBERS, 10), tmp_path, limit_val_batches=0)
    mean = total = 0.0
    for inputs, targets in zip(INPUTS.split(10), NUMBERS.split(10), strict=True):
        mean = 0.9 * mean + 0.1 * (task(inputs) - targets).square().mean().item()
        total += mean / 6
    assert found["train/running"] == pytest.approx(total)


class Reusing:
    """Writes each batch into the memory of the one before."""

    def __iter__(self):
        inputs, labels = torch.empty(10, 5), torch.empty(10, dtype=torch.int64)
        for start in range(0, 60, 10):
            inputs.copy_(INPUTS[start : start + 10])
            labels.copy_(LABELS[start : start + 10])
            yield inputs, labels

    def __len__(self):
        return 6


def test_a_loader_may_write_a_batch_into_the_memory_of_the_one_before(tmp_path):
    task = Classification(**parts(nn.Linear(5, 3), nn.CrossEntropyLoss()) | {"optimizer": STILL}, classes=3)
    found = logged(task, Reusing(), tmp_path)
    right = (task(INPUTS).argmax(1) == LABELS).double().mean().item()
    assert [found["train/accuracy"], found["val/accuracy"]] == pytest.approx([right, right])


class Lengths(Dataset):
    """Sequences of several lengths."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return INPUTS[: 3 + index], NUMBERS[: 3 + index]


def padded(samples):
    return tuple(nn.utils.rnn.pad_sequence(list(each), batch_first=True) for each in zip(*samples, strict=True))


def test_metrics_take_batches_of_several_lengths(tmp_path):
    task = Task(**parts(nn.Linear(5, 1), nn.MSELoss(), metrics={"mae": MeanAbsoluteError()}) | {"optimizer": STILL})
    batches = DataLoader(Lengths(), batch_size=4, collate_fn=padded)
    found = logged(task, batches, tmp_path, log_every_n_steps=3, enable_checkpointing=True)
    errors = torch.cat([(task(inputs) - targets).flatten() for inputs, targets in batches])
    for split in ("train", "val"):
        assert found[f"{split}/mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-6)
        assert found[f"{split}/loss"] == pytest.approx(errors.square().mean().item(), rel=1e-6)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(INPUTS, NUMBERS, strict=True)


def test_a_task_takes_loaders_without_a_length(tmp_path):
    task = Task(**parts(nn.Linear(5, 1), nn.MSELoss()) | {"optimizer": STILL})
    found = logged(task, DataLoader(Stream(), batch_size=7), tmp_path)
    assert found["val/loss"] == pytest.approx((task(INPUTS) - NUMBERS).square().mean().item(), rel=1e-6)
    assert repeated_samples("val", DataLoader(Stream()), 2) == ""


def test_batches_of_several_lengths_are_not_taken_for_even_ones():
    plain = loader(INPUTS, NUMBERS)
    assert holds_even_batches(plain, "elements")
    assert not holds_even_batches(plain, "own")
    assert holds_even_batches(DataLoader(Lengths(), batch_size=4), "samples")
    assert not holds_even_batches(DataLoader(Lengths(), batch_size=4), "elements")
    assert not holds_even_batches(DataLoader(Lengths(), batch_size=4, collate_fn=padded), "samples")


class Relabelling(Dataset):
    """Leaves out samples when they are taken; `targets` does not show it, as with torchvision's `target_transform`."""

    targets = LABELS

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return INPUTS[index], LABELS[index] if index % 2 and index < 40 else torch.tensor(-100)


def test_labels_that_a_data_set_changes_weigh_as_what_they_become(tmp_path):
    task = Classification(**parts(nn.Linear(5, 3), nn.CrossEntropyLoss()) | {"optimizer": SGD}, classes=3)
    weight = task.network.weight.detach().clone()
    data = Relabelling()
    loss = cross_entropy(task(INPUTS), torch.stack([data[index][1] for index in range(60)]))
    (gradient,) = torch.autograd.grad(loss, task.network.weight)
    batches = DataLoader(data, batch_size=10)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=6).fit(task, batches, batches)
    torch.testing.assert_close(task.network.weight, weight - 0.1 * gradient)


class Own(LightningDataModule):
    def train_dataloader(self):
        data = TensorDataset(INPUTS, torch.cat([NUMBERS[:30], NUMBERS[30:] + 100]))
        return DataLoader(data, batch_size=10, sampler=SubsetRandomSampler(range(30)))

    def val_dataloader(self):
        return loader(INPUTS, NUMBERS)


def test_targets_are_standardised_by_the_samples_that_are_trained_on(tmp_path):
    task = Regression(**parts(nn.Linear(5, 1), nn.MSELoss()))
    trainer(tmp_path, max_epochs=1, callbacks=[RandomState()]).fit(task, datamodule=Own())  # It wraps the loader.
    assert task.target_mean.item() == pytest.approx(NUMBERS[:30].double().mean().item())
    assert task.target_std.item() == pytest.approx(NUMBERS[:30].double().std(correction=0).item())


@pytest.mark.parametrize("make", [BinaryClassification, MultilabelClassification])
@pytest.mark.parametrize("value", [0.3, -1.0])
def test_targets_that_are_no_zeros_and_ones_are_refused_in_a_program(make, value, tmp_path):
    width = {"labels": 2} if make is MultilabelClassification else {}
    task = make(**parts(nn.Linear(5, width.get("labels", 1)), nn.BCEWithLogitsLoss()), **width)
    targets = torch.full((60, width.get("labels", 1)), value)
    with pytest.raises(UsageError, match=f"a target is {value:g}: targets must be 0 or 1"):
        trainer(tmp_path).validate(task, loader(INPUTS, targets), verbose=False)


def test_probabilities_as_targets_of_a_classification_are_refused_in_a_program(tmp_path):
    task = Classification(**parts(nn.Linear(5, 3), nn.CrossEntropyLoss()), classes=3)
    with pytest.raises(UsageError, match="Classification needs class indices"):
        trainer(tmp_path).validate(task, loader(INPUTS, INPUTS[:, :3].softmax(1)), verbose=False)


def test_accuracy_of_ignored_targets_only_is_undefined(tmp_path, caplog):
    task = Classification(**parts(nn.Linear(5, 3), nn.CrossEntropyLoss()), classes=3)
    (found,) = trainer(tmp_path).validate(task, loader(INPUTS, torch.full_like(LABELS, -100)), verbose=False)
    assert math.isnan(found["val/accuracy"])
    assert "val/accuracy is undefined (nan), because the loss ignores all targets" in caplog.text


def test_f1_without_a_positive_sample_or_prediction_is_undefined(tmp_path, caplog):
    task = BinaryClassification(**parts(nn.Identity(), nn.BCEWithLogitsLoss()))
    (found,) = trainer(tmp_path).validate(task, loader(-torch.ones(8, 1), torch.zeros(8, 1)), verbose=False)
    assert math.isnan(found["val/f1"])
    assert "val/f1 is undefined (nan), because no sample has class 1 or the prediction 1" in caplog.text
    (found,) = trainer(tmp_path).validate(task, loader(torch.ones(8, 1), torch.zeros(8, 1)), verbose=False)
    assert found["val/f1"] == 0


def test_recall_without_two_samples_of_a_label_is_undefined(tmp_path, caplog):
    task = Embedding(**parts(nn.Linear(5, 2), ContrastiveLoss()))
    (found,) = trainer(tmp_path).validate(task, loader(INPUTS, torch.arange(60)), verbose=False)
    assert math.isnan(found["val/recall_at_k"])
    assert "because no two samples have the same label" in caplog.text


@pytest.mark.parametrize("function", [cross_entropy, partial(cross_entropy, ignore_index=0)])
def test_a_loss_function_of_torch_is_refused(function):
    with pytest.raises(UsageError, match=r"the function cross_entropy.*give a module"):
        Classification(**parts(nn.Linear(5, 3), function), classes=3)


def test_lbfgs_logs_the_first_evaluation_of_a_batch(tmp_path):
    torch.manual_seed(0)
    make = partial(torch.optim.LBFGS, lr=0.5, max_iter=10)
    network = nn.Linear(5, 1)
    task = Task(**parts(copy.deepcopy(network), nn.MSELoss()) | {"optimizer": make})
    found = logged(task, loader(INPUTS, NUMBERS, 10), tmp_path)
    optimizer, total = make(network.parameters()), 0.0
    for inputs, targets in zip(INPUTS.split(10), NUMBERS.split(10), strict=True):

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = (network(inputs) - targets).square().mean()
            loss.backward()
            return loss

        total += optimizer.step(closure).item() / 6
    assert found["train/loss"] == pytest.approx(total, rel=1e-5)


class Wrapped(nn.Module):
    """Leaves out targets of -100, which the task cannot know."""

    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, outputs, targets):
        return self.loss(outputs, targets)


class Focal(nn.Module):
    def forward(self, outputs, targets):
        losses = cross_entropy(outputs, targets, reduction="none")
        return (losses * (1 - (-losses).exp()).square()).mean()


class Penalised(Classification):
    def compute_loss(self, outputs, targets):
        return {"entropy": super().compute_loss(outputs, targets), "penalty": outputs.square().mean()}


class RootMean(nn.Module):
    def forward(self, outputs, targets):
        return cross_entropy(outputs, targets).sqrt()


class LogMean(nn.Module):
    def forward(self, outputs, targets):
        return cross_entropy(outputs, targets).log1p()


class NeedsTwo(nn.Module):
    """A mean that cannot be had of one sample."""

    def __init__(self, of_one=None, power=1):
        super().__init__()
        self.of_one, self.power = of_one, power

    def forward(self, outputs, targets):
        if len(outputs) < 2:
            if self.of_one is None:
                raise AssertionError("two samples or more")
            return outputs.sum() * self.of_one
        return cross_entropy(outputs, targets) ** self.power


class SeldomNoisy(nn.Module):
    """Draws a number that seldom changes something."""

    def forward(self, outputs, targets):
        return cross_entropy(outputs * (1 + (torch.rand(()) > 0.8)), targets)


class NearOne(nn.Module):
    """A small difference of numbers near 1."""

    def forward(self, outputs, targets):
        return 1 - (1 - 1e-4 * cross_entropy(outputs, targets, reduction="none")).mean()


class Pairwise(Classification):
    pairwise_loss = True


class Noisy(nn.Module):
    def forward(self, outputs, targets):
        return (outputs.mean(1) * torch.rand(len(outputs))).mean()


IGNORED = LABELS.where(torch.arange(60) % 5 > 1, -100)
ADVICE = "is not a mean over what batch_weight(targets) counts"


@pytest.mark.parametrize(
    ("make", "loss", "targets", "told"),
    [
        (Classification, Wrapped(), IGNORED, "the loss of Wrapped"),
        (Penalised, nn.CrossEntropyLoss(), IGNORED, "the penalty of Penalised.compute_loss"),
        (Penalised, nn.CrossEntropyLoss(), LABELS, ""),
        (Classification, Focal(), LABELS, ""),
        (Classification, Noisy(), LABELS, ""),
        (Classification, RootMean(), LABELS, "the loss of RootMean"),
        (Classification, LogMean(), LABELS, "the loss of LogMean"),
        (Pairwise, RootMean(), LABELS, ""),
        (Classification, NeedsTwo(), LABELS, ""),
        (Classification, NeedsTwo(torch.nan), LABELS, ""),
        (Classification, NeedsTwo(torch.nan, power=2), LABELS, "the loss of NeedsTwo"),
        (Classification, SeldomNoisy(), LABELS, ""),
        (Classification, NearOne(), LABELS, ""),
    ],
)
def test_a_loss_whose_weight_is_not_known_is_told_once(make, loss, targets, told, tmp_path, caplog):
    task = make(**parts(nn.Linear(5, 3), loss), classes=3)
    batches = loader(INPUTS, targets, 9)
    trainer(tmp_path, max_epochs=2).fit(task, batches, batches)
    assert caplog.text.count(ADVICE) == bool(told)
    assert f"{told} {ADVICE}" in caplog.text or not told


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("loss", "is_told"), [(RootMean(), True), (Focal(), False)])
def test_a_function_of_a_mean_is_told_in_large_batches_at_any_precision(loss, is_told, precision, tmp_path, caplog):
    task = Classification(**parts(nn.Linear(5, 3), loss), classes=3)
    batches = loader(INPUTS.repeat(20, 1), LABELS.repeat(20), 600)
    trainer(tmp_path, precision=precision).validate(task, batches, verbose=False)
    assert (ADVICE in caplog.text) == is_told


def test_a_sum_and_a_wrong_batch_weight_are_told_in_a_program(tmp_path, caplog):
    class Sum(nn.Module):
        def forward(self, outputs, targets):
            return (outputs - targets).square().sum()

    task = Task(**parts(nn.Linear(5, 1), Sum()))
    trainer(tmp_path).validate(task, loader(INPUTS, NUMBERS, 9), verbose=False)
    assert f"the loss of Sum {ADVICE}" in caplog.text


def test_the_check_of_weights_changes_no_state(tmp_path):
    task = Task(**parts(nn.Sequential(nn.Linear(5, 1), nn.BatchNorm1d(1)), Running()))
    found = logged(task, loader(INPUTS, NUMBERS, 10), tmp_path, limit_val_batches=0)
    assert task.network[1].num_batches_tracked == 6
    assert found["train/running"] > 0
    before = torch.get_rng_state()
    assert terms_of_other_weight(task, task(INPUTS), NUMBERS) == []
    assert torch.equal(before, torch.get_rng_state())


def test_a_second_fit_with_targets_of_another_scale_is_told(tmp_path, caplog):
    task = Regression(**parts(nn.Linear(5, 1), nn.MSELoss()) | {"optimizer": STILL})
    for targets in (NUMBERS, NUMBERS, NUMBERS + 500):
        batches = loader(INPUTS, targets)
        trainer(tmp_path, max_epochs=1).fit(task, batches, batches)
    assert task.target_mean.item() == pytest.approx((NUMBERS + 500).double().mean().item())
    assert caplog.text.count("Regression was trained with target_mean") == 1


@pytest.mark.parametrize(
    ("make", "network", "message"),
    [
        (torch.optim.SparseAdam, nn.Linear(3, 2), "SparseAdam takes only weights of embeddings with sparse=True, not"),
        (torch.optim.AdamW, nn.Embedding(4, 3, sparse=True), "AdamW takes no sparse gradients"),
        (torch.optim.SparseAdam, nn.Embedding(4, 3, sparse=True), ""),
        (torch.optim.SGD, nn.Embedding(4, 3, sparse=True), ""),
    ],
)
def test_optimisers_that_cannot_take_a_kind_of_gradient_are_refused(make, network, message):
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        build(partial(make, lr=0.1), network)


def doubled(ranks):
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("firstlight").addHandler(handler)
    task = Task(**parts(nn.Linear(5, 1), nn.MSELoss()))
    trainer(".", devices=ranks, strategy="ddp").validate(task, loader(INPUTS[:7], NUMBERS[:7], 4), verbose=False)
    Path(f"{task.global_rank}").write_text("\n".join(texts))


def test_samples_that_two_processes_score_are_told(tmp_path):
    Ranks(doubled, 2, cwd=tmp_path, ranks=2).succeed()
    assert "the val loader gives 1 of its samples to two processes" in (tmp_path / "0").read_text()
    assert "two processes" not in (tmp_path / "1").read_text()
