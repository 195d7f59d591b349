"""Files of the user's own: read whole, or refused in one line that names the file."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from firstlight.errors import UsageError, did_you_mean

__all__ = ["Csv", "digest_of", "missing_column", "read_bytes", "read_csv", "read_text"]


@dataclass(frozen=True)
class Csv:
    """A CSV file as it was read.

    Args:
        header: Names of the columns.
        rows: Without empty lines; each has a value for each column.
        lines: Line of the file where each row begins, from 1, as an editor shows it.
        digest: Of the content.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    digest: str


def read_bytes(path: str) -> bytes:
    """Return what a file holds.

    Raises:
        UsageError: When it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def digest_of(*contents: bytes | memoryview) -> str:
    """Return what tells these contents from any others."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def read_text(content: bytes, path: str, otherwise: str = "") -> str:
    """Return what UTF-8 stands for, without a byte order mark.

    Raises:
        UsageError: When it is not UTF-8; `otherwise` says what else can be done.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}{otherwise}"
        ) from error


def read_csv(path: str) -> Csv:
    """Return what a CSV file in UTF-8 holds.

    Raises:
        UsageError: When it cannot be read, is not separated by commas, a column has no name of its own, or a row has
            not as many values as the header.
    """
    content = read_bytes(path)
    text = read_text(content, path)
    if (at := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise UsageError(f"{path} is no CSV file: line {line} has the byte 0x00")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[tuple[int, list[str]]] = []
    begins = 1
    try:
        for row in reader:
            if row:
                found.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file: line {begins}: {error}") from error
    if not found:
        raise UsageError(f"{path} is empty: its first line names the columns")
    (_, header), *rows = found
    for separator in (";", "\t", "|"):
        if len(header) == 1 and separator in header[0]:
            raise UsageError(f"{path}: its values are separated by {separator!r}, in a CSV file they are by commas")
    for index, name in enumerate(header):
        if not name or name in header[:index]:
            raise UsageError(f"{path}: column {index + 1} is named {name!r}: each column has a name of its own")
    for line, row in rows:
        if len(row) != len(header):
            values = f"{len(row)} value{'s' * (len(row) != 1)}"
            raise UsageError(f"{path}: line {line} has {values}, but the header names {len(header)} columns")
    if not rows:
        raise UsageError(f"{path} has no rows below its header")
    return Csv(header, [row for _, row in rows], [line for line, _ in rows], digest_of(content))


def missing_column(path: str, wanted: Sequence[str], columns: Sequence[str]) -> str:
    """Return in words which wanted column of a file is not there, or nothing when all are."""
    for name in wanted:
        if name not in columns:
            return f"{path}: there is no column {name} among {', '.join(columns)}{did_you_mean(name, columns)}"
    return ""
