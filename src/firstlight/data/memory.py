"""How much memory is free, and whether data may take it."""

import os
from pathlib import Path

SHARE = 4
"""Data in memory may take one part in this many of the free memory: training and other programs need the rest."""


def free_memory() -> int:
    """Return the bytes of memory that a process can still take, within the limit of its container, if it has one."""
    free = (
        1024 * _entry(_text("/proc", "meminfo"), "MemAvailable:")
        or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    )
    # The files of version 2 of Linux control groups, then those of version 1.
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, taken = _text(folder, limit).strip(), _text(folder, used).strip()
        if most.isdecimal() and taken.isdecimal():
            # Pages of files count as used, although they are given up when memory is needed.
            pages = _entry(_text(folder, "memory.stat"), "inactive_file")
            free = min(free, max(int(most) - int(taken) + pages, 0))
    return free


def _entry(text: str, name: str) -> int:
    """Return the number in the line that starts with a name; 0 if there is none."""
    found = (line.split() for line in text.splitlines())
    return next((int(words[1]) for words in found if words[:1] == [name] and words[1].isdecimal()), 0)


def _text(folder: str, name: str) -> str:
    try:
        return Path(folder, name).read_text()
    except OSError:
        return ""
