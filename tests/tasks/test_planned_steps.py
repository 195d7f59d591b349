"""The planned optimiser steps equal those that a run does; otherwise the run is refused at its start."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from firstlight.__main__ import main
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.schedules import Constant, WarmupCosine
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, Ranks, called, logged, newest

CASE = "schedules (accumulation, max_steps, limits, ranks, resumption, unknown length): planned equals real, or refused"
# By case: options of a fit and of its resumption, and the steps that are planned and done. An epoch of one process has
# 40 batches.
CASES = {
    "epochs": ([["--trainer.max_epochs=2"]], [80]),
    "accumulation": ([["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=4"]], [20]),
    "accumulation with a remainder": ([["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3"]], [28]),
    "max_steps": ([["--trainer.max_steps=23", "--trainer.max_epochs=-1"]], [23]),
    "max_steps and epochs": ([["--trainer.max_steps=50", "--trainer.max_epochs=1"]], [40]),
    "limited batches": ([["--trainer.max_epochs=3", "--trainer.limit_train_batches=7"]], [21]),
    "a share of the batches, accumulated": (
        [["--trainer.max_epochs=2", "--trainer.limit_train_batches=0.3", "--trainer.accumulate_grad_batches=5"]],
        [6],
    ),
    "two processes": ([["--config", DDP, "--trainer.max_epochs=1"]], [20]),
    "two processes, accumulation": (
        [["--config", DDP, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3"]],
        [14],
    ),
    "resumption with more epochs": ([["--trainer.max_epochs=1"], ["--trainer.max_epochs=3"]], [40, 120]),
    "resumption after max_steps within an epoch, which ended it": (
        [["--trainer.max_steps=17"], ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]],
        [17, 57],
    ),
    "resumption with other accumulation": (
        [
            ["--trainer.max_epochs=1"],
            ["--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=4", "--allow_inexact"],
        ],
        [40, 60],
    ),
}
QUICK = {
    "accumulation with a remainder",
    "max_steps",
    "a share of the batches, accumulated",
    "two processes, accumulation",
    "resumption with other accumulation",
}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fits", "totals"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, case in CASES.items()],
)
def test_the_schedule_follows_the_optimiser_steps_of_the_run(fits, totals, figure, tmp_path):
    with figure(CASE) as count:
        for number, (options, total) in enumerate(zip(fits, totals, strict=True)):
            given = ["--run", str(newest(tmp_path))] if number else ["--config", CONFIG]
            args = ["fit", *given, *options, "--trainer.log_every_n_steps=1"]
            is_shared = DDP in options
            run = Ranks(main, args, cwd=tmp_path, ranks=2).succeed() if is_shared else called(*args, cwd=tmp_path)
            assert f" {total:,} optimiser steps" in run.stdout
        first, last = totals[0], totals[-1]
        then = WarmupCosine(warmup_steps=round(0.05 * first))  # The first warm-up is kept.
        planned = [WarmupCosine()(step, first) for step in range(first)] + [
            then(step, last) for step in range(first, last)
        ]
        rates = logged(newest(tmp_path), "lr")
        assert rates == [(step, pytest.approx(0.003 * factor)) for step, factor in enumerate(planned)]
        count.trial()


class Stream(IterableDataset):
    """A data set of unknown length."""

    def __iter__(self):
        for _ in range(80):
            yield torch.zeros(64), torch.tensor(1)


def stream(schedule, tmp_path, **options):
    task = Classification(
        MLP(64, [8], 10), torch.nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), schedule, classes=10
    )
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(task, DataLoader(Stream(), batch_size=4))
    return task.total_steps, trainer.global_step


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_stream_of_unknown_length_is_planned_by_max_steps_or_refused_at_the_start(figure, tmp_path):
    with figure(CASE, 3) as count:
        with pytest.raises(UsageError, match="must know how many optimiser steps the run has"):
            stream(WarmupCosine(), tmp_path, max_epochs=1)
        count.trial()
        assert stream(WarmupCosine(), tmp_path, max_steps=7) == (7, 7)
        count.trial()
        assert stream(Constant(), tmp_path, max_steps=5, max_epochs=-1) == (5, 5)
        count.trial()
