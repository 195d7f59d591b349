"""Train runs with planted faults and sound ones, and count what the findings say about them.

    python benchmarks/faults.py --runs DIR --train           train the runs that DIR lacks, then print the score
    python benchmarks/faults.py --runs DIR                   print the score of the runs in DIR, without training
    python benchmarks/faults.py --runs DIR --half "held out" --write    write the table of docs/faults.md

`--only FAMILY` takes one family, or `clean`; `--half development` are the runs that rules may be tuned on. A run is
trained again if its configuration or the planted modules have changed, and with `--again` also if the code that records
it has. The runs are in `benchmarks/planted/catalogue.py` and `held_out.py`. A run takes about two seconds on one core.
"""

import argparse
import ast
import hashlib
import inspect
import io
import json
import re
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import yaml
from pages import write_section
from planted import catalogue, held_out
from planted.catalogue import ROOT, Case

from firstlight.__main__ import main as firstlight
from firstlight.data.quality.finding import Finding
from firstlight.insight.findings import find
from firstlight.insight.record import Record

DOCS = ROOT / "docs" / "faults.md"
ALARMS = ("warning", "fault")
_RECORDER = (
    "insight/record",
    "callbacks/insight",
    "callbacks/activations",
    "callbacks/fixed_sample",
    *(f"callbacks/facts/{each}" for each in ("plan", "network", "outputs", "losses", "data")),
)
QUALITY = {"accuracy": 1, "balanced_accuracy": 1, "r2": 1, "nn_accuracy": 1, "bits_per_byte": -1}
"""Metrics that tell how good a run is, and whether more is better. Unlike the loss, no planted fault changes them."""


@dataclass(frozen=True)
class Verdict:
    """What the findings say about a run.

    Args:
        case: The run.
        findings: Its findings, the likeliest cause first.
        code: Exit code of the run.
        quality: Its last validation, see `quality`.
    """

    case: Case
    findings: Sequence[Finding]
    code: int
    quality: dict[str, float]

    @property
    def alarms(self) -> list[str]:
        """Return the names of warnings and faults."""
        return [finding.name for finding in self.findings if finding.severity in ALARMS]

    @property
    def is_right(self) -> bool:
        """Return whether the first warning or fault names the cause."""
        return self.alarms[:1] != [] and self.alarms[0] in self.case.accepts


def cases() -> list[Case]:
    """Return the runs of both halves."""
    return catalogue.cases() + held_out.cases()


def digest(*parts: str) -> str:
    """Return a short digest of texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def stamp(case: Case) -> dict[str, str]:
    """Return digests of what a run depends on: its configuration and planted classes, and what records it."""
    text = json.dumps(case.config, sort_keys=True)
    sources = []
    for module, name in sorted(set(re.findall(r"planted\.(\w+)\.(\w+)", text))):
        planted = getattr(import_module(f"planted.{module}"), name)
        own = [each for each in planted.__mro__ if each.__module__.startswith("planted.")]
        sources += [ast.unparse(ast.parse(inspect.getsource(each))) for each in own]  # Without comments and format.
    package = ROOT / "src" / "firstlight"
    recorder = [(package / f"{name}.py").read_text() for name in _RECORDER]
    return {"config": digest(text, str(case.seed), *sources), "recorder": digest(*recorder)}


def folder(runs: Path, case: Case) -> Path | None:
    """Return the run directory of a case, if it was trained."""
    return next((path.parent for path in (runs / case.id).glob("*/*/results.json")), None)


def state(runs: Path, case: Case) -> str:
    """Return whether a case is `"missing"`, `"changed"`, recorded by `"other code"`, or `"done"`."""
    path = runs / case.id / "stamp.json"
    if not path.is_file():
        return "missing"
    old, new = json.loads(path.read_text()), stamp(case)
    if old["config"] != new["config"]:
        return "changed"
    return "done" if old["recorder"] == new["recorder"] else "other code"


def train(runs: Path, case: Case) -> tuple[int, str]:
    """Train a case in this process; return its exit code and what it printed."""
    place = runs / case.id
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(case.config, sort_keys=False))
    printed, start = io.StringIO(), time.monotonic()
    options = ["--config", str(place / "config.yaml"), "--runs", str(place), "--seed_everything", str(case.seed)]
    with chdir(ROOT), warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
        warnings.simplefilter("ignore")
        try:
            code = firstlight(["fit", *options])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except Exception as error:  # A bug is reported with the others; the other runs are still of use.
            code = 3
            printed.write(f"{type(error).__name__}: {error}")
    (place / "printed.txt").write_text(printed.getvalue())
    for checkpoints in place.glob("*/*/checkpoints"):
        shutil.rmtree(checkpoints)
    facts = {"code": code, "seconds": round(time.monotonic() - start, 1), **stamp(case)}
    (place / "stamp.json").write_text(json.dumps(facts))
    return code, printed.getvalue()


def quality(record: Record) -> dict[str, float]:
    """Return the last value of each metric of validation that tells how good a run is, and the loss."""
    found = {name.removeprefix("val/"): each for name, each in record.series.items() if name.startswith("val/")}
    return {
        name: float(found[name].values[-1]) for name in (*QUALITY, "loss") if name in found and len(found[name].values)
    }


def judge(runs: Path, case: Case) -> Verdict:
    """Return what the findings say about a trained run."""
    done = json.loads((runs / case.id / "stamp.json").read_text())
    run = folder(runs, case)
    if run is None:
        return Verdict(case, [], done["code"], {})
    record = Record.read(run)
    data = in_data(run, record)
    record = replace(record, facts={**record.facts, "data_findings": [each.plain() for each in data]})
    seen = find(record)
    findings = [*seen, *(each for each in data if each not in seen)]  # As in results.json.
    return Verdict(case, [each for each in findings if each.name not in case.true], done["code"], quality(record))


def in_data(run: Path, record: Record) -> list[Finding]:
    """Return the findings in the data of a run; an older recorder kept their names only."""
    names = [each if isinstance(each, str) else each["name"] for each in record.facts.get("data_findings") or ()]
    stored = [Finding(**each) for each in json.loads((run / "results.json").read_text())["findings"]]
    return [each for each in stored if each.name in names and each.epoch is None]


def hurt(case: Case, found: dict[str, float], sound: dict[str, float]) -> str:
    """Return how much worse the last validation is than that of the sound run, or `""` if it is not.

    Leakage makes it look better than it is, so there the sound run must be worse. Without a validation, a run has
    failed.
    """
    sign = -1 if case.family == "leakage" else 1
    if not found:
        return "failed"
    for name, direction in QUALITY.items():
        if case.family == "imbalance" and name == "accuracy" and "balanced_accuracy" in found:
            continue  # The shares of the classes may differ between the two validation splits.
        if name in found and name in sound:
            worse = sign * direction * (sound[name] - found[name])
            # A fifth of what is missing to a perfect score, and two points.
            if not worse < max(0.02, 0.2 * (1 - sound[name])):
                return f"{name} {found[name]:.3f}, sound {sound[name]:.3f}"
    if case.family in ("missing regularisation", "wrong labels") and found["loss"] > 1.15 * sound["loss"]:
        return f"loss {found['loss']:.3f}, sound {sound['loss']:.3f}"
    return ""


@dataclass(frozen=True)
class Score:
    """How many runs with a fault were detected and named right, and how many sound ones got an alarm."""

    faults: int
    detected: int
    right: int
    sound: int
    alarmed: int


def score(verdicts: Sequence[Verdict]) -> Score:
    """Return the score of some runs."""
    sound = [verdict for verdict in verdicts if verdict.case.family == "clean"]
    faults = [verdict for verdict in verdicts if verdict.case.family != "clean"]
    detected, alarmed = (sum(bool(verdict.alarms) for verdict in some) for some in (faults, sound))
    return Score(len(faults), detected, sum(verdict.is_right for verdict in faults), len(sound), alarmed)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the score by family as Markdown."""
    lines = ["| family | runs | detected | right cause first |", "|---|---:|---:|---:|"]
    for family in dict.fromkeys(verdict.case.family for verdict in verdicts if verdict.case.family != "clean"):
        one = score([verdict for verdict in verdicts if verdict.case.family == family])
        lines.append(f"| {family} | {one.faults} | {one.detected} | {one.right} |")
    all_runs = score(verdicts)
    if all_runs.faults:
        shares = [f"{number} ({number / all_runs.faults:.1%})" for number in (all_runs.detected, all_runs.right)]
        lines.append(f"| **all faults** | {all_runs.faults} | {' | '.join(shares)} |")
    if all_runs.sound:
        share = all_runs.alarmed / all_runs.sound
        lines += ["", f"False alarms: {all_runs.alarmed} of {all_runs.sound} sound runs ({share:.1%})."]
    return "\n".join(lines)


def main(args: list[str]) -> Score:
    """Train what is missing, print the score and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", help="a family, or clean")
    parser.add_argument("--half", choices=("development", "held out"), help="one half of the runs")
    parser.add_argument("--train", action="store_true", help="train the runs that are missing or have changed")
    parser.add_argument("--again", action="store_true", help="train the runs of an older recorder, too")
    parser.add_argument("--hurt", action="store_true", help="list the faults that do not hurt")
    parser.add_argument("--write", action="store_true", help="write the table of docs/faults.md")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    chosen = [case for case in cases() if options.only in (None, case.family) and options.half in (None, case.half)]
    stale = ("missing", "changed", *(("other code",) if options.again else ()))
    for case in chosen:
        if options.train and state(options.runs, case) in stale:
            code, printed = train(options.runs, case)
            last = printed.strip().splitlines()[-1] if code and printed.strip() else ""
            print(f"{case.half:11} {case.id}: exit code {code} {last}", flush=True)
    # A run that was refused or has another configuration by now says nothing.
    done = [case for case in chosen if state(options.runs, case) in ("done", "other code")]
    done = [case for case in done if folder(options.runs, case) is not None]
    verdicts = [judge(options.runs, case) for case in done]
    for verdict in verdicts:
        case = verdict.case
        if case.family == "clean" and verdict.alarms:
            print(f"false alarm  {case.id}: {', '.join(verdict.alarms)}")
        elif case.family != "clean" and not verdict.is_right:
            print(f"{'other cause' if verdict.alarms else 'undetected':11}  {case.id}: {', '.join(verdict.alarms)}")
        if (case.family == "clean" and verdict.code) or verdict.code > 1:
            print(f"exit code {verdict.code}  {case.id}")
    if options.hurt:
        by_name = {(verdict.case.family, verdict.case.name, verdict.case.seed): verdict.quality for verdict in verdicts}
        for verdict in verdicts:
            case = verdict.case
            sound = by_name.get(("clean", case.sound, case.seed))
            if case.family != "clean" and sound is not None and verdict.code == 0:
                print(f"{hurt(case, verdict.quality, sound) or 'DOES NOT HURT'}  {case.id}")
    text = f"{len(done)} of {len(chosen)} runs are trained.\n\n{table(verdicts)}"
    print(f"\n{text}")
    if options.write:
        write_section(DOCS, "faults", text)
    return score(verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
