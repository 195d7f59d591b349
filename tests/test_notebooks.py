"""The notebooks are valid and complete; with `-m slow` they also run. Their outputs are committed."""

import ast
import base64
import re

import nbformat
import pytest

from tests.helpers import ROOT

FOLDER = ROOT / "notebooks"
CHAPTERS = [
    "01_neural_networks",
    "02_back_propagation",
    "03_losses",
    "04_optimisers_and_schedules",
    "05_regularisation",
    "06_normalisation",
    "07_pipeline",
    "08_what_is_wrong_with_this_run",
]
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def read(chapter):
    return nbformat.read(FOLDER / f"{chapter}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_of(notebook) for output in cell.outputs]


def faults(outputs):
    """Return outputs on standard error and exceptions."""
    return [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_each_chapter_has_one_notebook():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == CHAPTERS


@every_chapter
def test_notebook_is_valid_and_was_run_in_order(chapter):
    notebook = read(chapter)
    nbformat.validate(notebook)
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not faults(outputs_of(notebook))


@every_chapter
def test_notebook_imports_the_package_and_defines_nothing_reusable(chapter):
    nodes = [node for cell in code_of(read(chapter)) for node in ast.walk(ast.parse(cell.source))]
    assert any((node.module or "").startswith("firstlight") for node in nodes if isinstance(node, ast.ImportFrom))
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 5]


@every_chapter
def test_notebook_contains_no_machine_paths(chapter):
    notebook = read(chapter)
    texts = [cell.source for cell in notebook.cells]
    texts += [str(value) for output in outputs_of(notebook) for value in [output.get("text"), output.get("data", {})]]
    shown = re.sub(r"'image/png': '[^']*'", "", "\n".join(texts))
    assert not re.findall(r"""(?<![\w.)])(?:/[\w.+-]+){2,}|[A-Z]:\\|0x[0-9a-f]{6,}""", shown)


@every_chapter
def test_notebook_has_figures_below_100_kB(chapter):
    figures = [
        output.data["image/png"] for output in outputs_of(read(chapter)) if "image/png" in output.get("data", {})
    ]
    assert figures
    assert max(len(base64.b64decode(figure)) for figure in figures) < 100_000


@every_chapter
@pytest.mark.slow
def test_notebook_runs_and_creates_no_files(chapter):
    nbclient = pytest.importorskip("nbclient")
    before = sorted(ROOT.glob("*")), sorted(FOLDER.glob("*"))
    notebook = read(chapter)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    assert not faults(outputs_of(notebook))
    assert (sorted(ROOT.glob("*")), sorted(FOLDER.glob("*"))) == before
