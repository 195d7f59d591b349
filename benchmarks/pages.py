"""Write what a benchmark found into a page."""

import re
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between the comments `NAME: made by ...` and `end of NAME` of a page.

    Raises:
        ValueError: When the page does not have both, once each.
    """
    pattern = rf"(<!-- {name}: made by [^\n]* -->\n).*?(<!-- end of {name} -->)"
    written, count = re.subn(pattern, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page.read_text(), flags=re.S)
    if count != 1:
        raise ValueError(f"{page} has {count} sections {name}, and not 1")
    page.write_text(written)
