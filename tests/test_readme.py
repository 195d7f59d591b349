"""Commands and snippets in the README run, links have a target, and `docs/architecture.md` names what exists."""

import re
import shlex
import subprocess
import sys

import pytest

from firstlight.__main__ import main
from firstlight.callbacks.defaults import DEFAULTS
from tests.helpers import ROOT, Ranks, called

PAGE = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = {match[1]: text for text in SNIPPETS if (match := re.match(r"# (\w+\.py)\n", text))}
"""Snippets that are a file: their first line is its name."""
COMMANDS = [
    line.split("#")[0].strip()
    for line in "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    if line.startswith(("firstlight ", "cd ", "python "))
]


def execute(snippet):
    exec(snippet, {"__name__": "__main__"})


@pytest.mark.parametrize("snippet", [each for each in SNIPPETS if each not in FILES.values()])
def test_readme_snippet_runs_without_warnings(snippet, tmp_path):
    assert "Warning" not in Ranks(execute, snippet, cwd=tmp_path).succeed().stderr


def test_readme_commands_run_in_their_order(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, text in FILES.items():
        for folder in (tmp_path, tmp_path / "bikes"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    assert COMMANDS[0] == "firstlight run --config configs/digits_mlp.yaml"
    cwd = tmp_path
    for number, line in enumerate(COMMANDS):
        if number and line.startswith(("firstlight run ", "firstlight repeat ")):
            line += " --report false"  # The first command writes a report.
        if line.startswith(("firstlight run ", "firstlight repeat ", "firstlight sweep ")):
            line += " --trainer.max_epochs 1"
        elif line.startswith("firstlight fit --run "):
            line += " --trainer.max_epochs 2"
        if line.startswith("firstlight sweep "):
            line += " --trials 2 --seeds 0"
        line = re.sub(r"\$\(cat (\S+)\)", lambda match, cwd=cwd: (cwd / match[1]).read_text().strip(), line)
        program, *args = shlex.split(line)
        if program == "cd":
            cwd = cwd / args[0]
        elif program == "python":
            subprocess.run([sys.executable, *args], cwd=cwd, check=True)
            cwd = tmp_path  # The commands of the next section.
        elif "overlays/ddp" in line:
            Ranks(main, args, cwd=cwd, ranks=2).succeed()
        else:
            called(*args, cwd=cwd)


def test_readme_shows_the_verbs_and_what_new_prints_as_they_are(tmp_path):
    _, verbs, *_ = called("--help", cwd=tmp_path).stdout.split("\n\n")
    assert f"```text\n{verbs}\n```" in PAGE
    new = called("new", "bikes", "--data", str(ROOT / "configs/data/bicycles.csv"), "--target", "price", cwd=tmp_path)
    assert f"```text\n{new.stdout}```" in PAGE
    assert ", ".join(f"`{name}`" for name in DEFAULTS) in " ".join(PAGE.split())


def test_links_to_files_have_a_target():
    pages = [*ROOT.glob("*.md"), ROOT / "configs" / "README.md", *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| ([^|]*`[\w/]+\.py`[^|]*) \|([^|]*)\|$", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize(("files", "names"), ROWS, ids=range(len(ROWS)))
def test_architecture_page_names_files_and_functions_that_exist(files, names):
    package = ROOT / "src" / "firstlight"
    source = "\n".join((package / file).read_text() for file in re.findall(r"`([\w/]+\.py)`", files))
    for name in re.findall(r"`([\w.]+)`", names):
        pattern = rf"(def|class) {name.split('.')[-1]}\b|^{name}\b"
        assert re.search(pattern, source, re.MULTILINE), f"{files} has no {name}"


@pytest.mark.parametrize("row", re.findall(r"^\| (`.*?) \|", ARCHITECTURE.partition("## Workarounds")[2], re.MULTILINE))
def test_upstream_page_describes_each_workaround(row):
    described = (ROOT / "docs" / "upstream.md").read_text()
    for name in re.findall(r"`([\w.]+)`", row):
        assert re.search(rf"\b{name.split('.')[-1]}\b", described), f"docs/upstream.md does not name {name}"


def test_upstream_page_names_code_that_exists():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for sentence in re.findall(r"We\s+delete[^.]*(?:\.\w[^.]*)*\.", (ROOT / "docs" / "upstream.md").read_text()):
        for name in re.findall(r"`([\w.]+)`", sentence):
            assert re.search(rf"\b{name.split('.')[-1]}\b", source), f"docs/upstream.md names {name}"
