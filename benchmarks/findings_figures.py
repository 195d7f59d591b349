"""Draw the figures of docs/findings.md from runs that have each finding.

    python benchmarks/findings_figures.py --runs DIR

`DIR` holds the runs of `benchmarks/faults.py`. A figure has one or two series of one run, over optimiser steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from firstlight.insight.record import Record
from firstlight.insight.rules.reading import short

_POINTS = 60  # Of a line, so that files stay small.
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images" / "findings"

# By finding: the beginning of the name of the run, the series, and whether their axis is logarithmic.
FIGURES: dict[str, tuple[str, Sequence[str], bool]] = {
    "learning_rate_too_high": ("learning_rate_too_high-4", ("train/loss",), True),
    "learning_rate_too_low": ("learning_rate_too_low-0", ("train/loss", "val/loss"), False),
    "vanishing_gradient": ("vanishing_gradient-0", ("gradient/norm/*",), True),
    "exploding_gradient": ("learning_rate_too_high-4", ("grad_norm/total",), True),
    "dead_units": ("learning_rate_too_high-0", ("activation/dead/*",), False),
    "saturated_units": ("missing_input_scaling-0", ("activation/saturated/*",), False),
    "updates_too_large": ("learning_rate_too_high-6", ("update/ratio/*",), True),
    "updates_too_small": ("learning_rate_too_low-0", ("update/ratio/*",), True),
    "no_learning": ("learning_rate_too_high-0", ("train/loss", "val/loss"), False),
    "plateau": ("redundant_output_activation-4", ("train/loss", "val/loss"), False),
    "overfitting": ("missing_regularisation-0", ("fixed/loss_eval", "val/loss"), False),
    "underfitting": ("too_strong_regularisation-4", ("train/loss", "val/loss"), False),
    "over_regularised": ("augmentation_that_destroys_labels-0", ("train/loss", "fixed/loss_eval"), False),
    "label_noise": ("wrong_labels-2", ("val/accuracy", "val/loss"), False),
    "noisy_validation": ("output_scale-0", ("val/loss",), True),
    "stopped_too_early": ("too_few_epochs-0", ("train/loss",), False),
    "wrong_loss": ("flipped_loss_sign-2", ("train/loss", "val/loss"), False),
    "initial_loss_off": ("output_scale-2", ("train/loss",), True),
    "bad_initialisation": ("too_large_initialisation-0", ("train/loss",), True),
    "class_collapse": ("learning_rate_too_high-0", ("val/class_share/*",), False),
    "class_imbalance": ("imbalance-2", ("val/accuracy", "val/balanced_accuracy"), False),
    "train_eval_mismatch": ("batch_norm_in_the_wrong_mode-0", ("fixed/loss_train", "fixed/loss_eval"), False),
    "unscaled_inputs": ("missing_input_scaling-2", ("train/loss",), True),
    "not_shuffled": ("not_shuffled-2", ("train/loss", "val/loss"), False),
    "missing_nonlinearity": ("missing_activation-0", ("train/loss", "val/loss"), False),
    "frozen_layer": ("frozen_layer-2", ("train/loss", "val/loss"), False),
    "gradient_not_zeroed": ("gradient_not_zeroed-0", ("train/loss", "val/loss"), False),
    "clipping_always": ("clipping_too_low-0", ("grad_norm/total", "train/loss"), False),
    "schedule_mismatch": ("schedule_too_short-0", ("lr",), False),
    "batch_too_small": ("batch_of_one-0", ("train/loss", "val/loss"), False),
}


def draw(name: str, record: Record, wanted: Sequence[str], is_log: bool) -> None:
    """Write the figure of a finding as SVG."""
    figure, axes = plt.subplots(figsize=(4, 2.2), layout="constrained")
    for each in wanted:
        layers = record.layers(each.removesuffix("/*")) if each.endswith("*") else {each: record.series[each]}
        # Of many layers, five show how they differ.
        shown = [*layers][:: max(1, len(layers) // 5)]
        for layer in shown:
            every = max(1, len(layers[layer].steps) // _POINTS)
            marker = "." if len(layers[layer].steps) < 15 else ""
            axes.plot(
                layers[layer].steps[::every] + 1, layers[layer].values[::every], marker=marker, label=short(layer)
            )
    axes.set(xlabel="step", yscale="log" if is_log else "linear")
    if len(wanted) == 1:
        axes.set_ylabel(wanted[0].removesuffix("/*"))
    if len(axes.lines) > 1:
        axes.legend(fontsize="x-small")
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main(args: list[str]) -> None:
    """Draw every figure whose run is there, and say which are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs of benchmarks/faults.py")
    options = parser.parse_args(args)
    IMAGES.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "findings", "path.simplify": True, "font.size": 8})
    for name, (begins, wanted, is_log) in FIGURES.items():
        runs = sorted(options.runs.glob(f"{begins}-*/*/*/metrics.csv"))
        if not runs:
            print(f"no run {begins} for {name}")
            continue
        draw(name, Record.read(runs[0].parent), wanted, is_log)


if __name__ == "__main__":
    main(sys.argv[1:])
