"""The configurations that come with firstlight: `--config firstlight:NAME`, and their list.

An installed package holds `configs/` and the files that they name beside its modules. In a clone of the repository they
are at its root.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from firstlight.errors import UsageError, did_you_mean

PREFIX = "firstlight:"
_PACKAGE = Path(__file__).parents[1]
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1]
"""The folder that holds `configs/`; paths in the configurations are relative to it."""


def names() -> list[str]:
    """Return the names of all configurations; overlays are `overlays/NAME`."""
    folder = ROOT / "configs"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a configuration, or refuse an unknown name."""
    known = names()
    name = name.removesuffix(".yaml")
    if name not in known:
        raise UsageError(
            f"there is no configuration {PREFIX}{name}; firstlight configs lists all" + did_you_mean(name, known)
        )
    return ROOT / "configs" / f"{name}.yaml"


def with_files(args: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return arguments with files in place of the configurations `firstlight:NAME`, and these files."""
    found, full = set(), list(args)
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        is_value = place > 0 and args[place - 1] in ("--config", "-c")
        name = arg if is_value else value if equals and option in ("--config", "-c") else ""
        if name.startswith(PREFIX):
            path = str(find(name.removeprefix(PREFIX)))
            found.add(path)
            full[place] = path if is_value else f"{option}={path}"
    return full, found


def with_data(args: Sequence[str], files: set[str]) -> list[str]:
    """Return arguments with the content of these configuration files in place of those that name a file of firstlight.

    The paths in the content are absolute, so it can be used from any folder.
    """
    return [_located(arg, files) for arg in args]


def _located(arg: str, files: set[str]) -> str:
    option, equals, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
    if value not in files:
        return arg
    content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    options: dict[str, Any] = (content.get("data") or {}).get("init_args") or {}
    path = options.get("path")
    if not isinstance(path, str) or not (ROOT / path).exists():
        return arg
    options["path"] = str(ROOT / path)
    return option + equals + yaml.safe_dump(content, allow_unicode=True)


def listed() -> str:
    """Return a line for each configuration: its name, its first comment line, and its measured result."""
    results = {
        match[1]: f"{match[2]} {match[3]}"
        for match in re.finditer(
            r"^\| `firstlight run --config configs/([\w/]+)\.yaml` \| (\w+) \| \*\*([^*]+)\*\* \|",
            (ROOT / "configs" / "README.md").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    known = names()
    widths = max(map(len, known)), max(map(len, results.values()), default=0)
    lines = []
    for name in known:
        first = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        text = textwrap.shorten(first.lstrip("# "), 116 - sum(widths), placeholder=" ...")
        lines.append(f"{name:<{widths[0]}}  {results.get(name, ''):<{widths[1]}}  {text}")
    return "\n".join(lines)
