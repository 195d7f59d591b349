"""How long a step takes on a GPU with firstlight and everything on, over a compiled loop by hand.

    python benchmarks/gpu.py [--cases tiny,conv] [--rounds 7] [--json F]

Both train the case of `cases/gpu/` with the same network, loss, optimiser, precision and compiler, on samples that lie
on the device as they were loaded. The loop by hand compiles scaling, network and loss as one function, and does nothing
else. Each trains in a process of its own. All begin at once, and compile in their first two epochs; from then on one
trains for an epoch while the others wait, round after round. A step's time is that of an epoch's training, the device
waited for at both ends, over its steps; shown are medians of the rounds, and of the ratios in the same round. By hand,
that of the host ends when it has handed over the last step: where it is no less, the host holds, and not the device.
Share of peak is what the network's matrix products and convolutions need, as `torch.utils.flop_counter` counts them,
over what a product of two bfloat16 matrices of 8,192 x 8,192 reaches on the same card.
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
    """Return the time at which the device has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def took_since(begun: float, steps: int) -> dict[str, float]:
    """Return the seconds of a step until the host was done with all of them, and until the device was."""
    host = time.perf_counter()
    return {"host": (host - begun) / steps, "step": (wait() - begun) / steps}


def turn(told: Any = None) -> None:
    """Tell the parent something, and wait until it says that it is this process's turn."""
    print(f"{MARK}{json.dumps(told)}", flush=True)
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
    network, compare = task.network.to(DEVICE).train(), task.loss
    mode = next(each.mode for each in as_list(trainer["callbacks"]) if isinstance(each, Compile))
    mixed = trainer["precision"] == "bf16-mixed"
    torch.backends.cudnn.benchmark = bool(trainer["benchmark"])
    is_image = train.inputs.dtype == torch.uint8
    mean, std = (data.fitted[name].to(DEVICE) * 255 for name in ("mean", "std")) if is_image else (None, None)

    def forward(inputs: Any, targets: Any) -> Any:
        inputs = (inputs - mean) / std if is_image else inputs if inputs.is_floating_point() else inputs.long()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
            outputs = network(inputs)
        return compare(outputs.flatten(0, -2).float(), targets.flatten().long())

    compiled = torch.compile(forward, mode=mode, dynamic=False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    steps, size = int(trainer["limit_train_batches"]), data.batch_size
    took = {}
    for _ in range(epochs):
        turn(took)
        begun = wait()
        for index in torch.randperm(len(train), device=DEVICE)[: steps * size].split(size):
            loss = compiled(train.inputs[index], train.targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        took = took_since(begun, steps)
    turn(took)
    counter = FlopCounterMode(display=False)
    with counter:
        forward(train.inputs[:size], train.targets[:size]).backward()
    turn({"flops": counter.get_total_flops(), "samples": size, "parameters": count(network)})


def count(network: Any) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def firstlight(case: str, epochs: int, options: list[str]) -> None:
    """Train with this package, and everything on."""
    from lightning.pytorch import Callback

    from firstlight.loggers import as_list

    class Timer(Callback):
        took: dict[str, float] = {}  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            turn(self.took)
            self.begun = wait()

        def on_validation_start(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.took = took_since(self.begun, trainer.num_training_batches)

    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_of(case, epochs, ["--runs", folder, *options])
        timer = Timer()
        experiment.options["callbacks"] = [timer, *as_list(experiment.options["callbacks"])]
        experiment.fit()
    turn(timer.took)
    turn({})


def peak() -> float:
    """Return the floating-point operations a second of a large product of bfloat16 matrices."""
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(13):
        begun = wait()
        for _ in range(10):
            left @ right
        took.append((wait() - begun) / 10)
    return 2 * 8192**3 / median(took[3:])


class Contender:
    """A process that trains for an epoch at a time."""

    def __init__(self, name: str, case: str, rounds: int, options: list[str]) -> None:
        self.name, self.case, self.steps = name, case, []
        command = [sys.executable, __file__, "--child", name, "--cases", case, "--rounds", str(rounds), "--", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        """Let it go on."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def told(self) -> Any:
        """Return what it tells when it waits again."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"{self.name} failed in {self.case}")


def rows(case: str, took: dict[str, list[dict[str, float]]], about: dict[str, Any], top: float) -> list[str]:
    """Return the lines of a case in the table."""
    lines = []
    for name, found in took.items():
        ratios = sorted(each["step"] / floor["step"] for each, floor in zip(found, took["floor"], strict=True))
        step = median(each["step"] for each in found)
        ratio = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        size = f"{about['parameters']:,} | {about['samples']}"
        speed = f"{about['samples'] / step:,.0f} | {about['flops'] / step / top:.1%}"
        # firstlight's epochs may end with a logging, which waits for the device.
        host = f"{median(each['host'] for each in found) * 1000:.3f}" if name == "floor" else "-"
        lines.append(f"| {case} | {size} | {name} | {step * 1000:.3f} | {host} | {ratio} | {speed} |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How long a step takes on a GPU.", allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="further options of firstlight, after --")
    given = parser.parse_args()
    cases = given.cases.split(",")
    if given.child:
        globals()[given.child](cases[0], given.rounds + WARM, given.options)
        return
    every = [Contender(name, case, given.rounds, given.options) for case in cases for name in CONTENDERS]
    for each in every:
        each.told()
    for _ in range(WARM):
        for each in every:
            each.start()
        for each in every:
            each.told()
    for number in range(given.rounds):
        for each in every:
            each.start()
            each.steps.append(each.told())
            print(
                f"{each.case} {number} {each.name}: {each.steps[-1]['step'] * 1000:.3f} ms a step",
                file=sys.stderr,
                flush=True,
            )
    about: dict[str, Any] = {case: {} for case in cases}
    for each in every:
        each.start()
        about[each.case] |= each.told()
        each.start()
        each.process.wait()
    top = peak() if DEVICE.type == "cuda" else float("nan")
    card = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "no GPU"
    took = {case: {each.name: each.steps for each in every if each.case == case} for case in cases}
    print(f"{card}, torch {torch.__version__}; a product of bfloat16 matrices reaches {top / 1e12:,.1f} TFLOP/s\n")
    print(
        "| case | parameters | batch | contender | ms a step | ms of the host | over the floor's | samples a second "
        "| share of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line for case in cases for line in rows(case, took[case], about[case], top)))
    if given.json:
        given.json.write_text(json.dumps({"card": card, "peak": top, "about": about, "took": took}, indent=1) + "\n")


if __name__ == "__main__":
    main()
