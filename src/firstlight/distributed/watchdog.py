"""Detect processes of a run that fail, disappear or freeze, and agree on the step after which all stop."""

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

_INTERVAL = 0.25  # Seconds between two heartbeats.
_QUIET = 8  # Intervals without a heartbeat after which a process counts as gone if a collective failed: 2 s.
_GRACE = 40  # Intervals that the main thread has to end by itself after another process failed: 10 s.


class RankWatchdog:
    """Threads that send heartbeats to a shared store and watch those of the other processes.

    A training step does nothing for it. A process that does not answer for `timeout` seconds is killed if it is on
    this machine. Those that wait for it in a collective then get an error. When a process fails, the others have ten
    seconds to end by themselves; then the watchdog ends them.

    Every process creates one. A barrier must follow before `start`.

    Args:
        store: A store that only the processes of this run share.
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: Seconds without an answer after which a process counts as failed.
        children: Processes that this one started, by rank.
        has_launcher: Whether this process must end when the process that started it is gone.
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
        self.stop: tuple[int, int] | None = None  # Optimiser steps after which all stop, and the signal's number.
        self.rank = rank
        self._store, self._ranks = store, range(world_size)
        self._timeout = timeout / _INTERVAL
        self._children = children or {}
        self._launcher = os.getppid() if has_launcher else None
        # Intervals, not seconds: none passes while the whole machine pauses.
        self._intervals_silent = [0] * world_size
        self._done = set[int]()
        self._fault: str | None = None
        self._closed = threading.Event()
        self._heartbeats = 0
        self._store_is_gone = False
        self._names: list[str] = []
        self._handles: dict[int, int] = {}
        store.set(f"who/{rank}", f"{os.getpid()} {socket.gethostname()} {_machine()}")
        store.set(f"heartbeat/{rank}", "0")

    def start(self) -> None:
        """Start the threads, after every process has created its watchdog."""
        for rank, found in enumerate(self._store.multi_get([f"who/{rank}" for rank in self._ranks])):
            pid, host, machine = found.decode().split()
            self._names.append(f"process {rank} (PID {pid} on {host})")
            if machine == _machine() != "?" and int(pid) != os.getpid():
                with suppress(OSError):  # A handle always means this process; its PID may be reused.
                    self._handles[rank] = os.pidfd_open(int(pid))
        for loop in (self._send_heartbeats, self._watch):
            threading.Thread(target=loop, name=f"firstlight-watchdog{loop.__name__}", daemon=True).start()

    def ask(self, step: int, number: int) -> None:
        """Ask all processes to stop after `step` optimiser steps, which none has done yet; wait until all know.

        `number` is the number of the signal.
        """
        self._store.compare_set("stop", "", f"{step} {number}")
        self._read_messages()
        keys = [f"knows/{rank}" for rank in self._ranks]
        while self._fault is None and not self._store.check(keys):
            time.sleep(0.01)

    def fail(self) -> None:
        """Tell the other processes that this one fails with an error of its own."""
        if self._fault is None:
            with suppress(RuntimeError):
                self._store.compare_set("fault", "", str(self.rank))

    def diagnose(self, seconds: float = 5.0) -> str | None:
        """Return which process ended the run, if that shows within some seconds after a collective failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._fault is not None:
                return self._fault
            quiet = [rank for rank in self._ranks if rank != self.rank and self._is_quiet(rank, _QUIET)]
            if quiet:
                return f"{self._names[quiet[0]]} was killed or cannot be reached"
            time.sleep(_INTERVAL)
        return None

    def is_reporter(self) -> bool:
        """Return whether this process reports the failure of another: it is the lowest rank that is alive."""
        return all(self._is_quiet(rank, _QUIET) for rank in self._ranks[: self.rank])

    def close(self) -> None:
        """Stop the threads; the other processes count this one as done."""
        self._closed.set()
        if self._fault is None:
            with suppress(RuntimeError):
                self._store.set(f"heartbeat/{self.rank}", "done")

    def _send_heartbeats(self) -> None:
        """Send heartbeats and read those of the others as long as the store answers."""
        last, keys = [b""] * len(self._ranks), [f"heartbeat/{rank}" for rank in self._ranks]
        while not self._closed.wait(_INTERVAL) and not self._store_is_gone:
            try:
                self._heartbeats += 1
                self._store.set(keys[self.rank], str(self._heartbeats))
                self._read_messages()
                for rank, heartbeat in enumerate(self._store.multi_get(keys)):
                    self._intervals_silent[rank] = 0 if heartbeat != last[rank] else self._intervals_silent[rank] + 1
                    last[rank] = heartbeat
                    if heartbeat == b"done":
                        self._done.add(rank)
            except RuntimeError:  # The process that holds the store is gone: rank 0 or the launcher.
                self._store_is_gone = True
                return

    def _watch(self) -> None:
        """Record and kill a process that no longer answers, then end this one; works when the store hangs as well."""
        grace, intervals_waiting, heartbeats = _GRACE, 0, 0
        while not self._closed.wait(_INTERVAL):
            if self._fault is not None:
                grace -= 1
                if grace == 0:
                    if self.is_reporter():
                        sys.stderr.write(f"firstlight: {self._fault}; the run cannot continue\n")
                    os._exit(1)  # The main thread waits in a collective, and would for half an hour.
                continue
            intervals_waiting = intervals_waiting + 1 if heartbeats == self._heartbeats else 0
            heartbeats = self._heartbeats
            silent = [rank for rank in self._ranks if rank != self.rank and self._is_quiet(rank, self._timeout)]
            ended = [rank for rank, child in self._children.items() if child.poll()]
            if ended:
                code = self._children[ended[0]].returncode
                why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                self._set_fault(ended[0], why)
            elif self._launcher not in (None, os.getppid()) or (self._store_is_gone and 0 not in self._done):
                self._set_fault(0, "is gone (or the launcher of the run)")
            elif silent or (intervals_waiting >= self._timeout and not self._store_is_gone):
                rank = silent[0] if silent else 0
                self._set_fault(rank, f"has not answered for {self._timeout * _INTERVAL:g} s")

    def _set_fault(self, rank: int, why: str) -> None:
        """Record which process failed, and kill it if possible, so that those that wait for it get an error."""
        self._intervals_silent[rank] = _QUIET
        self._store_is_gone = self._store_is_gone or rank == 0
        self._fault = self._fault or f"{self._names[rank]} {why}"
        if rank in self._handles:
            with suppress(OSError):  # It has ended already.
                signal.pidfd_send_signal(self._handles[rank], signal.SIGKILL)

    def _read_messages(self) -> None:
        """Read from the store whether the run stops and whether a process failed."""
        if self.stop is None and self._store.check(["stop"]):
            step, number = self._store.get("stop").split()
            self.stop = int(step), int(number)
            self._store.set(f"knows/{self.rank}", "")
        if self._fault is None and self._store.check(["fault"]):
            rank = int(self._store.get("fault"))
            if rank != self.rank:
                self._fault = f"{self._names[rank]} failed: its error is printed above"

    def _is_quiet(self, rank: int, intervals: float) -> bool:
        return rank not in self._done and self._intervals_silent[rank] >= intervals


def _machine() -> str:
    """Return an identifier of this boot and PID name space, within which PIDs are comparable; `?` if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # Not Linux.
        return "?"
