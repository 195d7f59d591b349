"""The model card of an exported model."""

from collections.abc import Mapping
from typing import Any

import yaml

from firstlight.checkpoints.allowed import without_locations
from firstlight.run import console
from firstlight.run.export.formats import Format

_SHOWN = ("model", "data", "trainer", "seed_everything")
"""Parts of the configuration in the card, without locations, because people share it."""

_MAX_LISTED, _MAX_ROWS = 20, 100


def model_card(description: Mapping[str, Any], form: Format, facts: Mapping[str, Any]) -> str:
    """Return the model card in Markdown.

    Args:
        description: What a program must know to use the model.
        form: The format of the model's file.
        facts: `name`, `data`, `splits`, `validation`, `refit_steps`, `test`, `findings`, `config` and `largest`.
    """
    inputs, classes = description["inputs"], description["class_names"]
    shape = ", ".join(map(str, inputs["shape"]))
    validation, refit_steps = console.listed(facts["validation"]), facts["refit_steps"]
    checkpoint = [f"- checkpoint: {validation}"]
    if refit_steps is not None:
        checkpoint = [f"- checkpoint: {refit_steps:,} steps on the training and validation samples"]
        checkpoint += [f"- best checkpoint, of the training samples alone: {validation}"] if validation else []
    lines = [
        f"# {facts['name']}",
        "",
        f"`{description['network']}`, trained by firstlight {description['versions']['firstlight']} for "
        f"{description['task']}.",
        "",
        "## Load",
        "",
        f"```python\n{form.usage}\n```",
        "",
        f"Inputs: `({shape})` {inputs['dtype']}, {inputs['meaning']}. Scaling and encoding are inside the model.",
        "",
        *_columns(inputs["columns"]),
        f"Outputs: {', '.join(f'`{name}`' for name in description['outputs'])}, each with the batch as first axis.",
        *([f"Classes, in the order of their indices: {_listed(classes)}."] if classes else []),
        *([f"Targets: {_listed(description['targets'])}."] if description["targets"] else []),
        "",
        "## Data",
        "",
        f"{facts['data']}: {', '.join(f'{size:,} {split}' for split, size in facts['splits'].items())} samples."
        + " The model has seen those of train and val." * (refit_steps is not None),
        "",
        "## Metrics",
        "",
        *checkpoint,
        *([f"- test split: {console.listed(facts['test'])}"] if facts["test"] else []),
        f"- the file against the checkpoint on the test split: largest difference {facts['largest']:.2g}, as a share "
        "of the largest value of an output, or of its integers",
        "",
    ]
    if facts["findings"]:
        lines += ["## Findings", ""]
        lines += [
            f"- {each['severity']}: {': '.join(filter(None, [each['text'], each.get('advice')]))}"
            for each in facts["findings"]
        ]
        lines.append("")
    shown = _given(without_locations({name: facts["config"][name] for name in _SHOWN if name in facts["config"]}))
    lines += ["## Configuration", "", f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"]
    return "\n".join(lines) + "\n"


def _columns(columns: list[dict[str, Any]]) -> list[str]:
    """Return the columns of the inputs as a table."""
    if not columns:
        return []
    lines = ["| column | kind | unit | values |", "|---|---|---|---|"]
    for each in columns[:_MAX_ROWS]:
        values = _listed(each.get("categories", [])) or each.get("format", "")
        lines.append(f"| {each['name']} | {each['kind']} | {each.get('unit', '')} | {values} |".replace("\n", " "))
    more = [f"| and {len(columns) - _MAX_ROWS:,} more, see model.json | | | |"] if len(columns) > _MAX_ROWS else []
    return [*lines, *more, ""]


def _given(value: Any) -> Any:
    """Return a configuration without the options that are null."""
    if isinstance(value, Mapping):
        return {name: _given(each) for name, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED:,} more, see model.json" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
