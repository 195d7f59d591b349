"""Read the user's files, or refuse them in one line that names the file."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from firstlight.errors import UsageError, did_you_mean

_MAGIC = {
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive, like .xlsx and .npz",
    b"PAR1": "a Parquet file",
    b"\x93NUMPY": "a .npy file",
}
"""How other kinds of files begin."""


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
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def read_text(content: bytes, path: str, hint: str = "") -> str:
    """Return the UTF-8 content of a file as text, without a byte order mark, or refuse it; `hint` ends the message."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}{hint}") from error


def read_csv(path: str) -> Csv:
    """Return the content of a CSV file in UTF-8.

    Raises:
        UsageError: If it cannot be read, is not separated by commas, has empty or equal column names, or a row has
            more or fewer values than the header.
    """
    content = read_bytes(path)
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            raise UsageError(f"{path} is {kind}: it must be a CSV file in UTF-8")
    text = read_text(content, path)
    if (at := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise UsageError(f"{path} is not a CSV file: line {line} has the byte 0x00")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, list[str]]] = []
    begins = 1
    limit = csv.field_size_limit(max(len(text), 1))  # Texts may be longer than its default, 131,072.
    try:
        for row in reader:
            if row:
                found.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} is not a CSV file: line {begins}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not found:
        raise UsageError(f"{path} is empty: its first line must name the columns")
    (_, header), *rows = found
    header = [name.strip() for name in header]
    for separator in (";", "\t", "|"):
        if len(header) == 1 and separator in header[0]:
            raise UsageError(f"{path}: values are separated by {separator!r}: they must be separated by commas")
    for index, name in enumerate(header):
        if not name or name in header[:index]:
            hint = "" if name or index else "; pandas leaves out its index with to_csv(index=False)"
            raise UsageError(
                f"{path}: column {index + 1} is named {name!r}: column names must be unique and not empty{hint}"
            )
    for line, row in rows:
        if len(row) != len(header):
            quoting = "; a value with a comma must be in quotes" if len(row) > len(header) else ""
            values = f"{len(row)} value{'s' * (len(row) != 1)}"
            raise UsageError(f"{path}: line {line} has {values}, but the header has {len(header)} columns{quoting}")
    if not rows:
        raise UsageError(f"{path} has no rows below its header")
    return Csv(header, [row for _, row in rows], [line for line, _ in rows], digest_of(content))


def missing_column(path: str, wanted: Sequence[str], columns: Sequence[str]) -> str:
    """Return a message about the first wanted column that a file does not have, or `""` if it has all of them."""
    for name in wanted:
        if name not in columns:
            return f"{path} has no column {name}; available: {', '.join(columns)}{did_you_mean(name, columns)}"
    return ""
