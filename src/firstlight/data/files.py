"""Read the user's files, or refuse them in one line that names the file."""

import codecs
import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstlight.data.columns import is_number
from firstlight.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import pandas

_MAGIC = {
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"PK\x03\x04": "a zip archive, like .xlsx and .npz",
    b"\x93NUMPY": "a .npy file",
}
"""How other kinds of files begin."""


_MAX_EXACT = 1e15
"""Floats from here on stay floats, 1e+16, because as integers they would look like identifiers that are too long."""

_MIN_ROWS = 10
"""Lines of a value that each have as many separators as a row, from which this is no accident of a text."""


@dataclass(frozen=True)
class Csv:
    """The content of a CSV file.

    Args:
        header: Names of the columns.
        rows: Values of each row, one per column. Empty lines are left out.
        lines: Line number where each row begins, from 1, as an editor shows it.
        digest: Digest of the content.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    digest: str


def read_bytes(path: str) -> bytes:
    """Return the content of a file, or raise a `UsageError`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def digest_of(*contents: bytes | memoryview) -> str:
    """Return the SHA-256 digest of the concatenated contents."""
    return digest_of_parts(contents)


def digest_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 digest of the concatenated parts, of which one at a time is in memory."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_text(content: bytes, path: str, hint: str = "") -> str:
    """Return the UTF-8 content of a file as text, without a byte order mark, or refuse it; `hint` ends the message."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, content[error.start], hint) from error


def check_text(contents: Iterable[bytes], path: str, hint: str = "") -> None:
    """Refuse a file that is not UTF-8, given in parts; `hint` ends the message."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        for content in contents:
            decoder.decode(content)
            line += content.count(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(
            path, line + error.object.count(b"\n", 0, error.start), error.object[error.start], hint
        ) from error


def _not_utf8(path: str, line: int, byte: int, hint: str) -> UsageError:
    return UsageError(f"{path} is not UTF-8: line {line} has the byte 0x{byte:02x}{hint}")


def read_table(path: str, commas: Collection[str] = ()) -> Csv:
    """Return the content of a CSV or Parquet file. Numbers and dates of a Parquet file become text, as in a CSV file.

    A CSV file is read by the standard library, which tells the line of each row; pandas and polars do not. `commas`
    names the columns in which text of numbers has a decimal comma.

    Raises:
        UsageError: If it cannot be read, has empty or equal column names, or a row has more or fewer values than the
            header.
    """
    content = read_bytes(path)
    if content.startswith(b"PAR1"):
        return _read_parquet(content, path, commas)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is damaged: {error}") from error
    return _read_csv(content, path)


def _read_parquet(content: bytes, path: str, commas: Collection[str]) -> Csv:
    try:
        import pandas  # Imported here: it takes half a second.

        # Its default makes integers floats in a column with gaps, which merges long ones.
        frame = pandas.read_parquet(io.BytesIO(content), dtype_backend="numpy_nullable")
        if any(name is not None for name in frame.index.names):
            frame = frame.reset_index()  # A CSV file has a named index as columns, too.
    except ImportError as error:
        raise UsageError(f"{path} is a Parquet file: pip install 'firstlight[parquet]' reads it") from error
    except Exception as error:  # What pyarrow raises for damaged files has many types.
        raise UsageError(f"{path} is not a Parquet file that can be read: {' '.join(str(error).split())}") from error
    return from_frame(frame, path, digest_of(content), commas)


def from_frame(frame: "pandas.DataFrame", path: str, digest: str = "", commas: Collection[str] = ()) -> Csv:
    """Return a pandas DataFrame as the content of the CSV file that would hold it, see `read_table`."""
    header = [str(name).strip() for name in frame.columns]
    _check_header(header, path)
    if not len(frame):
        raise UsageError(f"{path} has no rows below its header")
    marks = ["," if name in commas else "." for name in header]
    columns = [[_as_text(value, mark) for value in frame.iloc[:, index]] for index, mark in enumerate(marks)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Csv(header, rows, [*range(2, len(rows) + 2)], digest)


def _as_text(value: Any, mark: str) -> str:
    """Return a value as a CSV file would hold it."""
    if value is None or str(value) in ("<NA>", "nan", "NaT"):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        return str(int(value))  # An integer column with gaps holds floats.
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    return value if isinstance(value, str) else str(value).replace(".", mark)


def _read_csv(content: bytes, path: str) -> Csv:
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            raise UsageError(f"{path} is {kind}: it must be a CSV file in UTF-8, or a Parquet file")
    text = read_text(content, path, f"; convert it, for example: iconv -f windows-1252 -t utf-8 {path} > NEW_FILE")
    if (at := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise UsageError(f"{path} is not a CSV file: line {line} has the byte 0x00")
    declared = re.match("sep=(.)\r?\n", text)  # Excel writes and reads such a line.
    separator = declared[1] if declared else _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found: list[tuple[int, list[str]]] = []
    begins = 1
    limit = csv.field_size_limit(max(len(text), 1))  # Texts may be longer than its default, 131,072.
    try:
        for row in reader:
            if row:
                found.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        hint = 'a quote in a value must be written as "", and the value in quotes'
        raise UsageError(f"{path} is not a CSV file: line {begins}: {error}; {hint}") from error
    finally:
        csv.field_size_limit(limit)
    found = found[1:] if declared else found
    if not found:
        raise UsageError(f"{path} is empty: its first line must name the columns")
    _refuse_swallowed_rows(found, separator, path)
    (_, header), *rows = found
    header = [name.strip() for name in header]
    while len(header) > 1 and not header[-1] and not any(row[len(header) - 1 :] != [""] for _, row in rows):
        header.pop()  # A separator ends each line.
        for _, row in rows:
            row.pop()
    _check_header(header, path)
    for line, row in rows:
        if len(row) != len(header):
            quoting = "; a value with a separator must be in quotes" if len(row) > len(header) else ""
            values = f"{len(row)} value{'s' * (len(row) != 1)}"
            raise UsageError(f"{path}: line {line} has {values}, but the header has {len(header)} columns{quoting}")
    if not rows:
        raise UsageError(f"{path} has no rows below its header")
    return Csv(header, [row for _, row in rows], [line for line, _ in rows], digest_of(content))


def _refuse_swallowed_rows(found: Sequence[tuple[int, list[str]]], separator: str, path: str) -> None:
    """Refuse a value whose lines read like rows: a quote that belongs to a text began it, and a later one ended it."""
    plain: list[list[str]] = []  # Rows without such a value.
    for begins, row in found:
        for index, value in enumerate(row):
            lines = [line for line in re.split("[\r\n]+", value) if line]
            if len(lines) < 2:
                continue
            # The first line lacks the columns before this one, and the last line those after it.
            parts = [line.split(separator) for line in lines]
            width, starts = len(row), [index, *[0] * (len(parts) - 1)]
            ends = [*[width] * (len(parts) - 1), index + 1]
            if [*map(len, parts)] != [end - start for start, end in zip(starts, ends, strict=True)]:
                continue
            if not plain:
                single = (other for _, other in found[1:] if not re.search("[\r\n]", "".join(other)))
                plain = [other for other in single if len(other) == width]
            cells: dict[int, list[str]] = {}
            for start, part in zip(starts, parts, strict=True):
                for column, cell in enumerate(part, start):
                    cells.setdefault(column, []).append(cell)
            cells.pop(index)
            fits = any(_fits(values, [other[column] for other in plain]) for column, values in cells.items())
            if fits or (cells and (separator == "\t" or len(parts) >= _MIN_ROWS)):
                raise UsageError(
                    f"{path}: line {begins} has a quoted value of {len(parts)} lines that read like rows: a quote in a "
                    'text must be written as "", and the text in quotes; if the value is one text, replace its line '
                    "breaks"
                )


def _fits(values: Sequence[str], column: Sequence[str]) -> bool:
    """Return whether values may be in a column: all occur in it, or all are numbers like those in it."""
    spaced = any(each != each.strip() for each in values) and all(
        each == each.strip() for each in column
    )  # As in prose
    return {*values} <= {*column} or (not spaced and all(map(is_number, [*values, *column])))


def _separator(text: str) -> str:
    """Return what separates the names in the first line: the most frequent of comma, semicolon, tab and bar."""
    first = re.sub('"[^"]*"', "", re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0])
    return max(",;\t|", key=first.count)


def _check_header(header: list[str], path: str) -> None:
    for index, name in enumerate(header):
        if not name or name in header[:index]:
            hint = "" if name or index else "; pandas leaves out its index with to_csv(index=False)"
            raise UsageError(
                f"{path}: column {index + 1} is named {name!r}: column names must be unique and not empty{hint}"
            )


def missing_column(path: str, wanted: Sequence[str], columns: Sequence[str]) -> str:
    """Return a message about the first wanted column that a file does not have, or `""` if it has all of them."""
    for name in wanted:
        if name not in columns:
            return f"{path} has no column {name}; available: {', '.join(columns)}{did_you_mean(name, columns)}"
    return ""
