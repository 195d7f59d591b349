"""Measure the parts of a step, by hand and with firstlight.

    python benchmarks/parts.py [--case mlp] [--rounds 5]

Both train in their own process, in turn, with one thread. A clock is read where the network, its gradient and the
update start and end. The table shows the milliseconds of each part: the median over the steps, without those of the
first epoch, and then over the rounds. The last column is the difference. Frameworks add time outside the network, the
gradient and the update.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from speed import train

NAMES = {
    "updated>forward": "from the update to the network: batch, schedule, hooks",
    "forward>outputs": "the network",
    "outputs>backward": "from its outputs to the gradient: loss, metrics, hooks",
    "backward>gradient": "the gradient",
    "gradient>update": "from the gradient to the update: guard, hooks",
    "update>updated": "the update",
}


def marked(contender: str, case: str, folder: str) -> dict[str, float]:
    """Train in this process, and return the median seconds of each part of a step."""
    import contenders
    import torch
    from torch.optim import adam

    seconds: dict[str, list[float]] = defaultdict(list)
    last: list[Any] = [0.0, ""]

    def mark(name: str) -> None:
        now = time.perf_counter()
        seconds[f"{last[1]}>{name}"].append(now - last[0])
        last[:] = now, name

    def between(owner: Any, function: str, before: str, after: str) -> None:
        original = getattr(owner, function)

        def measured(*args: Any, **kwargs: Any) -> Any:
            if function == "forward" and not args[0].training:
                return original(*args, **kwargs)
            mark(before)
            result = original(*args, **kwargs)
            mark(after)
            return result

        setattr(owner, function, measured)

    work = contenders.Work(case, Path(folder))
    between(type(work.network), "forward", "forward", "outputs")
    between(torch.Tensor, "backward", "backward", "gradient")
    between(adam, "adam", "update", "updated")
    contenders.CONTENDERS[contender](work)
    return {name: median(seconds[name][work.steps :]) for name in NAMES}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Measure the parts of a step.", allow_abbrev=False)
    parser.add_argument("--case", default="mlp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contender, folder = args.child
        sys.argv = [sys.argv[0], contender, args.case, folder]  # contenders.py reads its options from here
        print(json.dumps(marked(contender, args.case, folder)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, list[dict[str, float]]] = {"floor": [], "firstlight": []}
    with tempfile.TemporaryDirectory() as folder:
        if train("prepare", args.case, folder, 1) is None:
            sys.exit(f"{args.case} cannot be prepared")
        for contender in [*results] * args.rounds:
            command = [sys.executable, __file__, "--case", args.case, "--child", contender, folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
            results[contender].append(json.loads(done.stdout.splitlines()[-1]))
    print("| part of a step | by hand, ms | firstlight, ms | more |\n|---|---|---|---|")
    for name, text in {**NAMES, "": "all of it"}.items():
        floor, ours = (
            median(each[name] if name else sum(each.values()) for each in rounds) for rounds in results.values()
        )
        print(f"| {text} | {floor * 1000:.3f} | {ours * 1000:.3f} | {(ours - floor) * 1000:.3f} |")


if __name__ == "__main__":
    main()
