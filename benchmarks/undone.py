"""What each shortcut saves: a step of firstlight with all of them, and with one undone.

    python benchmarks/undone.py [--cases tiny,mlp] [--rounds 40]

Each trains in a process of its own, in turns as those of `speed.py`; printed are the median milliseconds of a step, and
the ratios of steps and epochs to those with all shortcuts: medians, and quartiles of the rounds. One thread.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import middle, over, rounds


def as_it_is() -> None:
    """Undo nothing."""


def trains_by_lightnings_own_loop() -> None:
    """Leave Lightning's loop, hooks and profiler in place."""
    import firstlight.fast_loop

    firstlight.fast_loop.find_unknown = lambda: "undone"


def measures_and_logs_each_step() -> None:
    """Call torchmetrics' `forward` and `self.log`, on step and epoch, at each step, as the tutorials do."""
    import torch
    from torchmetrics.classification import MulticlassAccuracy

    from firstlight.tasks import Classification

    accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        outputs = self(inputs)
        loss: torch.Tensor = self.loss(outputs, targets)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/accuracy", accuracy(outputs, targets), on_step=True, on_epoch=True)
        return loss

    Classification.training_step = training_step  # type: ignore[method-assign]


def takes_samples_one_by_one() -> None:
    """Collate the samples of a TensorDataset, as DataLoader does where nobody tells it otherwise."""
    from torch.utils.data import DataLoader, TensorDataset

    from firstlight.data import loader

    def plain(dataset: Any, trainer: Any, batch_size: int, shuffle: bool, *_: Any) -> Any:
        return DataLoader(TensorDataset(dataset.inputs, dataset.targets), batch_size, shuffle)

    loader.loader = plain
    from firstlight.data import base

    base.loader = plain


def looks_at_each_number() -> None:
    """Judge gradients by a look at each number, and not by a sum."""
    from firstlight.callbacks import nonfinite

    nonfinite.surely_finite = lambda tensors: False


def steps_an_optimiser_that_is_not_fused() -> None:
    """Update by a loop over parameters."""
    sys.argv += ["--model.optimizer.fused=false"]


UNDOINGS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        *(as_it_is, trains_by_lightnings_own_loop, measures_and_logs_each_step),
        *(takes_samples_one_by_one, looks_at_each_number, steps_an_optimiser_that_is_not_fused),
    )
}


def main() -> None:
    """Measure, and print the table."""
    if sys.argv[1:2] == ["--undo"]:
        import contenders

        undo = UNDOINGS[sys.argv[2]]
        sys.argv[1:3] = ["firstlight"]
        undo()
        contenders.main()
        return
    parser = argparse.ArgumentParser(description="What each shortcut saves.", allow_abbrev=False)
    parser.add_argument("--cases", default="tiny,mlp")
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    print("| case | undone | ms a step | over all shortcuts | an epoch over all shortcuts |\n|---|---|---|---|---|")
    for case in given.cases.split(","):
        took = rounds(case, list(UNDOINGS), given.rounds, 1, [str(Path(__file__)), "--undo"])
        whole = took["as_it_is"]
        for name, found in took.items():
            ratios = f"{over(found, whole, 'step')} | {over(found, whole, 'epoch')}"
            print(f"| {case} | {name.replace('_', ' ')} | {middle(found, 'step') * 1000:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
