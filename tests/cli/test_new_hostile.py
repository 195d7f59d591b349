"""Files as strangers have them: each gives a run, or one line that says what is wrong."""

import csv
import gzip
import io

import numpy as np
import pytest

from tests.helpers import called

GENERATOR = np.random.default_rng(1)
COUNT = 120


def rows(count=COUNT):
    for index in range(count):
        number = GENERATOR.normal(50, 10)
        yield [
            f"{number:.2f}",
            ["red", "green", "blue"][index % 3],
            "yes" if number + GENERATOR.normal() > 50 else "no",
        ]


def text(header=("size", "colour", "target"), lines=None, separator=",", end="\n", quoting=csv.QUOTE_MINIMAL):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([header, *(rows() if lines is None else lines)])
    return buffer.getvalue()


def with_column(name, values):
    return text(
        ("size", "colour", name, "target"),
        [[*row[:2], value, row[2]] for row, value in zip(rows(), values, strict=True)],
    )


def decimal_comma():
    return text(lines=[[row[0].replace(".", ","), *row[1:]] for row in rows()], separator=";")


def cut(count):
    return text(lines=[*rows(count)])


WIDE = (*(f"x{index}" for index in range(2000)), "target")
FILES = {
    "latin-1": text(lines=[[row[0], "größe", row[2]] for row in rows()]).encode("latin-1"),
    "UTF-16": text().encode("utf-16"),
    "byte order mark": text().encode("utf-8-sig"),
    "semicolons": text(separator=";").encode(),
    "tabs": text(separator="\t").encode(),
    "bars": text(separator="|").encode(),
    "old mac": text(end="\r").encode(),
    "all quoted": text(quoting=csv.QUOTE_ALL).encode(),
    "gzip": gzip.compress(text().encode()),
    "half a gzip": gzip.compress(text().encode())[:100],
    "decimal comma": decimal_comma().encode(),
    "decimal comma as target": decimal_comma().replace("target", "x").replace("size", "target").encode(),
    "ISO dates": with_column("day", [f"2024-01-{1 + index % 28:02d}" for index in range(COUNT)]).encode(),
    "ambiguous dates": with_column(
        "day", [f"{1 + index % 12}/{1 + index % 11}/2024" for index in range(COUNT)]
    ).encode(),
    "American dates": with_column("day", [f"1/{1 + index % 28}/2024 0:00" for index in range(COUNT)]).encode(),
    "mixed types": with_column("mixed", ["12", "about 13", "?", "2024-01-01"] * 30).encode(),
    "numbers with units": with_column("weight", [f"{index} kg" for index in range(COUNT)]).encode(),
    "amounts of money": with_column("price", [f"${index},000" for index in range(COUNT)]).encode(),
    "one row": cut(1).encode(),
    "two rows": cut(2).encode(),
    "nine rows": cut(9).encode(),
    "no rows": text(lines=[]).encode(),
    "empty": b"",
    "one column": text(("target",), [[row[2]] for row in rows()]).encode(),
    "2,000 columns": text(WIDE, [[*GENERATOR.integers(0, 9, 2000), index % 2] for index in range(60)]).encode(),
    "one class": text(lines=[[*row[:2], "yes"] for row in rows()]).encode(),
    "a class of one row": text(lines=[*rows(), ["3", "red", "maybe"]]).encode(),
    "Excel's separator line": ("sep=;\n" + text(separator=";")).encode(),
    "an Excel file": b"PK\x03\x04" + bytes(100),
    "empty lines and columns": text(("size", "colour", "target", ""), [[*row, ""] for row in rows()]).encode()
    + b"\n\n,,,\n",
    "equal names": text(("size", "size", "target")).encode(),
    "a title above the header": ("Our customers\n\n" + text()).encode(),
    "rows of other lengths": text(lines=[*rows(), ["1", "2", "3", "4"]]).encode(),
    "missing everywhere": with_column("gap", ["", "NA", "n/a", "-"] * 30).encode(),
    "missing targets": text(
        lines=[[*row[:2], row[2] if index % 3 else ""] for index, row in enumerate(rows())]
    ).encode(),
    "infinity": with_column("x", ["inf", "-inf", "1e999", "2"] * 30).encode(),
    "long integers": with_column("account", [str(10**18 + index) for index in range(COUNT)]).encode(),
    "names with spaces and signs": text(("the size: [cm]", "#colour, 'x'", "target")).encode(),
    "names that YAML reads as other things": text(("yes", "1.5", "target")).encode(),
    "NUL bytes": text().replace("red", "r\0d").encode(),
}


@pytest.mark.slow
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_hostile_file_gives_a_run_or_one_line(content, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    for options, cwd in (
        (["new", "mine", "--data", "data.csv", "--target", "target"], tmp_path),
        (["run", "--config", "config.yaml", "--trainer.max_epochs=2"], tmp_path / "mine"),
    ):
        try:
            called(*options, cwd=cwd)
        except AssertionError:
            error = called(*options, cwd=cwd, code=2).stderr
            assert error.startswith("firstlight: ") and error.count("\n") == 1, error
            print(error)
            return
