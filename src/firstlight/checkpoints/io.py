"""Write checkpoints atomically, and verify them before they are read."""

import errno
import fcntl
import os
import re
import shutil
import traceback
import zipfile
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils.serialization import config

from firstlight.checkpoints.content import find_tangle, find_unreadable
from firstlight.errors import UsageError, is_library, root_cause

_RESTORING = (
    "pytorch/trainer/connectors/checkpoint_connector.py",
    "pytorch/core/saving.py",
    "firstlight/run/predictor.py",
)
"""Where Lightning 2.6.6 and firstlight restore a checkpoint."""

_FIELDS = {
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "hparams_name": str,
    "hparams_type": NoneType,  # Lightning would call it
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "metrics": dict,
    "optimization": dict,
    "train_log": dict,
    "random_state": list,
    "frozen": list,
    "evaluating": list,
    "callback_metrics": dict,
}
"""Types of the fields that Lightning 2.6.6 and firstlight write."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints to a local disk atomically, and verify them before they are read.

    A checkpoint is written to a temporary file beside its path, flushed to the disk, and moved into place. If `kill
    -9`, a full disk or a power failure interrupts that, the earlier file stays. The next write removes temporary files
    of dead processes. Before reading, the CRC-32 of each record is checked. No code in a file is run. A checkpoint
    that could not be read again is refused when it is written.

    It works with any LightningModule: `Trainer(plugins=[AtomicCheckpointIO()])`. To write in a thread, use
    `AsyncCheckpointIO(AtomicCheckpointIO())`. Sharded checkpoints do not use it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UsageError: If the disk fails; for a full disk, it has the bytes needed and free. If `checkpoint` holds
                what `read` refuses, it has the first such entry.
        """
        if storage_options is not None:
            raise UsageError("storage_options are for remote storage, but checkpoints are written to a local disk")
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
            if cause is not None:
                raise UsageError(f"cannot write {path}: {_reason(cause, checkpoint, path.parent)}") from error
            if isinstance(error, Exception) and not isinstance(error, UsageError):
                if wrong := find_unreadable(checkpoint):  # Python cannot pickle it.
                    raise UsageError(f"cannot write {path}: the checkpoint holds {wrong}") from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the content of a checkpoint, see `read`."""
        if weights_only is False:
            raise UsageError(f"weights_only=False would run code in {path}: leave it out")
        return read(path, map_location)


def read(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint after verifying its bytes. With `mmap`, tensors are read when they are used.

    Raises:
        UsageError: When it does not exist, is damaged, or holds objects that would run code.
    """
    path = _local(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    if wrong := find_corruption(path):
        raise UsageError(f"{path} is damaged: {wrong}")
    return _load(path, map_location, mmap)


def read_checkpoint_metrics(path: str | Path) -> dict[str, float]:
    """Return when a checkpoint was written, and the validation metrics that the task stored in it, by name.

    `epoch` counts from 1; `step` is the number of optimiser steps done, or of batches with manual optimisation.
    """
    # Mapped, so that the weights are not read.
    checkpoint = _load(Path(path), "cpu", mmap=True)
    if missing := {"epoch", "global_step"} - checkpoint.keys():
        raise UsageError(f"{path} is not a checkpoint of a run: it holds no {' and no '.join(sorted(missing))}")
    step = checkpoint["global_step"]
    with suppress(KeyError, TypeError, ValueError, RuntimeError, OverflowError):  # It may hold weights only.
        loops = checkpoint["loops"]["fit_loop"]
        if int(loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]):
            step = int(loops["epoch_loop.batch_progress"]["total"]["processed"])
    return {"epoch": checkpoint["epoch"] + 1, "step": step, **checkpoint.get("metrics", {})}


def has_seen_validation(path: str | Path) -> bool:
    """Return whether a checkpoint was trained on the validation samples, too, see `Experiment.refit`."""
    return bool(_load(Path(path), "cpu", mmap=True).get("has_seen_validation"))


def first_index(path: str | Path) -> int:
    """Return the index at which a run that resumes from a checkpoint logs its first `train/*`.

    It is the number of optimiser steps done, or of batches with manual optimisation, see `loggers.current_step`.
    """
    checkpoint = _load(Path(path), "cpu", mmap=True)
    try:
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["current"]
        # Lightning 2.6.6 counts a batch after `on_train_batch_end`, in which a checkpoint may be written.
        is_within_batch = batches["completed"] < batches["processed"]
        return int(loops["epoch_loop.state_dict"]["_batches_that_stepped"] + is_within_batch)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{path} is damaged: its loops do not say where the run was ({error!r:.100})") from error


def _load(path: Path, map_location: Any, mmap: bool) -> dict[str, Any]:
    """Return the content of a checkpoint whose fields have the types that Lightning and firstlight give them."""
    try:
        found: dict[str, Any] = torch.load(path, map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # A crafted file can make torch raise nearly any type.
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(f"{path} holds a {refused[1]}, which could run code: refused") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be read: {reason[:200]}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a checkpoint: it holds a {type(found).__name__}")
    if wrong := find_tangle(found):
        raise UsageError(f"{path} is damaged: it holds {wrong}")
    if wrong := _find_other_type(found):
        raise UsageError(f"{path} is damaged: {wrong}")
    return found


def _find_other_type(checkpoint: dict[str, Any]) -> str:
    """Return which field has another type than Lightning and firstlight give it; an empty text if none has."""
    for name, kind in _FIELDS.items():
        value = checkpoint.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is a {type(value).__name__}, not a {kind.__name__}"
    if not all(isinstance(name, str) for name in checkpoint):
        return "a field name is not a string"
    for name, value in checkpoint.get("metrics", {}).items():
        if not isinstance(name, str) or type(value) not in (int, float, NoneType):
            return "metrics holds what is not a number"
    return ""


def newest_resumable(path: Path) -> Path:
    """Return a checkpoint that training can resume from: `path`, or the newest undamaged one in its folder.

    If it is not `path`, the first process prints one line with the reason. If there is none, a `UsageError` has it.
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
        reason = "; ".join(faults)
        rank_zero_only(print)(f"resume {reason}; using {file}, the newest undamaged checkpoint", flush=True)
    return file


def find_corruption(path: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint, or `None`. torch stores a CRC-32 with each record."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return "it has no CRC-32s, which torch.serialization.set_crc32_options(True) writes"
            # torch compresses nothing, and records that share bytes would take forever to check.
            if sum(record.file_size for record in records) > path.stat().st_size:
                return "its records are larger than the file"
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED:
                    return f"{record.filename} is compressed"
                # zipfile ignores this bit. torch treats such a record as a folder, reads nothing, and returns
                # uninitialised memory.
                if record.external_attr & 0x10:
                    return f"{record.filename} is marked as a folder"
            broken = archive.testzip()
    except Exception as error:  # zipfile raises seven types, depending on the wrong byte
        return f"it is not a complete zip file ({' '.join(str(error).split()) or type(error).__name__})"
    return None if broken is None else f"the CRC-32 of {broken} is wrong"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of dead writers. A live writer holds a lock on its file."""
    for file in folder.glob(".*.partial"):
        if re.fullmatch(r"\..+\.\d+\.partial", file.name):
            with suppress(OSError), file.open("r+b") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()


def raise_fault(error: Exception, ckpt: str | Path | None) -> NoReturn:
    """Raise a `UsageError` if an error comes from the content of a checkpoint, otherwise the cause of the error.

    The content is at fault if the error was raised while a checkpoint was restored, unless the user's own code was
    called for it.
    """
    fault = _fault(error, root_cause(error), ckpt)
    if fault is error:
        raise error
    raise fault from error


def _fault(error: Exception, cause: BaseException, ckpt: str | Path | None) -> BaseException:
    if isinstance(cause, UsageError | OSError | MemoryError) or ckpt is None:
        return cause
    if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
        return UsageError(f"{ckpt} holds the weights of another network, not of the configured one")
    files = [frame.filename for each in (error, cause) for frame in traceback.extract_tb(each.__traceback__)]
    restores = [index for index, name in enumerate(files) if any(Path(name).match(file) for file in _RESTORING)]
    if not restores or not all(map(is_library, files[restores[-1] :])):
        return cause
    return UsageError(f"{ckpt} cannot be restored: {type(cause).__name__}: {str(cause)[:200]}")


def _write(checkpoint: dict[str, Any], beside: Path, path: Path) -> None:
    with beside.open("wb") as file:
        with suppress(OSError):  # Some file systems have no locks; leftovers stay there.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with config.patch({"save.compute_crc32": True}):  # type: ignore[attr-defined]  # torch creates it at run time
            torch.save(checkpoint, file)
        file.flush()
        if not _is_readable(checkpoint, beside) and (wrong := find_unreadable(checkpoint)):
            raise UsageError(f"cannot write {path}: the checkpoint holds {wrong}")
        if wrong := _find_other_type(checkpoint):
            raise UsageError(f"cannot write {path}: {wrong}")
        os.fsync(file.fileno())
        beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _is_readable(checkpoint: dict[str, Any], file: Path) -> bool:
    """Return whether a reader certainly takes the file that was just written."""
    try:
        return not get_unsafe_globals_in_checkpoint(file) and not find_tangle(checkpoint)
    except Exception:  # torch does not know what all values are pickled as.
        return False


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UsageError(f"{path} is a URL, but checkpoints are read from and written to a local disk")
    return Path(path)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error behind an error: torch raises a RuntimeError for it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _reason(error: OSError, checkpoint: dict[str, Any], folder: Path) -> str:
    if error.errno not in _DISK_FULL:
        return str(error.strerror)
    counter = _Counter()
    torch.save(checkpoint, counter)  # type: ignore[arg-type]  # it only needs `write`
    while not folder.is_dir():  # It may be the folder that cannot be made.
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f"{error.strerror} (it needs {counter.bytes:,} bytes, {free:,} are free); earlier checkpoints are intact"


class _Counter:
    """A file that only counts the bytes written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass
