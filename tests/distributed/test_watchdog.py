"""Watchdogs that share a store in memory; tests/run/test_signals.py tests real processes."""

import os
import subprocess
import sys
import time

import pytest
from torch.distributed import HashStore

from firstlight.distributed import RankWatchdog, watchdog


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(watchdog, "_INTERVAL", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE", 10**9)  # It would end the process of the tests.


def made(many=2, timeout=60.0, **options):
    store = HashStore()
    found = [RankWatchdog(store, rank, many, timeout, **options) for rank in range(many)]
    for each in found:
        each.start()
    return found


def name(rank):
    return f"process {rank} (PID {os.getpid()} on {os.uname().nodename})"


def waited_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_stop_is_asked_for_until_all_processes_know_the_step(fast):
    found = made(3)
    found[1].ask(8, 15)
    assert [each.stop for each in found] == [(8, 15)] * 3
    found[2].ask(9, 2)  # Too late: the first request holds.
    assert [each.stop for each in found] == [(8, 15)] * 3
    for each in found:
        each.close()


def test_a_process_that_fails_is_named_by_the_others(fast):
    first, second = made()
    second.fail()
    assert first.diagnose() == f"{name(1)} failed: its error is printed above"
    assert second.diagnose(0.2) is None
    first.close(), second.close()


def test_a_process_without_heartbeats_is_named_unless_it_is_done(fast):
    first, second, third = made(3)
    second.close()
    assert first.diagnose(0.5) is None
    third._closed.set()  # It sends no more heartbeats, and never said that it was done.
    assert first.diagnose() == f"{name(2)} was killed or cannot be reached"
    assert first.is_reporter() and second.is_reporter() is False
    first.close()


def test_a_process_that_is_silent_for_the_timeout_is_named_and_none_kills_itself(fast):
    first, second = made(timeout=0.2)
    second._closed.set()
    assert waited_for(lambda: first._fault is not None)
    assert first._fault == f"{name(1)} has not answered for 0.2 s"
    first.close()


@pytest.mark.parametrize(
    ("code", "told"), [("exit(3)", "ended with exit code 3"), ("kill(os.getpid(), 9)", "was killed by signal 9")]
)
def test_a_child_that_has_ended_is_named_although_its_heartbeats_continue(code, told, fast):
    child = subprocess.Popen([sys.executable, "-c", f"import os; os.{code.replace('exit', '_exit')}"])
    first, second = made(children={1: child})
    assert waited_for(lambda: first._fault is not None) and first._fault == f"{name(1)} {told}"
    first.close(), second.close()


def test_a_process_whose_parent_has_ended_continues_unless_that_was_its_launcher(fast, monkeypatch):
    free, launched = made(), made(has_launcher=True)
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert waited_for(lambda: launched[1]._fault is not None)
    assert launched[1]._fault == f"{name(0)} is gone (or the launcher of the run)"
    assert free[0]._fault is None and free[1]._fault is None
    for each in (*free, *launched):
        each.close()
