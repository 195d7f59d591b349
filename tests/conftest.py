import os
import signal

# On few processors one thread per process is faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests run on the CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import copytree

import pytest

from firstlight.__main__ import main
from tests.helpers import CONFIG, Ranks, newest

# A shell that starts the tests in the background lets them and their processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Figure:
    """Number of trials of a case that succeeded."""

    case: str
    of: int
    reached: int = 0
    faults: list[str] = field(default_factory=list)

    def trial(self, fault=""):
        """Count a trial; it succeeded if `fault` is empty."""
        self.reached += not fault
        self.faults += [str(fault)] if fault else []


FIGURES = pytest.StashKey[list[Figure]]()


@pytest.fixture
def figure(request):
    """Return `figure(case, of)`, a context that fails the test unless `of` trials succeed in it.

    `tox -e faults` prints the counts, also for failed tests. Counts of the same case in several tests are added.
    """

    @contextmanager
    def counted(case, of=1):
        counts = Figure(case, of)
        request.config.stash.setdefault(FIGURES, []).append(counts)
        yield counts
        assert counts.reached == of, f"{case}: {counts.reached} of {of}\n" + "\n".join(counts.faults)

    return counted


def pytest_terminal_summary(terminalreporter, config):
    """Print the counts as a table if the tests marked `faults` were selected."""
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
    return folder, Ranks(main, ["run", "--config", CONFIG, "--trainer.max_epochs=4"], cwd=folder).succeed()


@pytest.fixture
def finished(finished_once, tmp_path):
    """A folder with a run of four epochs, the run directory, and the finished process."""
    folder, done = finished_once
    copied = copytree(folder, tmp_path / "finished")
    return copied, newest(copied), done
