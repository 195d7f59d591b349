import os
import signal

# Two processors of one core: one thread is faster, and processes of a test do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Lightning's accelerator probes and TensorBoard's protobuf need no accelerator.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import copytree

import pytest

from tests.helpers import CONFIG, firstlight, newest

# A shell that runs the tests in the background would let them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Figure:
    """How many trials of a case ended well."""

    case: str
    of: int
    reached: int = 0
    faults: list[str] = field(default_factory=list)

    def trial(self, fault=""):
        """Count a trial, which ended well unless a fault is named."""
        self.reached += not fault
        self.faults += [str(fault)] if fault else []


FIGURES = pytest.StashKey[list[Figure]]()


@pytest.fixture
def figure(request):
    """Return `figure(case, of)`, a context in which that many trials are to end well, or the test fails.

    `tox -e faults` prints what was reached, also where a test fails; equal cases of several tests are added up.
    """

    @contextmanager
    def counted(case, of=1):
        counts = Figure(case, of)
        request.config.stash.setdefault(FIGURES, []).append(counts)
        yield counts
        assert counts.reached == of, f"{case}: {counts.reached} of {of}\n" + "\n".join(counts.faults)

    return counted


def pytest_terminal_summary(terminalreporter, config):
    """Print the figures as a table where tests of faults were asked for."""
    figures = config.stash.get(FIGURES, [])
    if not figures or "faults" not in config.option.markexpr:
        return
    terminalreporter.write_line("\n| case | figure |\n|---|---|")
    for case in dict.fromkeys(each.case for each in figures):
        same = [each for each in figures if each.case == case]
        reached, of = sum(each.reached for each in same), sum(each.of for each in same)
        terminalreporter.write_line(f"| {case} | {reached}/{of} |")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, firstlight("run", "--config", CONFIG, "--trainer.max_epochs=4", cwd=folder)


@pytest.fixture
def finished(finished_once, tmp_path):
    """A run of four epochs in a folder of the test's own, and what it printed."""
    folder, done = finished_once
    copied = copytree(folder, tmp_path / "finished")
    return copied, newest(copied), done
