"""Attributes of every kind of value resume with the same bits, or the run is refused."""

import argparse
import itertools
import operator
import pathlib
import queue
from array import array
from collections import ChainMap, UserDict, UserList, namedtuple
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from functools import partial
from types import FunctionType, MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.callbacks.attributes import find_lost
from firstlight.errors import UsageError
from tests.callbacks.test_resume_any import EXACT, Net, _quiet, assert_resumes_exactly, fit  # noqa: F401

DAY = datetime(2020, 1, 1, tzinfo=UTC)
Pair = namedtuple("Pair", "first second")


class Colour(Enum):
    RED, GREEN, BLUE, BLACK = "r", "g", "b", "k"


class Level(IntEnum):
    LOW, MIDDLE, HIGH, HIGHEST = 1, 2, 3, 4


class Slots:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


@dataclass(frozen=True)
class Frozen:
    count: int = 0


class History(list):
    best = 0


class Table(dict):
    pass


class Seen(set):
    pass


class Path(tuple):
    pass


def following(value):
    members = list(type(value))
    return members[(members.index(value) + 1) % len(members)]


def grown(value):
    """Return a list or set of the user's class with another value, after it has changed in place."""
    value.add(len(value)) if isinstance(value, set) else value.append(len(value))
    return value


def counted(value, name="count"):
    value[name] += 1
    return value


def ticked(value):
    value.count += 1
    return value


def proxy(number):
    return MappingProxyType({"count": number})


def queued(value):
    value.put(1)
    return value


def best(value):
    value.append(1)
    value.best += len(value)
    return value


KINDS = {
    # By name, the first value, the value of the next step, and the number that training depends on.
    "bytearray": (bytearray(b"a"), lambda v: bytearray(v + b"a"), len),
    "array": (array("d", [1.0]), lambda v: array("d", [*v, 1.0]), len),
    "range": (range(1), lambda v: range(v.stop + 1), len),
    "count": (itertools.count(3, 2), lambda v: v, next),
    "decimal": (Decimal(1), lambda v: v + Decimal("0.1"), float),
    "fraction": (Fraction(1), lambda v: v + Fraction(1, 3), float),
    "datetime": (DAY, lambda v: v + timedelta(hours=1), lambda v: (v - DAY).seconds / 3600),
    "date": (date(2020, 1, 1), lambda v: v + timedelta(days=1), lambda v: (v - DAY.date()).days),
    "time": (time(0, 1), lambda v: v.replace(minute=(v.minute + 7) % 60), lambda v: v.minute),
    "timedelta": (timedelta(1), lambda v: v * 1.1, lambda v: v.total_seconds() / 1e5),
    "size": (torch.Size([1]), lambda v: torch.Size([v[0] + 1, 2]), lambda v: v[0]),
    "type_of_tensor": (
        torch.float32,
        lambda v: {4: torch.float64, 8: torch.int16, 2: torch.float32}[v.itemsize],
        lambda v: v.itemsize,
    ),
    "enum": (Colour.RED, following, lambda v: ord(v.value)),
    "int_enum": (Level.LOW, following, int),
    "named_tuple": (Pair(1, 2), lambda v: v._replace(first=v.first + 1), lambda v: v.first),
    "own_tuple": (Path([1]), lambda v: Path([*v, 1]), len),
    "own_list": (History([0]), best, lambda v: len(v) + v.best),
    "own_dict": (Table(count=0), counted, lambda v: v["count"]),
    "own_set": (Seen([0]), grown, len),
    "slots": (Slots(), ticked, lambda v: v.count),
    "frozen": (Frozen(), lambda v: Frozen(v.count + 1), lambda v: v.count),
    "namespace": (SimpleNamespace(count=0), ticked, lambda v: v.count),
    "arguments": (argparse.Namespace(count=0), ticked, lambda v: v.count),
    "user_dict": (UserDict(count=0), counted, lambda v: v["count"]),
    "user_list": (UserList([0]), grown, len),
    "path": (pathlib.Path("a"), lambda v: v / "a", lambda v: len(v.parts)),
    "queue": (queue.Queue, queued, queue.Queue.qsize),
    "chain_map": (ChainMap({"count": 0}), counted, lambda v: v["count"]),
    "sparse": (torch.ones(2).to_sparse(), lambda v: (v.to_dense() + 1).to_sparse(), lambda v: v.to_dense().sum()),
    "list_of_them": ([Decimal(1), Colour.RED], lambda v: [v[0] + 1, following(v[1])], lambda v: ord(v[1].value)),
}
REFUSED = {
    "dates": (np.array(["2020-01-01"], "M8[D]"), lambda v: v + 1, lambda v: int(v.astype(int)[0]) / 1e4),
    "records": (np.zeros(1, [("count", int)]), lambda v: counted(v.copy()), lambda v: int(v["count"][0])),
    "iterator": (iter([*range(100)]), lambda v: (next(v), v)[1], operator.length_hint),
    "generator": (lambda: (each for each in range(100)), lambda v: v, next),
    "list_of_iterators": ([iter([*range(100)])], lambda v: (next(v[0]), v)[1], lambda v: operator.length_hint(v[0])),
    "partial": (partial(int, 0), lambda v: partial(int, v() + 1), lambda v: v()),
    "proxy": (lambda: proxy(0), lambda v: proxy(v["count"] + 1), lambda v: v["count"]),
    "objects": (np.array([0], object), lambda v: v + 1, lambda v: int(v[0])),
}


class Keeps(Net):
    """A module whose training depends on attributes of all kinds."""

    kinds = KINDS

    def __init__(self):
        super().__init__()
        for name, (value, _, _) in self.kinds.items():
            setattr(self, name, value() if isinstance(value, FunctionType | type) else deepcopy(value))

    def training_step(self, batch, batch_idx):
        total = 0.0
        for name, (_, following_value, number) in self.kinds.items():
            setattr(self, name, following_value(getattr(self, name)))
            total += float(number(getattr(self, name)))
        return super().training_step(batch, batch_idx) * (1 + 1e-3 * total)


def only(name, kinds):
    return type("One", (Keeps,), {"kinds": {name: kinds[name]}})


def test_values_of_all_kinds_resume_with_the_same_bits(tmp_path):
    assert_resumes_exactly(tmp_path, EXACT["shuffle"], Keeps)


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_be_saved_are_refused(name, tmp_path):
    module = only(name, REFUSED)
    fit(tmp_path, EXACT["shuffle"], module, stop=8)
    with pytest.raises(UsageError, match=rf"module\.{name} changed during training, and a .* in it cannot be saved"):
        fit(tmp_path, EXACT["shuffle"], module, resume=True)
    fit(tmp_path, EXACT["shuffle"], module, resume=True, exact=False)


@pytest.mark.parametrize(
    ("saved", "error"),
    [
        ({"kind": "torch.dtype", "value": "torch.load"}, KeyError),
        ({"kind": "decimal.Decimal", "value": "one"}, ArithmeticError),
        ({"kind": "array.array", "value": [1]}, TypeError),
    ],
)
def test_crafted_values_are_refused_before_anything_is_set(saved, error):
    module, trainer = Keeps(), Trainer(logger=False, accelerator="cpu")
    with pytest.raises(error):  # `RandomState` turns it into one line.
        find_lost({"trainer": trainer, "module": module}, {}, {"module": {"decimal": saved}}, {})
    assert module.decimal == 1


def test_a_member_that_its_enum_has_lost_is_refused():
    module, trainer = Keeps(), Trainer(logger=False, accelerator="cpu")
    saved = {"module": {"enum": {"kind": "enum", "value": "z"}}}
    lost = find_lost({"trainer": trainer, "module": module}, {}, saved, {})
    assert (
        lost == "module.enum changed during training, and its Enum does not exist at the start, or has no such member"
    )
