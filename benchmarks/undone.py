"""Measure what each shortcut saves: a step of firstlight with all of them, and with one undone.

    python benchmarks/undone.py [--cases tiny,mlp] [--rounds 40]

Each variant trains in its own process, in turns as in `speed.py`, with one thread. The table shows the median
milliseconds of a step, and the ratios of steps and epochs to those with all shortcuts: median and quartiles over the
rounds.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import measure, median_of, ratio_to


def as_it_is() -> None:
    """Undo nothing."""


def trains_by_lightnings_own_loop() -> None:
    """Keep Lightning's own loop, hooks and profiler."""
    import firstlight.fast_loop

    firstlight.fast_loop.find_change = lambda: "undone"


def measures_and_logs_each_step() -> None:
    """Call torchmetrics' `forward` and `self.log` at each step, for steps and epochs, as the tutorials do."""
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
    """Collate the samples of a TensorDataset one by one, as DataLoader does by default."""
    from torch.utils.data import DataLoader, TensorDataset

    from firstlight.data import base

    def plain(dataset: Any, trainer: Any, batch_size: int, shuffle: bool, *_: Any) -> Any:
        return DataLoader(TensorDataset(dataset.inputs, dataset.targets), batch_size, shuffle)

    base.make_loader = plain


def looks_at_each_number() -> None:
    """Check each number of a large gradient, and not its sum."""
    from firstlight.callbacks import nonfinite

    nonfinite.surely_finite = lambda tensors: False


def sums_each_gradient() -> None:
    """Check the sum of a small gradient, and not each number."""
    from firstlight.callbacks import nonfinite

    nonfinite._are_large = lambda gradients: True


def labels_what_nobody_records() -> None:
    """Enter the label of torch's profiler at each optimiser step."""
    from firstlight.fast_loop import epoch_loop

    epoch_loop._find_step = lambda optimizer: optimizer.step


def steps_two_groups() -> None:
    """Use one parameter group with weight decay and one without. The decay is too small to change a weight."""
    sys.argv += ["--model.optimizer.weight_decay=1e-30"]


def steps_an_optimiser_that_is_not_fused() -> None:
    """Use an optimiser that loops over the parameters."""
    sys.argv += ["--model.optimizer.fused=false"]


UNDOINGS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        *(as_it_is, trains_by_lightnings_own_loop, measures_and_logs_each_step),
        *(takes_samples_one_by_one, looks_at_each_number, sums_each_gradient),
        *(labels_what_nobody_records, steps_two_groups, steps_an_optimiser_that_is_not_fused),
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
    parser = argparse.ArgumentParser(description="Measure what each shortcut saves.", allow_abbrev=False)
    parser.add_argument("--cases", default="tiny,mlp")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    print("| case | undone | ms a step | over all shortcuts | an epoch over all shortcuts |\n|---|---|---|---|---|")
    for case in args.cases.split(","):
        results = measure(case, list(UNDOINGS), args.rounds, 1, [str(Path(__file__)), "--undo"])
        all_shortcuts = results["as_it_is"]
        for name, turns in results.items():
            ratios = f"{ratio_to(all_shortcuts, turns, 'step')} | {ratio_to(all_shortcuts, turns, 'epoch')}"
            step = median_of(turns, "step") * 1000
            print(f"| {case} | {name.replace('_', ' ')} | {step:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
