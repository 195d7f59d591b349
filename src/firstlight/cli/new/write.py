"""Write the package of a person's own experiment."""

import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from firstlight.cli.new.look import Look, Text
from firstlight.data.quality.finding import Finding
from firstlight.errors import UsageError

_NETWORKS = {
    "table": "vector",
    "text": "text",
    "images": "image",
    "digits": "image",
    "corpus": "corpus",
}
_DATA = {
    "table": "Table",
    "arrays": "Arrays",
    "text": "LabelledText",
    "images": "ImageFolder",
    "digits": "Digits",
    "corpus": "Corpus",
}
_BATCHES = ((150, 16), (600, 32), (1500, 64), (4000, 128), (16_000, 256), (math.inf, 512))
"""Up to how many training rows of a table a batch has how many. Measured: docs/tables.md."""
_MIN_STEPS = 400
_MAX_EPOCHS, _MAX_SEEN = 100, 500_000
"""Most epochs, and most training rows that are seen in all of them."""
_MAX_EMBEDDED = 4096
"""Numbers times the width of their embeddings, at most."""


def package_files(folder: Path, look: Look, data: Path | None) -> dict[str, str]:
    """Return the content of the files of an experiment, by name in its folder."""
    package = _package_name(folder)
    title = folder.resolve().name
    values: dict[str, Any] = {**look.values, "package": Text(package), "title": title}
    values["path"] = None if data is None else os.path.relpath(data.resolve(), folder.resolve())
    values["summary"] = " ".join(look.seen[:1]) + "."
    values["data_class"] = _DATA[look.template]
    values["predict"] = "" if data is None else " --data.path NEW_FILE"
    network = _NETWORKS.get(look.template) or ("image" if values["is_image"] else "vector")
    if look.template == "table":
        values |= _table_values(values)
    if look.template == "arrays":
        values |= _training(values["train"])
    if look.template == "corpus":
        values |= _corpus_values(values["size"])
    names = {name: values.get(name) for name in ("target", "text")}
    values |= {f"{name}_name": Text(value) for name, value in names.items()}  # For comments.
    quoted = title.replace("\\", "\\\\").replace('"', '\\"')
    return {
        "config.yaml": _fill(f"{look.template}.yaml", values, as_yaml=True),
        "README.md": _fill("README.md.txt", values),
        f"{package}/__init__.py": f'"""The parts of {quoted}."""\n',
        f"{package}/network.py": _fill(f"network_{network}.py.txt", values),
        f"{package}/data.py": _fill("data.py.txt", values),
        f"{package}/callback.py": _fill("callback.py.txt", values),
        "tests/test_parts.py": _fill("test_parts.py.txt", values),
        "notebook.ipynb": _notebook(title, values["path"]),
    }


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Write the files of an experiment.

    Raises:
        UsageError: If a file exists already, or cannot be written.
    """
    taken = [name for name in contents if (folder / name).exists()]
    if taken:
        raise UsageError(f"{folder} has {taken[0]} already, and nothing is overwritten: choose another folder")
    try:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def find_in(config: str, data: Path) -> list[Finding]:
    """Return what looks wrong in a table, read as its configuration says.

    Raises:
        UsageError: If it cannot be read so.
    """
    import firstlight.data  # Imported here: it takes seconds.

    section = yaml.safe_load(config)["data"]
    kind = getattr(firstlight.data, section["class_path"].rpartition(".")[2])
    found: list[Finding] = kind(**{**section["init_args"], "path": str(data)}).findings_before_split()
    return found


def _fill(template: str, values: dict[str, Any], as_yaml: bool = False) -> str:
    text = (files("firstlight.cli.new") / "templates" / template).read_text(encoding="utf-8")
    if as_yaml:
        values = {name: _one_line(value) if isinstance(value, Text) else _yaml(value) for name, value in values.items()}
    return Template(text).substitute(values)


def _yaml(value: Any) -> str:
    """Return a value as YAML in one line."""

    def dump(style: str | None) -> str:
        text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=math.inf, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    text = dump(None)
    return dump('"') if "\n" in text else text  # Quoted, it holds the line breaks of a name as escapes.


def _one_line(value: Any) -> str:
    """Return a value as text that a comment in YAML may hold."""
    return " ".join("".join(each if each.isprintable() else " " for each in str(value)).split())


def _training(train: int) -> dict[str, Any]:
    """Return batch size, epochs and learning rate by the number of training rows."""
    batch = next(size for rows, size in _BATCHES if train < rows)
    steps = math.ceil(train / batch)  # An epoch
    epochs = max(min(_MAX_EPOCHS, _MAX_SEEN // train), math.ceil(_MIN_STEPS / steps))
    return {"batch_size": batch, "max_epochs": epochs, "lr": 0.003 if train < 600 else 0.005}


def _table_values(values: dict[str, Any]) -> dict[str, Any]:
    train, numbers = values["train"], values["numbers"]
    width = 16 if numbers * 16 <= _MAX_EMBEDDED else max(2, _MAX_EMBEDDED // numbers)
    return {
        **_training(train),
        "network": Text("" if width == 16 else f"embedding: {width}"),
        "min_frequency": max(1, min(5, train // 20)),
        "indicators": values["has_gaps"],
        "missing_targets": "drop" if values["drop_targets"] else "refuse",
    }


def _corpus_values(size: int) -> dict[str, Any]:
    if size < 300_000:
        return {
            "network": Text("width: 64, layers: 2, heads: 2, dropout: 0.1"),
            "windows": Text(
                "length: 64, context: 32, stride: 16, batch_size: 16, val_fraction: 0.1, test_fraction: 0.1"
            ),
            "max_epochs": 10,
        }
    return {
        "network": Text("width: 128, layers: 4, heads: 2, dropout: 0.05"),
        "windows": Text("length: 256, stride: 128, batch_size: 8, val_fraction: 0.05, test_fraction: 0.1"),
        "max_epochs": 5,
    }


def _package_name(folder: Path) -> str:
    """Return the name of a folder as that of a package that no installed one has."""
    name = re.sub(r"\W+", "_", folder.resolve().name.lower(), flags=re.ASCII).strip("_") or "experiment"
    name = f"my_{name}" if not name.isidentifier() else name
    return f"my_{name}" if name == "tests" or importlib.util.find_spec(name) else name


def _notebook(title: str, path: str | None) -> str:
    predict = ["predictor = firstlight.load(run)", f"predictor.predict({path!r}).head()"]
    if path is None:
        predict[1] = 'predictor.predict(load_digits().images[:5].astype("uint8"))'
        predict.insert(0, "from sklearn.datasets import load_digits\n")
    cells = [
        ("markdown", f"# {title}\n\nRun `firstlight run --config config.yaml` first."),
        ("code", "from pathlib import Path\n\nimport pandas as pd\n\nimport firstlight"),
        (
            "code",
            'runs = Path("runs/config")\nrun = runs / (runs / "latest").read_text().strip()\n'
            'metrics = pd.read_csv(run / "metrics.csv")\n'
            'curves = metrics.pivot_table(index="step", columns="name", values="value", aggfunc="last")',
        ),
        ("code", 'curves[["train/loss"]].dropna().plot()\ncurves[["val/loss"]].dropna().plot();'),
        ("code", "\n".join(predict)),
    ]
    content = {
        "cells": [
            {
                "id": f"cell{index}",
                "cell_type": kind,
                "metadata": {},
                "source": source.splitlines(keepends=True),
                **({"execution_count": None, "outputs": []} if kind == "code" else {}),
            }
            for index, (kind, source) in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1) + "\n"
