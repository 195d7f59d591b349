"""Measure the experiments over five seeds, and write the table in `configs/README.md`.

    python benchmarks/results.py                 measure the seeds that are missing, and write the table
    python benchmarks/results.py NAME [NAME...]  measure these experiments again, and write the table
    python benchmarks/results.py --table         write the table from the stored results

Each experiment runs as a user runs it, in its own process, with `--seed_everything S --data.split_seed S`. Seconds and
peak memory are those of the whole command. `baselines.py` scores the baselines on the same splits. Results are stored
in `benchmarks/results/NAME.json` after each seed.
"""

# Import nothing large here: the peak memory of a child process starts at that of this process.
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

from pages import write_section

from firstlight.errors import did_you_mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = range(5)


def measure(config: str, seed: int) -> dict[str, Any]:
    """Return the results of an experiment and of its baselines with a seed."""
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
    baselines = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    score = metrics[f"test/{baselines['metric']}"]
    return {"score": score, "seconds": round(seconds, 1), "MiB": round(usage.ru_maxrss / 1024), **baselines}


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text, or the mean alone if all values are equal."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(set(values)) > 1 else "")


def row(name: str, seeds: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    baselines = {each: spread([seed["baselines"][each] for seed in seeds]) for each in seeds[0]["baselines"]}
    cells = (
        f"`firstlight run --config configs/{name}.yaml`",
        seeds[0]["metric"],
        f"**{spread([seed['score'] for seed in seeds])}**",
        ", ".join(f"{each} {value}" for each, value in baselines.items()),
        f"{min(seed['seconds'] for seed in seeds):.0f}",
        f"{max(seed['MiB'] for seed in seeds):,}",
        f"{seeds[0]['parameters']:,}",
        str(len(seeds)),
    )
    return f"| {' | '.join(cells)} |"


def parse(args: list[str] | None, experiments: list[str]) -> argparse.Namespace:
    """Return the parsed arguments: `names` of experiments to measure again, and whether to write the `table` only."""
    parser = argparse.ArgumentParser(usage=__doc__.split("\n\n")[1].strip(), allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(args)
    for name in options.names:
        if name not in experiments:
            parser.error(f"there is no configs/{name}.yaml{did_you_mean(name, experiments)}")
    if options.table and options.names:
        parser.error(f"--table measures nothing: leave out --table, or {' '.join(options.names)}")
    return options


def main(args: list[str] | None = None) -> None:
    """Measure, and write the table."""
    os.chdir(ROOT)
    configs = sorted(Path("configs").glob("*.yaml"))
    options = parse(args, [config.stem for config in configs])
    for name in options.names:
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for config in configs:
        path = RESULTS / f"{config.stem}.json"
        seeds = json.loads(path.read_text()) if path.exists() else {}
        for seed in SEEDS:
            if str(seed) not in seeds and not options.table and config.stem in (options.names or [config.stem]):
                seeds[str(seed)] = measure(str(config), seed)
                path.write_text(json.dumps(seeds, indent=1) + "\n")
        if seeds:
            results[config.stem] = seeds
    head = "| command | test metric | firstlight | baselines | seconds | MiB | parameters | seeds |"
    rows = [row(name, list(seeds.values())) for name, seeds in results.items()]
    machines = sorted({seed["machine"] for seeds in results.values() for seed in seeds.values()})
    note = (
        "Scores are mean ± standard deviation over the seeds 0, 1, ... (`--seed_everything S --data.split_seed S`). "
        "Seconds are the shortest time of the whole command, because other work on the machine can only add to it. "
        f"MiB is the highest peak memory. {'; '.join(machines)}."
    )
    table = "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows, "", note])
    write_section(ROOT / "configs" / "README.md", "results", table)
    print(table)


if __name__ == "__main__":
    main()
