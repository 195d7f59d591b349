import pytest

from firstlight.data import Table
from firstlight.errors import UsageError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\xff\n", r"data\.csv is not UTF-8: line 2 has the byte 0xff"),
        (b'a,b\n1,"2\n', r"data\.csv is not a CSV file: line 2"),
        (b"a,b\n1,2\n3,4\0\n", r"data\.csv is not a CSV file: line 3 has the byte 0x00"),
        (b"a|b\n1|2\n", r"data\.csv: values are separated by '\|': they must be separated by commas"),
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
