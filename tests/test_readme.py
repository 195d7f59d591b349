import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers import ROOT, called

PAGE = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for line in "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    if line.startswith(("firstlight ", "head "))
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_of_the_readme_runs(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_every_command_of_the_readme_runs_in_order(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    first = "firstlight run --config configs/digits_mlp.yaml"
    assert first in PAGE
    for line in [first, *COMMANDS]:
        program, *args = shlex.split(line)
        if program == "firstlight" and "overlays/ddp" not in line and "$(" not in line:
            called(*args, cwd=tmp_path)
        else:
            command = line.replace("firstlight ", f"{sys.executable} -m firstlight ", 1)
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (line, done.stderr)


def test_every_file_that_a_page_links_to_is_there():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"
