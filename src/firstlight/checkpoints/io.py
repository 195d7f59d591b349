"""Checkpoints that are written whole or not at all, and checked before they are read."""

import errno
import fcntl
import os
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.serialization import config

from firstlight.errors import UsageError

__all__ = ["AtomicCheckpointIO", "find_corruption", "newest_resumable", "read", "remove_leftovers", "weights_fault"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, on a local disk, and check it before it is read.

    It is written beside its place, flushed to the disk with its folder, and moved into place. Whatever stops that,
    `kill -9`, a full disk or a power failure, leaves the file that was there. What dead writers left is removed
    before the next writing. Before reading, the CRC-32 of each record is checked; no code in a file is ever run.

    Any LightningModule can use it: `Trainer(plugins=[AtomicCheckpointIO()])`. To write in a thread, wrap it:
    `AsyncCheckpointIO(AtomicCheckpointIO())`. Needs an operating system with `fcntl`. Sharded checkpoints are written
    by their strategy and do not come here.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`.

        Raises:
            UsageError: When it cannot be written, with the bytes that it needs and that are free where there is no
                room, or when `path` is a URL.
        """
        if storage_options is not None:
            raise UsageError("storage_options are for remote disks, and checkpoints are written to a local one")
        path = _local(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            _write(checkpoint, beside, path)
        except BaseException as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is None:
                raise
            raise UsageError(f"cannot write {path}: {_why(cause, checkpoint, path.parent)}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint holds.

        Raises:
            UsageError: When it is not there, damaged, or holds objects whose reading would run code.
        """
        if weights_only is False:
            raise UsageError(f"weights_only=False would run code in {path}: leave it out")
        return read(path, map_location)


def read(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds, after its bytes were checked; no code in it is run.

    Args:
        path: A file on a local disk.
        map_location: Where its tensors go.
        mmap: Leave the tensors in the file until they are used.

    Raises:
        UsageError: When it is not there, damaged, or holds objects whose reading would run code.
    """
    path = _local(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    if wrong := find_corruption(path):
        raise UsageError(f"{path} is damaged: {wrong}")
    try:
        found: dict[str, Any] = torch.load(path, map_location, weights_only=True, mmap=mmap)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(f"{path} holds a {refused[1]}, whose reading could run code: it is not read") from error
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no checkpoint: it holds a {type(found).__name__}")
    return found


def newest_resumable(path: Path) -> Path:
    """Return a checkpoint that training can go on from, and where it is damaged, the newest other one of its folder.

    One line says so, on the first process.

    Raises:
        UsageError: When there is none.
    """
    others = [file for file in path.parent.glob("*.ckpt") if file.is_file() and file != path]
    faults = []
    for file in [path, *sorted(others, key=lambda file: file.stat().st_mtime, reverse=True)]:
        try:
            if "optimizer_states" in read(file, mmap=True):
                break
            faults.append(f"{file} holds weights only")
        except UsageError as error:
            faults.append(str(error))
    else:
        raise UsageError("; ".join(faults))
    if faults:
        rank_zero_only(print)(f"resume {'; '.join(faults)}; going on from {file}, the newest that is whole", flush=True)
    return file


def find_corruption(path: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint, `None` where nothing is.

    The CRC-32s are those that torch writes with each record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return "it has no CRC-32s, which torch.serialization.set_crc32_options(True) writes"
            for record in records:
                # zipfile passes over this bit. torch takes such a record for a folder, reads nothing, and hands out
                # whatever its memory held.
                if record.external_attr & 0x10:
                    return f"{record.filename} is marked as a folder"
            broken = archive.testzip()
    except Exception as error:  # zipfile raises seven types, depending on the byte that is wrong
        return f"it is no whole zip file ({' '.join(str(error).split()) or type(error).__name__})"
    return None if broken is None else f"the CRC-32 of {broken} is wrong"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that are dead. A live one holds a lock on its file."""
    for file in folder.glob(".*.partial"):
        if re.fullmatch(r"\..+\.\d+\.partial", file.name):
            with suppress(OSError), file.open("r+b") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()


def weights_fault(error: RuntimeError, ckpt: Path | None) -> Exception:
    """Return wrong use where the weights of a checkpoint do not fit the network, and a bug as it is."""
    if "loading state_dict" not in str(error):
        return error
    return UsageError(f"{ckpt} holds the weights of another network than the one configured")


def _write(checkpoint: dict[str, Any], beside: Path, path: Path) -> None:
    with beside.open("wb") as file:
        with suppress(OSError):  # Some file systems have no locks; there, leftovers stay.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with config.patch({"save.compute_crc32": True}):  # type: ignore[attr-defined]  # torch puts it there
            torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
        beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{path} is a URL, and checkpoints are read and written on a local disk")
    return Path(path)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return what the operating system said: torch raises a RuntimeError of its own on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _why(error: OSError, checkpoint: dict[str, Any], folder: Path) -> str:
    if error.errno not in _NO_ROOM:
        return str(error.strerror)
    counter = _Counter()
    torch.save(checkpoint, counter)  # type: ignore[arg-type]  # it only writes
    free = shutil.disk_usage(folder).free
    return f"{error.strerror} (it needs {counter.bytes:,} bytes, {free:,} are free); earlier checkpoints are whole"


class _Counter:
    """A file that only counts its bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass
