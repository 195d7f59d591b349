"""Where the time of a step goes: the parts of a step by hand beside those of firstlight.

    python benchmarks/parts.py [--case mlp] [--rounds 5]

Each trains in a process of its own, in turn, with a clock read where the network, its gradient and the update begin and
end. Printed are the median milliseconds of each part, of all steps but those of the first epoch and then of the rounds,
and what the floor takes less. What lies between two updates and is neither of them is what frameworks add. One thread.
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
    """Return the median seconds of each part of a step of a contender, trained in this process."""
    import contenders
    import torch
    from torch.optim import adam

    took: dict[str, list[float]] = defaultdict(list)
    last: list[Any] = [0.0, ""]

    def mark(name: str) -> None:
        now = time.perf_counter()
        took[f"{last[1]}>{name}"].append(now - last[0])
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
    return {name: median(took[name][work.steps :]) for name in NAMES}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Where the time of a step goes.", allow_abbrev=False)
    parser.add_argument("--case", default="mlp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        contender, folder = given.child
        sys.argv = [sys.argv[0], contender, given.case, folder]  # where contenders look for their options
        print(json.dumps(marked(contender, given.case, folder)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict[str, float]]] = {"floor": [], "firstlight": []}
    with tempfile.TemporaryDirectory() as folder:
        if train("prepare", given.case, folder, 1) is None:
            sys.exit(f"{given.case} cannot be prepared")
        for contender in [*found] * given.rounds:
            command = [sys.executable, __file__, "--case", given.case, "--child", contender, folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
            found[contender].append(json.loads(done.stdout.splitlines()[-1]))
    print("| part of a step | by hand, ms | firstlight, ms | more |\n|---|---|---|---|")
    for name, told in {**NAMES, "": "all of it"}.items():
        floor, ours = (
            median(each[name] if name else sum(each.values()) for each in rounds) for rounds in found.values()
        )
        print(f"| {told} | {floor * 1000:.3f} | {ours * 1000:.3f} | {(ours - floor) * 1000:.3f} |")


if __name__ == "__main__":
    main()
