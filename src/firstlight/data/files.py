"""Files of the user's own: read whole, or refused in one line that names the file."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from firstlight.errors import UsageError, did_you_mean

__all__ = ["digest_of", "lacking", "read_bytes", "read_csv"]


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


def read_csv(path: str) -> tuple[list[str], list[list[str]], str]:
    """Return the header of a CSV file in UTF-8, its rows, without empty lines, and the digest of its content.

    Raises:
        UsageError: When it cannot be read, is not separated by commas, a column has no name of its own, or a row has
            not as many values as the header.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *rows = [row for row in reader if row] or [[]]
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file: line {reader.line_num}: {error}") from error
    for separator in (";", "\t"):
        if len(header) == 1 and separator in header[0]:
            raise UsageError(f"{path}: its values are separated by {separator!r}, in a CSV file they are by commas")
    for index, name in enumerate(header):
        if not name or name in header[:index]:
            raise UsageError(f"{path}: column {index} is named {name!r}: each column has a name of its own")
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise UsageError(f"{path}: row {index} has {len(row)} values, but the header names {len(header)} columns")
    if not rows:
        raise UsageError(f"{path} has no rows below its header")
    return header, rows, digest_of(content)


def lacking(path: str, wanted: Sequence[str], columns: Sequence[str]) -> str:
    """Return in words which wanted column of a file is not there, or nothing when all are."""
    for name in wanted:
        if name not in columns:
            return f"{path}: there is no column {name} among {', '.join(columns)}{did_you_mean(name, columns)}"
    return ""
