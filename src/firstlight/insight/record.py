"""What a run recorded: its series, as in `metrics.csv`, and its facts, as in `results.json`."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Series:
    """One number over time.

    Args:
        steps: `(N,)` int64, indices of optimiser steps, from 0, increasing.
        values: `(N,)` float64; NaN and infinity are kept.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float]) -> "Series":
        """Return what was logged, in this order. A resumed run repeats steps: its values replace those from there on.

        >>> Series.of([9, 19, 29, 19], [1, 2, 3, 4])
        Series(steps=array([ 9, 19]), values=array([1., 4.]))
        """
        every, kept = np.array(steps, np.int64), np.ones(len(steps), bool)
        kept[:-1] = every[:-1] < np.minimum.accumulate(every[::-1])[::-1][1:]
        return cls(every[kept], np.array(values, np.float64)[kept])


@dataclass(frozen=True)
class Record:
    """What findings are made from.

    Args:
        series: By name, as in `metrics.csv`.
        facts: By name, plain values: what is known of network, data, options and ending. `docs/record.md` lists them.
    """

    series: Mapping[str, Series]
    facts: Mapping[str, Any]

    def layers(self, prefix: str) -> dict[str, Series]:
        """Return the series `PREFIX/LAYER` by layer, in the order in which the network calls the layers.

        >>> series = Series(np.array([49]), np.array([0.5]))
        >>> list(Record({"activation/zeros/a.0": series, "lr": series}, {}).layers("activation/zeros"))
        ['a.0']
        """
        start = prefix + "/"
        return {name.removeprefix(start): each for name, each in self.series.items() if name.startswith(start)}

    @classmethod
    def read(cls, run_dir: Path) -> "Record":
        """Return the record of a run directory; what is missing or damaged there is left out."""
        facts: Any = None
        with suppress(OSError, ValueError, RecursionError):
            facts = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        facts = facts.get("facts") if isinstance(facts, dict) else None
        return cls(SeriesReader(run_dir / "metrics.csv").read(), facts if isinstance(facts, dict) else {})


class SeriesReader:
    """Reads a `metrics.csv` that grows: each `read` parses only what was appended since the last one.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._found: dict[str, tuple[list[int], list[float]]] = {}

    def read(self) -> dict[str, Series]:
        """Return all series by name. Lines that are no numbers are left out."""
        with suppress(OSError), self.path.open("rb") as file:
            if self.path.stat().st_size < self._position:  # Another file.
                self._position, self._found = 0, {}
            file.seek(self._position)
            complete, newline, _ = file.read().rpartition(b"\n")
            self._position += len(complete) + len(newline)
            self._add(complete.decode("utf-8", errors="replace").replace("\0", ""))
        return {name: Series.of(*found) for name, found in self._found.items()}

    def _add(self, text: str) -> None:
        with suppress(csv.Error):
            for row in csv.reader(text.splitlines()):
                try:
                    step, name, value = row[0], row[1], float(row[2])
                except (ValueError, IndexError):  # For example the header.
                    continue
                if not re.fullmatch(r"[0-9]{1,18}", step):  # More digits do not fit into int64.
                    continue
                steps, values = self._found.setdefault(name, ([], []))
                steps.append(int(step))
                values.append(value)
