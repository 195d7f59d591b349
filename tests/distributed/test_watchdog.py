"""What processes know of each other, by a store in memory; tests/test_signals.py tries it with real ones."""

import os
import subprocess
import sys
import time

import pytest
from torch.distributed import HashStore

from firstlight.distributed import watchdog
from firstlight.distributed.watchdog import RankWatchdog


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE", 10**9)  # It would end the process of the tests.


def made(many=2, timeout=60.0, **options):
    store = HashStore()
    found = [RankWatchdog(store, rank, many, timeout, **options) for rank in range(many)]
    for each in found:
        each.start()
    return found


def waited_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_who_is_asked_to_stop_waits_until_all_know_when(fast):
    found = made(3)
    found[1].ask(8, 15)
    assert [each.stop for each in found] == [(8, 15)] * 3
    found[2].ask(9, 2)  # Too late: what was agreed first holds.
    assert [each.stop for each in found] == [(8, 15)] * 3
    for each in found:
        each.close()


def test_one_that_fails_is_named_by_the_others(fast):
    first, second = made()
    second.fail()
    assert first.diagnose() == f"process 1 (PID {os.getpid()} on {os.uname().nodename}) failed: its error stands above"
    assert second.diagnose(0.2) is None
    first.close(), second.close()


def test_one_that_no_longer_beats_is_named_and_one_that_is_done_is_not(fast):
    first, second, third = made(3)
    second.close()
    assert first.diagnose(0.5) is None
    third._closed.set()  # It beats no more, and has said nothing.
    assert "process 2 " in first.diagnose() and "was killed or cannot be reached" in first.diagnose()
    assert first.is_reporter() and second.is_reporter() is False
    first.close()


def test_a_silence_makes_the_others_give_up_and_nobody_kills_himself(fast):
    first, second = made(timeout=0.2)
    second._closed.set()
    assert waited_for(lambda: first._fault is not None)
    assert "process 1 " in first._fault and "has not answered for 0.2 s" in first._fault
    first.close()


@pytest.mark.parametrize(("code", "told"), [("exit(3)", "exit code 3"), ("kill(os.getpid(), 9)", "by signal 9")])
def test_a_child_that_has_ended_is_noticed_though_it_beats_in_the_store(code, told, fast):
    child = subprocess.Popen([sys.executable, "-c", f"import os; os.{code.replace('exit', '_exit')}"])
    first, second = made(children={1: child})
    assert waited_for(lambda: first._fault is not None) and told in first._fault
    first.close(), second.close()


def test_a_process_whose_parent_has_changed_goes_on_unless_that_was_its_launcher(fast, monkeypatch):
    free, launched = made(), made(has_launcher=True)
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert waited_for(lambda: launched[1]._fault is not None) and "is gone" in launched[1]._fault
    assert free[0]._fault is None and free[1]._fault is None
    for each in (*free, *launched):
        each.close()
