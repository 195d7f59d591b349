"""How long a step takes by hand, with firstlight and with its peers.

    python benchmarks/speed.py [--cases tiny,mlp] [--contenders floor,firstlight] [--rounds 5] [--threads 1] [--json F]

Each contender trains in a process of its own, one after the other, round after round, so that whatever else the
machine does falls on all of them alike. A step's time is the median of all steps but those of the first epoch. An
epoch's time holds its validation and all that is logged and written in it: the mean of all epochs but the first and the
last, in which firstlight writes its checkpoints whatever it takes. Ratios are to the floor's in the same round: shown
are the median of the rounds and their spread. Between epochs are the milliseconds from an epoch's last step to the next
one's first. `ddp` is the floor of `firstlight_ddp`, on two processes. What could not run is said. The table is printed;
`--json F` keeps the figures in a file.
"""

# Nothing heavy is imported here: a child's peak memory begins with that of the process it was forked from.
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).parent
CASES = ("tiny", "mlp", "conv", "lm")
PEERS = ("dataloader", "accelerate", "lightning", "skorch", "fastai", "keras", "transformers")
PACKAGES = ("torch", "lightning", *PEERS[1:2], *PEERS[3:])
FLOORS = {"firstlight_ddp": "ddp", "ddp": "ddp"}


def version_of(package: str) -> str | None:
    """Return which version of a package is installed, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def train(contender: str, case: str, folder: str, threads: int, *options: str) -> dict[str, Any] | None:
    """Return what a contender took in a case, or nothing when it failed; `options` are for firstlight."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / "contenders.py"), contender, case, folder, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{contender} failed in {case}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if contender != "prepare" else {}
    return found


def rounds(case: str, contenders: list[str], many: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Return what each contender took in each round."""
    took: dict[str, list[dict[str, Any]]] = {each: [] for each in contenders}
    with tempfile.TemporaryDirectory() as folder:
        if train("prepare", case, folder, threads) is None:
            sys.exit(f"{case} cannot be prepared")
        for number in range(many):
            for each in contenders:
                if found := train(each, case, folder, threads):
                    found["epoch"] = fmean(found.pop("epochs"))
                    took[each].append({"round": number, **found})
                    shown = f"{found['step'] * 1000:.3f} ms a step, {found['epoch'] * 1000:.1f} ms an epoch"
                    print(f"{case} {number} {each}: {shown}", file=sys.stderr, flush=True)
    return {each: found for each, found in took.items() if found}


def over(found: list[dict[str, Any]], floors: list[dict[str, Any]], figure: str) -> str:
    """Return the median ratio of a figure to the floor's in the same round, and the spread of the rounds."""
    floor = {each["round"]: each[figure] for each in floors}
    ratios = sorted(each[figure] / floor[each["round"]] for each in found if each["round"] in floor)
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def rows(case: str, took: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a case in the table."""
    lines = []
    for name, found in took.items():
        floors = took[FLOORS.get(name, "floor")]
        step, between, validated = (
            f"{median(each[figure] for each in found) * 1000:.3f}" for figure in ("step", "between", "validated")
        )
        peak, least = (median(each["MiB"] for each in some) for some in (found, floors))
        ratios = f"{over(found, floors, 'step')} | {over(found, floors, 'epoch')}"
        memory = f"{peak:,.0f} | {peak / least:.2f}"
        lines.append(f"| {case} | {name} | {step} | {ratios} | {between} | {validated} | {memory} | {len(found)} |")
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How long a step takes.", allow_abbrev=False)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contenders", default=",".join(("firstlight", *PEERS)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    asked = given.contenders.split(",")
    floors = {FLOORS.get(each, "floor") for each in asked}
    contenders = [*sorted(floors), *(each for each in asked if each not in floors)]
    took = {case: rounds(case, contenders, given.rounds, given.threads) for case in given.cases.split(",")}
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version_of(name)))
    processors = f"{os.cpu_count()} {platform.machine()} processors"
    print(f"Python {platform.python_version()}, {versions}; {processors}, {given.threads} thread(s) a process\n")
    print(
        "| case | contender | ms a step | over the floor's | an epoch over the floor's | ms between epochs "
        "| ms a validated batch | MiB | over the floor's | rounds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(line for case, found in took.items() for line in rows(case, found)))
    if given.json:
        given.json.write_text(json.dumps(took, indent=1) + "\n")


if __name__ == "__main__":
    main()
