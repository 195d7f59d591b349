import csv
import datetime

import pytest

from firstlight.data import Table
from firstlight.data.columns import describe_column
from firstlight.data.files import read_table
from firstlight.errors import UsageError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\xff\n", r"data\.csv is not UTF-8: line 2 has the byte 0xff; convert it, for example: iconv"),
        (b'a,b\n1,"2\n3,4\n', r"not a CSV file: line 2: unexpected end of data; a quote .* must be written as \"\""),
        (b'a,b\n1,2\n1,"2" or 3\n', r"line 3: ',' expected after '\"'; a quote in a value must be written as \"\""),
        (b"a,b,c\n1,2\n", r"data\.csv: line 2 has 2 values, but the header has 3 columns$"),
        (b'a,"b\n1,2"\n3,4\n', r"data\.csv: line 1 has a quoted value of 2 lines that read like rows"),
        (b"a,b\n1,2\n3,4\0\n", r"data\.csv is not a CSV file: line 3 has the byte 0x00"),
        ("a,b\n1,2\n".encode("utf-16"), r"data\.csv is text in UTF-16: it must be a CSV file in UTF-8"),
        (b"PAR1\x15\x04", r"data\.csv is not a Parquet file that can be read: .*"),
        (b"\x1f\x8b\x08", r"data\.csv is damaged: "),
        (b"PK\x03\x04\x14", r"data\.csv is a zip archive, like \.xlsx and \.npz: it must be a CSV file"),
        (b"\x93NUMPY\x01\0", r"data\.csv is a \.npy file: it must be a CSV file"),
        (b"a,b\n1,2,3\n", r"line 2 has 3 values, .* 2 columns; a value with a separator must be in quotes"),
        (b",b\n1,2\n", r"column 1 is named '': .* not empty; pandas leaves out its index with to_csv\(index=False\)"),
        (b"b, b\n1,2\n", r"data\.csv: column 2 is named 'b': column names must be unique and not empty$"),
        (b"\xef\xbb\xbf", r"data\.csv is empty: its first line must name the columns"),
        (b"a,a\n1,2\n", r"data\.csv: column 2 is named 'a': column names must be unique and not empty"),
        (b"", r"data\.csv is empty: its first line must name the columns"),
        (None, r"cannot read .*data\.csv: No such file"),
    ],
)
def test_file_that_is_not_a_table_is_refused(content, message, tmp_path):
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Table(str(path), "b", "regression").setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'name,x,y\r\n\r\n"two\r\nlines",1,2\r\n\r\nfour,bad,3\r\n', r"data\.csv: 1 row .* line 6 column x \(bad\)"),
        (b'name,x,y\n"two\nlines",bad,2\nc,1,2\n', r"data\.csv: 1 row .* line 2 column x \(bad\)"),
        (b'name,x,y\na,1,2\n"b,3,4\nc,5,6\n', r"data\.csv is not a CSV file: line 3: unexpected end of data"),
    ],
    ids=["after an empty line", "with a line break", "with an open quote"],
)
def test_messages_name_the_line_where_a_row_begins_in_an_editor(content, message, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Table(str(tmp_path / "data.csv"), "y", "regression", ["x"]).setup()


def lines_of(columns, separator):
    """Return the lines of a table of 60 rows with a label and a text, and maybe a number."""
    rows = [[("ham", "spam")[row % 3 % 2], f"word {row} of it", str(row)] for row in range(60)]
    return [separator.join(row[column] for column in columns) for row in [["label", "text", "n"], *rows]]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("columns", [(0, 1), (1, 0), (0, 2, 1), (2, 1)])
@pytest.mark.parametrize(("first", "last"), [(5, 6), (5, 40)], ids=["2 lines", "36 lines"])
@pytest.mark.parametrize("end", ["", "SEPARATOR"])
def test_text_that_quotes_join_over_whole_rows_is_refused(columns, separator, first, last, end, tmp_path):
    lines = lines_of(columns, separator)
    text = columns.index(1)
    for line, quote in ((first, '"{}'), (last, '{}"')):
        cells = lines[line].split(separator)
        cells[text] = quote.format(cells[text])
        lines[line] = separator.join(cells)
    path = tmp_path / "data.csv"
    path.write_text("\n".join(line + end.replace("SEPARATOR", separator) for line in lines))
    told = rf"data\.csv: line {first + 1} has a quoted value of {last - first + 1} lines that read like rows"
    with pytest.raises(UsageError, match=told):
        read_table(str(path))


PARAGRAPHS = [
    "Dear all,\nthe ham, the eggs\nand spam are here",
    "one, two\nthree, 4\n5, six",
    "a; b\n\nspam; c",
    "- spam\n- ham\n- 3",
    "It rains,\nit pours,\nthe old man, snoring\n",
]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("columns", [(0, 1), (1, 0), (0, 2, 1), (2, 1), (1, 2)])
def test_texts_of_several_lines_are_one_value(columns, separator, tmp_path):
    lines = [line.split(separator) for line in lines_of(columns, separator)]
    for row, text in enumerate(PARAGRAPHS, 3):
        lines[row][columns.index(1)] = text
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert read_table(str(tmp_path / "data.csv")).rows == lines[1:]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["unix", "windows", "old mac"])
@pytest.mark.parametrize("quote", [b"", b'"'], ids=["unquoted", "quoted"])
@pytest.mark.parametrize("space", [b"", b" "], ids=["tight", "spaced"])
@pytest.mark.parametrize("last", [True, False], ids=["last line ended", "last line open"])
def test_table_is_the_same_however_it_was_saved(start, end, quote, space, last, tmp_path):
    def saved(path, start, end, quote, space, last):
        lines = [
            [b"x", b"c", b"y"],
            *([b"%d" % index, b"uv"[index % 3 % 2 :][:1], b"ab"[index % 2 :][:1]] for index in range(60)),
        ]
        content = end.join(b",".join(quote + space + cell + space + quote for cell in line) for line in lines)
        path.write_bytes(start + content + end * last)
        data = Table(str(path), "y", "multiclass", categorical=["c"])
        data.setup()
        return data

    expected = saved(tmp_path / "a.csv", b"", b"\n", b"", b"", True)
    found = saved(tmp_path / "b.csv", start, end, quote, space, last)
    assert found.class_names == ["a", "b"]
    assert found.state_dict()["categories"] == {"c": ["u", "v"]}
    for mine, other in zip(found.tensors("test"), expected.tensors("test"), strict=True):
        assert mine.tolist() == other.tolist()


def test_named_index_of_a_parquet_file_is_a_column(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": [3, 4]})
    frame.set_index("a").to_parquet(tmp_path / "a.parquet")
    frame.iloc[::-1].to_parquet(tmp_path / "b.parquet")
    assert read_table(str(tmp_path / "a.parquet")).header == ["a", "b"]
    assert read_table(str(tmp_path / "b.parquet")).header == ["a", "b"]


@pytest.mark.parametrize("kind", ["int64", "uint64", "int8", "float32", "float64", "bool_", "string", "date32"])
def test_columns_of_parquet_with_gaps_are_those_of_csv(kind, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = [datetime.date(2024, 1, day) for day in (1, 2, 3)]
    values = {
        "int64": [2**53, None, 2**53 + 1, -(2**63) + 1],
        "uint64": [2**64 - 1, None, 2**64 - 2],
        "int8": [1, None, -5],
        "float32": [0.5, None, 3.25],
        "float64": [0.1, None, 2.0],
        "bool_": [True, None, False],
        "string": ["a", None, "NA"],
        "date32": [days[0], None, days[2]],
    }[kind]
    table = arrow.table({"a": arrow.array(values, getattr(arrow, kind)()), "b": [*range(len(values))]})
    parquet.write_table(table, tmp_path / "a.parquet")
    expected = {"float64": ["0.1", "", "2"]}.get(kind, ["" if value is None else str(value) for value in values])
    assert [row[0] for row in read_table(str(tmp_path / "a.parquet")).rows] == expected


def test_large_floats_of_parquet_are_those_of_csv(tmp_path):
    pandas = pytest.importorskip("pandas")
    numbers = [1e14, 999_999_999_999_999.0, 1e15, 1e16, 1.5e300, -1e17, 3.0, 0.5]
    frame = pandas.DataFrame({"a": numbers})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    rows = [read_table(str(tmp_path / name)).rows for name in ("a.csv", "a.parquet")]
    assert [float(row[0]) for row in rows[0]] == [float(row[0]) for row in rows[1]] == numbers
    kinds = [describe_column("a", [row[0] for row in each]).kind for each in rows]
    large = [describe_column("a", [row[0] for row in each if abs(float(row[0])) > 9e15]).kind for each in rows]
    assert kinds == large == ["number", "number"]
