"""Measure a training step on a GPU: firstlight with everything on, and a compiled loop by hand.

    python benchmarks/gpu.py [--cases tiny,conv] [--rounds 7] [--json F]

Both train a case of `cases/gpu/` with the same network, loss, optimiser, precision and compiler. All samples are in the
device's memory, as they were loaded. The loop by hand compiles scaling, network and loss as one function, and does
nothing else.

Each contender trains in its own process. They start together and compile in their first two epochs. After that, one
trains for an epoch while the others wait, round after round.

The time of a step is the training time of an epoch divided by its steps. The device is synchronised before and after.
The table shows medians over the rounds, and medians of the ratios in the same round. For the loop by hand, "ms of the
host" ends when the host has queued the last step. If it equals the time of a step, the host limits the speed.

"Share of peak" is the rate of floating-point operations in the network's matrix products and convolutions, as
`torch.utils.flop_counter` counts them, divided by that of a product of two bfloat16 matrices of 8,192 x 8,192.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent
CASES = ("tiny", "conv", "resnet", "lm")
CONTENDERS = ("floor", "firstlight")
MARK = "turn: "
WARM = 2
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> float:
    """Wait for the device and return the time."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_since(start: float, steps: int) -> dict[str, float]:
    """Return the seconds of a step until the host queued the last one, and until the device finished it."""
    host = time.perf_counter()
    return {"host": (host - start) / steps, "step": (wait() - start) / steps}


def turn(message: Any = None) -> None:
    """Send a message to the parent process, and wait for the next turn of this one."""
    print(f"{MARK}{json.dumps(message)}", flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


def experiment_of(case: str, epochs: int, options: list[str]) -> Any:
    """Return the experiment of a case."""
    from firstlight.cli.parser import CLI

    config = HERE / "cases" / "gpu" / f"{case}.yaml"
    fixed = ["--trainer.accelerator=auto", "--trainer.devices=1", f"--trainer.max_epochs={epochs}"]
    return CLI("fit", ["--config", str(config), *fixed, *options]).training()


def floor(case: str, epochs: int, options: list[str]) -> None:
    """Train by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    from firstlight.callbacks import Compile
    from firstlight.loggers import as_list

    experiment = experiment_of(case, epochs, options)
    task, data, trainer = experiment.task, experiment.datamodule, experiment.options
    data.setup("fit")
    train = data.dataset("train").to(DEVICE)
    network, loss_function = task.network.to(DEVICE).train(), task.loss
    mode = next(each.mode for each in as_list(trainer["callbacks"]) if isinstance(each, Compile))
    mixed = trainer["precision"] == "bf16-mixed"
    torch.backends.cudnn.benchmark = bool(trainer["benchmark"])
    is_image = train.inputs.dtype == torch.uint8
    mean, std = (data.fitted[name].to(DEVICE) * 255 for name in ("mean", "std")) if is_image else (None, None)

    def forward(inputs: Any, targets: Any) -> Any:
        inputs = (inputs - mean) / std if is_image else inputs if inputs.is_floating_point() else inputs.long()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            outputs = network(inputs)
        return loss_function(outputs.flatten(0, -2).float(), targets.flatten().long())

    compiled = torch.compile(forward, mode=mode, dynamic=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    steps, size = int(trainer["limit_train_batches"]), data.batch_size
    figures = {}
    for _ in range(epochs):
        turn(figures)
        start = wait()
        for index in torch.randperm(len(train), device=DEVICE)[: steps * size].split(size):
            loss = compiled(train.inputs[index], train.targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        figures = seconds_since(start, steps)
    turn(figures)
    counter = FlopCounterMode(display=False)
    with counter:
        forward(train.inputs[:size], train.targets[:size]).backward()
    turn({"flops": counter.get_total_flops(), "samples": size, "parameters": count(network)})


def count(network: Any) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def firstlight(case: str, epochs: int, options: list[str]) -> None:
    """Train with firstlight, with everything on."""
    from lightning.pytorch import Callback

    from firstlight.loggers import as_list

    class Timer(Callback):
        figures: dict[str, float] = {}  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            turn(self.figures)
            self.start = wait()

        def on_validation_start(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.figures = seconds_since(self.start, trainer.num_training_batches)

    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_of(case, epochs, ["--runs", folder, *options])
        timer = Timer()
        experiment.options["callbacks"] = [timer, *as_list(experiment.options["callbacks"])]
        experiment.fit()
    turn(timer.figures)
    turn({})


def peak() -> float:
    """Return the floating-point operations per second of a large product of bfloat16 matrices."""
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        start = wait()
        for _ in range(10):
            left @ right
        seconds.append((wait() - start) / 10)
    return 2 * 8192**3 / median(seconds[3:])


class Contender:
    """A process that trains for an epoch at a time."""

    def __init__(self, name: str, case: str, rounds: int, options: list[str]) -> None:
        self.name, self.case, self.steps = name, case, []
        command = [sys.executable, __file__, "--child", name, "--cases", case, "--rounds", str(rounds), "--", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        """Start its next turn."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def message(self) -> Any:
        """Wait for the end of its turn, and return its message."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"{self.name} failed in {self.case}")


def rows(case: str, results: dict[str, list[dict[str, float]]], about: dict[str, Any], top: float) -> list[str]:
    """Return the lines of a case in the table."""
    lines = []
    for name, rounds in results.items():
        ratios = sorted(each["step"] / floor["step"] for each, floor in zip(rounds, results["floor"], strict=True))
        step = median(each["step"] for each in rounds)
        ratio = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        size = f"{about['parameters']:,} | {about['samples']}"
        speed = f"{about['samples'] / step:,.0f} | {about['flops'] / step / top:.1%}"
        # An epoch of firstlight may end with logging, which waits for the device.
        host = f"{median(each['host'] for each in rounds) * 1000:.3f}" if name == "floor" else "-"
        lines.append(f"| {case} | {size} | {name} | {step * 1000:.3f} | {host} | {ratio} | {speed} |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Measure a training step on a GPU.", allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="options for firstlight, after --")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if args.child:
        globals()[args.child](cases[0], args.rounds + WARM, args.options)
        return
    contenders = [Contender(name, case, args.rounds, args.options) for case in cases for name in CONTENDERS]
    for each in contenders:
        each.message()
    for _ in range(WARM):
        for each in contenders:
            each.start()
        for each in contenders:
            each.message()
    for number in range(args.rounds):
        for each in contenders:
            each.start()
            each.steps.append(each.message())
            print(
                f"{each.case} {number} {each.name}: {each.steps[-1]['step'] * 1000:.3f} ms a step",
                file=sys.stderr,
                flush=True,
            )
    about: dict[str, Any] = {case: {} for case in cases}
    for each in contenders:
        each.start()
        about[each.case] |= each.message()
        each.start()
        each.process.wait()
    top = peak() if DEVICE.type == "cuda" else float("nan")
    card = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "no GPU"
    results = {case: {each.name: each.steps for each in contenders if each.case == case} for case in cases}
    print(f"{card}, torch {torch.__version__}; a product of bfloat16 matrices reaches {top / 1e12:,.1f} TFLOP/s\n")
    print(
        "| case | parameters | batch | contender | ms a step | ms of the host | over the floor's | samples a second "
        "| share of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line for case in cases for line in rows(case, results[case], about[case], top)))
    if args.json:
        content = {"card": card, "peak": top, "about": about, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
