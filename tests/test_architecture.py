import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import firstlight

SOURCE = Path(firstlight.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
ANYONE = {"errors"}


def arrows():
    """Read from docs/architecture.md which part may import what; None stands for everything."""
    found = {"__init__": set()}
    for line in PAGE.split("```")[1].splitlines():
        if line.startswith("  "):
            part, _, may = re.split(r"\s{2,}", line.strip())
            names = set(may.split(" (")[0].replace("-", "").split(", ")) - {""}
            found[part.removesuffix(".py").removesuffix("/")] = None if names == {"everything"} else names
    return found


ARROWS = arrows()
LIGHT = ("networks", "losses", "schedules", "optim", "runs", "errors")


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "firstlight":
                yield from (f"firstlight.{name.name}" for name in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_each_file_imports_only_along_its_arrows(path):
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert part in ARROWS, f"{part} has no line in docs/architecture.md"
    if ARROWS[part] is None:
        return
    for name in imported_names(path):
        first, _, rest = name.partition(".")
        wanted = rest.split(".")[0] if first == "firstlight" else first
        allowed = ARROWS[part] | ANYONE | {part, "__version__"} | sys.stdlib_module_names
        assert wanted in allowed, f"{path.name} of {part} imports {name}"


def test_the_architecture_page_names_no_part_that_is_not_there():
    there = {path.name.removesuffix(".py") for path in SOURCE.iterdir()}
    assert ARROWS.keys() <= there


def test_nothing_imports_the_command_line():
    importers = {path.name for path in SOURCE.rglob("*.py") if "firstlight.cli" in imported_names(path)}
    assert not importers


def test_light_parts_do_not_import_lightning():
    code = "".join(f"import firstlight.{part}\n" for part in LIGHT) + "import sys; print('lightning' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_help_imports_nothing_heavy():
    code = "from firstlight.__main__ import main; main(['--help']); import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"


def test_files_stay_small():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
