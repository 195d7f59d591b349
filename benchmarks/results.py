"""Measure the experiments over five seeds, and write the table in `configs/README.md`.

    python benchmarks/results.py                 measure the seeds that were not measured yet, and write the table
    python benchmarks/results.py NAME [NAME...]  those of these experiments alone; what is kept of them is forgotten
    python benchmarks/results.py --table         measure nothing, and write the table of what is kept

Each experiment is run as a user does, in a process of its own, with `--seed_everything S --data.split_seed S`: seconds
and peak memory are those of the whole command. Beside it stands what `baselines.py` reaches on the same splits. What
was measured is kept in `benchmarks/results/NAME.json`, a seed at a time.
"""

# Nothing heavy is imported here: a child's peak memory begins with that of the process it was forked from.
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from firstlight.errors import did_you_mean

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results"
SEEDS = range(5)
BEGIN, END = "<!-- results: made by benchmarks/results.py -->", "<!-- end of results -->"


def measure(config: str, seed: int) -> dict[str, Any]:
    """Return what a run of an experiment and its baselines reach with a seed."""
    options = ["--config", config, "--seed_everything", str(seed), "--data.split_seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "firstlight", "run", *options, "--runs", folder])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            sys.exit(f"firstlight run {' '.join(options)} failed")
        (results,) = Path(folder).glob("*/*/results.json")
        metrics = json.loads(results.read_text())["metrics"]
    command = [sys.executable, "benchmarks/baselines.py", *options]
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    score = metrics[f"test/{found['metric']}"]
    return {"score": score, "seconds": round(seconds, 1), "MiB": round(usage.ru_maxrss / 1024), **found}


def spread(values: list[float]) -> str:
    """Return mean and standard deviation; one value where nothing is random."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(set(values)) > 1 else "")


def row(name: str, found: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    baselines = {each: spread([seed["baselines"][each] for seed in found]) for each in found[0]["baselines"]}
    cells = (
        f"`firstlight run --config configs/{name}.yaml`",
        found[0]["metric"],
        f"**{spread([seed['score'] for seed in found])}**",
        ", ".join(f"{each} {value}" for each, value in baselines.items()),
        f"{min(seed['seconds'] for seed in found):.0f}",
        f"{max(seed['MiB'] for seed in found):,}",
        f"{found[0]['parameters']:,}",
        str(len(found)),
    )
    return f"| {' | '.join(cells)} |"


def arguments(args: list[str] | None, known: list[str]) -> argparse.Namespace:
    """Return what was asked for: `names` of experiments, and whether nothing but the `table` is written."""
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1].strip(), allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(args)
    for name in given.names:
        if name not in known:
            parser.error(f"there is no configs/{name}.yaml{did_you_mean(name, known)}")
    if given.table and given.names:
        parser.error(f"--table measures nothing, but {', '.join(given.names)} was to be measured")
    return given


def main(args: list[str] | None = None) -> None:
    """Measure, and write the table."""
    os.chdir(ROOT)
    configs = sorted(Path("configs").glob("*.yaml"))
    given = arguments(args, [config.stem for config in configs])
    for name in given.names:
        (KEPT / f"{name}.json").unlink(missing_ok=True)
    kept: dict[str, dict[str, Any]] = {}
    for config in configs:
        path = KEPT / f"{config.stem}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for seed in SEEDS:
            if str(seed) not in found and not given.table and config.stem in (given.names or [config.stem]):
                found[str(seed)] = measure(str(config), seed)
                path.write_text(json.dumps(found, indent=1) + "\n")
        if found:
            kept[config.stem] = found
    head = "| command | test metric | firstlight | baselines | seconds | MiB | parameters | seeds |"
    rows = [row(name, list(found.values())) for name, found in kept.items()]
    machines = sorted({seed["machine"] for found in kept.values() for seed in found.values()})
    note = (
        "Mean ± standard deviation over the seeds from 0 on (`--seed_everything S --data.split_seed S`), the least "
        "seconds of the whole command (on a machine that others use too, more is their part), the largest peak memory. "
        f"{'; '.join(machines)}."
    )
    table = "\n".join([BEGIN, "", head, "|---|---|---|---|---|---|---|---|", *rows, "", note, "", END])
    page = ROOT / "configs" / "README.md"
    text = page.read_text()
    page.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])
    print(table)


if __name__ == "__main__":
    main()
