"""`firstlight new`: look at a person's data, and write an experiment of their own."""

from pathlib import Path

from firstlight.cli.new.look import look_at
from firstlight.cli.new.write import find_in, package_files, write_files
from firstlight.cli.tools import ToolParser
from firstlight.errors import printable

_MAX_FINDINGS = 4
_HELP = """firstlight new DIR --data PATH --target NAME    a table: predict the column NAME
       firstlight new DIR --data PATH --target NAME    arrays: the targets are the array NAME of the .npz
       firstlight new DIR --data PATH                  a folder of images, a text, arrays, or a table with a column
                                                       named target, label, class, y or outcome
       firstlight new DIR                              digits, as a first example"""


def new_parser() -> ToolParser:
    """Return the parser of `new`."""
    parser = ToolParser("new", _HELP, "Write an experiment of your own.")
    parser.add_argument(
        "dir", type=Path, nargs="?", metavar="DIR", help="Folder to write; its name becomes that of the package."
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="A table, text, arrays, or a folder of images.")
    parser.add_argument("--target", metavar="NAME", help="Column of the table, or array, to predict.")
    return parser


def new(args: list[str]) -> None:
    """Look at data, say what was seen and chosen, and write an experiment into a new folder."""
    found = new_parser().options(args, "dir", "a folder to write")
    data = None if found.data is None else found.data.expanduser()
    folder = found.dir.expanduser()
    look = look_at(data, found.target)
    contents = package_files(folder, look, data)
    findings = []
    if data is not None and look.template in ("table", "text"):
        findings = find_in(contents["config.yaml"], data)
    write_files(folder, contents)
    suspicious = [str(finding) for finding in findings[:_MAX_FINDINGS]]
    for heading, lines in (("saw", look.seen), ("look", suspicious), ("chose", look.chosen)):
        for index, line in enumerate(lines):
            print(printable(f"{'' if index else heading:<6} {line}"))
    print(f"wrote  {folder}: {', '.join(name for name in contents if '/' not in name)}, and parts of your own")
    print(f"next   cd {folder} && firstlight run --config config.yaml")
