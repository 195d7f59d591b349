"""The report of a run: one HTML page that needs no network, or Markdown with its charts beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from firstlight.insight.report import sections
from firstlight.insight.report.charts import Line, in_light_colours
from firstlight.insight.report.sections import Run, number, worst
from firstlight.insight.report.sweep import SweepFacts, Trial, short_names, sweep_sections

__all__ = ["Line", "Run", "SweepFacts", "Trial", "markdown", "page", "short_names", "sweep_page", "worst"]

_CHART_OF = {
    "overfitting": "loss",
    "underfitting": "loss",
    "no_learning": "loss",
    "plateau": "loss",
    "noisy_validation": "loss",
    "stopped_too_early": "loss",
    "learning_rate_too_high": "loss",
    "learning_rate_too_low": "loss",
    "schedule_mismatch": "learning-rate",
    "vanishing_gradient": "gradient-norms",
    "exploding_gradient": "gradient-norms",
    "clipping_always": "gradient-norms",
    "class_collapse": "confusion-matrix",
}
"""The section whose chart shows a finding."""


def page(run: Run, folder: Path, config: str) -> str:
    """Return the HTML page of a run.

    Args:
        run: What was recorded.
        folder: The run directory, for its name.
        config: Text of `config.yaml`.
    """
    return str(_template("report.html.jinja", escapes=True).render(_content(run, folder, config)))


def sweep_page(trials: Sequence[Trial], importance: Mapping[str, float], facts: SweepFacts) -> str:
    """Return the HTML page of a sweep.

    Args:
        trials: All trials that have ended.
        importance: Share of each parameter in what the values differ by.
        facts: What the page says beside them.
    """
    content = {"facts": facts, "sections": sweep_sections(trials, importance, facts.monitor, facts.mode)}
    return str(_template("sweep.html.jinja", escapes=True).render(content))


def markdown(run: Run, folder: Path, config: str) -> tuple[str, dict[str, str]]:
    """Return the report in Markdown, and by file name the charts, which stand beside it."""
    content = _content(run, folder, config)
    files = {f"{each.anchor}.svg": in_light_colours(each.chart) for each in content["sections"] if each.chart}
    shown = [{**vars(each), "file": f"report/{each.anchor}.svg" if each.chart else ""} for each in content["sections"]]
    return str(_template("report.md.jinja", escapes=False).render({**content, "sections": shown})), files


def _template(name: str, escapes: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=escapes, trim_blocks=not escapes, lstrip_blocks=not escapes)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name)


def _content(run: Run, folder: Path, config: str) -> dict[str, Any]:
    found = [*sections.curves(run), *sections.schedule(run), *sections.gradients(run)]
    found += [*sections.predictions(run), *sections.errors(run)]
    results = run.results
    knows_data = results.get("facts", {}).get("data_findings") is not None
    return {
        "name": folder.parent.name,
        "run": folder.name,
        "summary": _summary(results, config),
        "metrics": _metrics(results),
        "silence": f"No finding in the recorded numbers{' and the data' if knows_data else ''}.",
        "unknown": (
            "That does not tell whether the score is good: compare it with what is possible."
            + ("" if knows_data else " The data were not looked at, because no data module of firstlight holds them.")
        ),
        "findings": [_finding(each, {section.anchor for section in found}) for each in results.get("findings", [])],
        "sections": found,
        "config": config.rstrip(),
        "command": f"firstlight run --config {folder / 'config.yaml'}",
        "environment": [*results.get("versions", {}).items()],
    }


def _summary(results: Mapping[str, Any], config: str) -> list[tuple[str, str]]:
    parts = yaml.safe_load(config) or {}

    def name(*keys: str) -> str:
        value: Any = parts
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        value = value.get("class_path", "") if isinstance(value, dict) else value
        return str(value or "").rsplit(".", 1)[-1]

    best = results.get("best", {})
    where = f"epoch {best['epoch']}, step {best['step']:,}" if {"epoch", "step"} <= best.keys() else ""
    rows = [
        ("ended", str(results.get("error", results.get("ending", "")))),
        ("model", name("model")),
        ("network", name("model", "init_args", "network")),
        ("loss", name("model", "init_args", "loss")),
        ("optimiser", name("model", "init_args", "optimizer")),
        ("data", name("data")),
        ("steps", number(results.get("steps"))),
        ("best checkpoint", where),
        ("seconds", number(results.get("seconds"))),
        ("seed", str(parts.get("seed_everything", ""))),
    ]
    return [(key, value) for key, value in rows if value]


def _metrics(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics of the best checkpoint on validation and test, one row for each."""
    splits = {"validation": ("val/", results.get("best", {})), "test": ("test/", results.get("metrics", {}))}
    of = {
        title: {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        for title, (prefix, values) in splits.items()
    }
    of = {title: values for title, values in of.items() if values}
    names = dict.fromkeys(name for values in of.values() for name in values)
    rows = [[name, *(number(values.get(name)) for values in of.values())] for name in names]
    return {"header": ["metric", *of], "rows": rows}


def _finding(found: Mapping[str, Any], anchors: set[str]) -> dict[str, Any]:
    since = []
    if found.get("epoch") is not None:  # Stored from 0, shown from 1, as a run prints them.
        since = [f"epoch {found['epoch'] + 1:,}", f"step {found['step'] + 1:,}"]
    anchor = _CHART_OF.get(found["name"], "")
    figures = found.get("evidence", {})
    evidence = [(key, number(each) if isinstance(each, int | float) else str(each)) for key, each in figures.items()]
    text, advice = found["text"], str(found.get("advice", "")).rstrip(".")
    return {
        **found,
        "text": text[:1].upper() + text[1:],
        "advice": advice,
        "since": f"since {', '.join(since)}" if since else "",
        "anchor": anchor if anchor in anchors else "",
        "evidence": evidence,
    }
