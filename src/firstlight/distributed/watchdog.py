"""What the processes of a run know of each other: who is alive, who failed, and after which step all of them stop."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it without saying so

__all__ = ["RankWatchdog"]

_BEAT = 0.25
"""Seconds from one beat to the next."""

_QUIET = 8
"""Beats after which a process counts as gone when a collective has failed: two seconds."""

_GRACE = 40
"""Beats that the main thread has to end by itself, after another process has failed: ten seconds."""


class RankWatchdog:
    """Threads that beat in a store that all processes share, and watch whether the others do.

    Nothing is done in a training step: the threads notice. A process that has not answered for `timeout` seconds, and
    is on this machine, is killed, so that whoever waits for it in a collective gets an error. When a process failed,
    the others have ten seconds to end by themselves and are then ended.

    All processes make one, and then wait for each other.

    Args:
        store: Shared by the processes of this run alone.
        rank: Number of this process, from 0.
        world_size: `P`.
        timeout: Seconds.
        children: By rank, those that this process has started.
        has_launcher: Whether this process has no more to do when the one that started it is gone.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: float,
        children: Mapping[int, "Popen[Any]"] | None = None,
        has_launcher: bool = False,
    ) -> None:
        self.stop: tuple[int, int] | None = None
        """The optimiser step after which all stop, and the signal that asked for it."""
        self.rank = rank
        self._store, self._ranks = store, range(world_size)
        self._timeout = timeout / _BEAT
        self._children = children or {}
        self._launcher = os.getppid() if has_launcher else None
        self._still = [0] * world_size  # Own beats since the last one of each, so that a pause of all is none.
        self._ended = set[int]()
        self._fault: str | None = None
        self._closed = threading.Event()
        self._answers = 0
        self._gone = False
        self._names: list[str] = []
        self._handles: dict[int, int] = {}
        store.set(f"who/{rank}", f"{os.getpid()} {socket.gethostname()} {_machine()}")
        store.set(f"beat/{rank}", "0")

    def start(self) -> None:
        """Begin to beat, when all processes have made theirs."""
        for rank, found in enumerate(self._store.multi_get([f"who/{rank}" for rank in self._ranks])):
            pid, host, machine = found.decode().split()
            self._names.append(f"process {rank} (PID {pid} on {host})")
            if machine == _machine() != "?" and int(pid) != os.getpid():
                with suppress(OSError):  # A handle is of this process for good; its number may be given to another.
                    self._handles[rank] = os.pidfd_open(int(pid))
        for loop in (self._talk, self._watch):
            threading.Thread(target=loop, name=f"firstlight-watchdog{loop.__name__}", daemon=True).start()

    def ask(self, step: int, number: int) -> None:
        """Ask all to stop after an optimiser step that none of them has done, and wait until they know.

        Args:
            step: Number of steps done then.
            number: Of the signal.
        """
        self._store.compare_set("stop", "", f"{step} {number}")
        self._learn()
        keys = [f"knows/{rank}" for rank in self._ranks]
        while self._fault is None and not self._store.check(keys):
            time.sleep(0.01)

    def fail(self) -> None:
        """Tell the others that this process fails by itself."""
        if self._fault is None:
            with suppress(RuntimeError):
                self._store.compare_set("fault", "", str(self.rank))

    def diagnose(self, seconds: float = 5.0) -> str | None:
        """Return who ended the run, as far as it shows in some seconds after a collective failed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._fault is not None:
                return self._fault
            quiet = [rank for rank in self._ranks if rank != self.rank and self._is_quiet(rank, _QUIET)]
            if quiet:
                return f"{self._names[quiet[0]]} was killed or cannot be reached any more"
            time.sleep(_BEAT)
        return None

    def is_reporter(self) -> bool:
        """Tell whether this process is the one that says what happened to another: the first that is alive."""
        return all(self._is_quiet(rank, _QUIET) for rank in self._ranks[: self.rank])

    def close(self) -> None:
        """End the threads; the others take this process for done."""
        self._closed.set()
        if self._fault is None:
            with suppress(RuntimeError):
                self._store.set(f"beat/{self.rank}", "done")

    def _talk(self) -> None:
        """Beat, and learn of the others, for as long as the store answers."""
        last, beats = [b""] * len(self._ranks), [f"beat/{rank}" for rank in self._ranks]
        while not self._closed.wait(_BEAT) and not self._gone:
            try:
                self._answers += 1
                self._store.set(beats[self.rank], str(self._answers))
                self._learn()
                for rank, beat in enumerate(self._store.multi_get(beats)):
                    self._still[rank] = 0 if beat != last[rank] else self._still[rank] + 1
                    last[rank] = beat
                    if beat == b"done":
                        self._ended.add(rank)
            except RuntimeError:  # It is in the first process, or in the launcher of all.
                self._gone = True
                return

    def _watch(self) -> None:
        """Give up who no longer beats, and in the end this process; the store may be one that never answers."""
        left, waited, answers = _GRACE, 0, 0
        while not self._closed.wait(_BEAT):
            if self._fault is not None:
                left -= 1
                if left == 0:
                    if self.is_reporter():
                        sys.stderr.write(f"firstlight: {self._fault}; the run cannot go on\n")
                    os._exit(1)  # The main thread waits in a collective, and would for half an hour.
                continue
            waited, answers = waited + 1 if answers == self._answers else 0, self._answers
            silent = [rank for rank in self._ranks if rank != self.rank and self._is_quiet(rank, self._timeout)]
            ended = [rank for rank, child in self._children.items() if child.poll()]
            if ended:
                code = self._children[ended[0]].returncode
                self._lose(ended[0], f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")
            elif self._launcher not in (None, os.getppid()) or (self._gone and 0 not in self._ended):
                self._lose(0, "is gone, or the launcher of all is")
            elif silent or (waited >= self._timeout and not self._gone):
                self._lose(silent[0] if silent else 0, f"has not answered for {self._timeout * _BEAT:g} s")

    def _lose(self, rank: int, why: str) -> None:
        """Give a process up, and kill it where that can be done, so that whoever waits for it gets an error."""
        self._still[rank] = _QUIET
        self._gone = self._gone or rank == 0
        self._fault = self._fault or f"{self._names[rank]} {why}"
        if rank in self._handles:
            with suppress(OSError):  # It has ended.
                signal.pidfd_send_signal(self._handles[rank], signal.SIGKILL)

    def _learn(self) -> None:
        if self.stop is None and self._store.check(["stop"]):
            step, number = self._store.get("stop").split()
            self.stop = int(step), int(number)
            self._store.set(f"knows/{self.rank}", "")
        if self._fault is None and self._store.check(["fault"]):
            rank = int(self._store.get("fault"))
            if rank != self.rank:
                self._fault = f"{self._names[rank]} failed: its error stands above"

    def _is_quiet(self, rank: int, beats: float) -> bool:
        return rank not in self._ended and self._still[rank] >= beats


def _machine() -> str:
    """Return what numbers of processes mean the same in: this boot of this kernel and name space, `?` if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # Not Linux.
        return "?"
