"""The space of a sweep: which options it changes, and between which values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from firstlight.errors import UsageError, did_you_mean

_KEYS = ("low", "high", "log", "int", "choices", "length", "when")

# The typical ranges of the fundamentals: low, high, whether the logarithm is drawn evenly, whether numbers are whole.
RANGES: Mapping[str, tuple[float, float, bool, bool]] = {
    "lr": (1e-5, 1e-2, True, False),
    "batch_size": (16, 512, True, True),
    "dropout": (0.1, 0.5, False, False),
    "weight_decay": (1e-4, 0.1, True, False),
    "max_epochs": (3, 100, True, True),
}


class Draws(Protocol):
    """What draws values: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number from `low` to `high`."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return a whole number from `low` to `high`."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""


@dataclass(frozen=True)
class Parameter:
    """One option of a space.

    Args:
        low: Smallest number.
        high: Largest number.
        log: Whether the logarithm is drawn evenly.
        whole: Whether only whole numbers are drawn.
        choices: Values to choose from, instead of numbers.
        length: Smallest and largest length, if the option is a list of such values.
        when: By option, the values with which this option is drawn at all.
    """

    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()
    length: tuple[int, int] | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def draw(self, name: str, trial: Draws) -> Any:
        """Return a value, or a list of values."""
        if self.length is None:
            return self._draw(name, trial)
        count = trial.suggest_int(f"{name}.length", *self.length)
        return [self._draw(f"{name}.{place}", trial) for place in range(count)]

    def _draw(self, name: str, trial: Draws) -> Any:
        if self.choices:  # Optuna stores the place in them, because it takes no lists.
            return self.choices[trial.suggest_categorical(name, range(len(self.choices)))]
        if self.whole:
            return trial.suggest_int(name, round(self.low), round(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def stored(self, name: str, value: Any) -> dict[str, Any] | None:
        """Return what Optuna stores for a value, or None if it is outside the space.

        >>> Parameter(1, 9, whole=True).stored("k", 3), Parameter(choices=("a", "b")).stored("k", "b")
        ({'k': 3}, {'k': 1})
        >>> Parameter(16, 64, whole=True, length=(1, 2)).stored("k", [32, 16])
        {'k.length': 2, 'k.0': 32, 'k.1': 16}
        >>> Parameter(1e-4, 0.1, log=True).stored("k", 0.0)
        """
        if self.length is not None:
            if not isinstance(value, list) or not self.length[0] <= len(value) <= self.length[1]:
                return None
            parts = [replace(self, length=None).stored(f"{name}.{place}", each) for place, each in enumerate(value)]
            found: dict[str, Any] = {f"{name}.length": len(value)}
            for part in parts:
                if part is None:
                    return None
                found |= part
            return found
        if self.choices:
            return {name: self.choices.index(value)} if value in self.choices else None
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        return {name: value} if is_number and self.low <= value <= self.high else None

    def ends(self) -> Iterator[Any]:
        """Return the values at the ends, or all choices: what the parts must take."""
        ends = self.choices or tuple(round(each) if self.whole else each for each in (self.low, self.high))
        return iter(ends if self.length is None else [[each] * count for each in ends for count in self.length])


Space = Mapping[str, Parameter]
"""Parameters by dotted option, for example `model.optimizer.lr`."""


def parse_space(content: Any, source: str) -> Space:
    """Return the space that a YAML file describes.

    Args:
        content: A mapping from options to parameters: `{low: 1, high: 9}`, with `log: true` or `int: true` if wanted,
            or `{choices: [a, b]}`, or the list `[a, b]` alone. With `length: [1, 3]`, the option is a list of such
            values. With `when: {OPTION: VALUE}`, it is drawn only if an earlier option has the value, or one of a list.
        source: Name of the file, for messages.

    Raises:
        UsageError: When a parameter cannot be right.

    >>> parse_space({"data.batch_size": [16, 32]}, "space.yaml")["data.batch_size"].choices
    (16, 32)
    >>> parse_space({"data.batch_size": {"low": 64, "high": 16}}, "space.yaml")
    Traceback (most recent call last):
    firstlight.errors.UsageError: space.yaml: data.batch_size: low=64 must be below high=16
    """
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{source} holds no space: write OPTION: {{low: 1, high: 9}} or OPTION: [a, b]")
    space: dict[str, Parameter] = {}
    for name, given in content.items():
        try:
            space[str(name)] = _parse(given, space)
        except UsageError as error:
            raise UsageError(f"{source}: {name}: {error}") from None
    return space


def _parse(given: Any, before: Space) -> Parameter:
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, dict):
        raise UsageError(f"{given!r} is no range: write {{low: 1, high: 9}} or a list of choices")
    for key in given:
        if key not in _KEYS:
            raise UsageError(f"unknown key {key}; known are {', '.join(_KEYS)}" + did_you_mean(str(key), _KEYS))
    when = given.get("when", {})
    if not isinstance(when, dict):
        raise UsageError(f"when: {when!r} is not OPTION: VALUE")
    for name in when:
        if name not in before:
            raise UsageError(f"when: {name} is no option above this one" + did_you_mean(str(name), before))
    conditions = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in when.items()}
    length = given.get("length")
    if length is not None and not (
        isinstance(length, list)
        and len(length) == 2
        and all(type(each) is int for each in length)
        and 0 <= length[0] <= length[1]
    ):
        raise UsageError(f"length: {length!r} is not [SHORTEST, LONGEST]")
    ends = None if length is None else (length[0], length[1])
    if "choices" in given:
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise UsageError(f"choices: {choices!r} is not a list of values")
        if numbers := [key for key in ("low", "high", "log", "int") if key in given]:
            raise UsageError(f"choices and {numbers[0]} exclude each other")
        return Parameter(choices=tuple(choices), length=ends, when=conditions)
    for key in ("low", "high"):
        value: Any = given.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            hint = "; YAML takes 1e-5 for a text: write 1.0e-5" if isinstance(value, str) else ""
            raise UsageError(f"{key}={value!r} is not a number{hint}" if key in given else f"{key} is missing")
    for key in ("log", "int"):
        if not isinstance(given.get(key, False), bool):
            raise UsageError(f"{key}={given[key]!r} is neither true nor false")
    low, high, log, whole = given["low"], given["high"], given.get("log", False), given.get("int", False)
    if not low < high:
        raise UsageError(f"low={low:g} must be below high={high:g}")
    if log and low <= 0:
        raise UsageError(f"low={low:g} must be above 0, because log is true")
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise UsageError(f"low={low:g} and high={high:g} must be whole numbers, because int is true")
    return Parameter(low, high, log, whole, length=ends, when=conditions)


def default_space(options: Mapping[str, Any], samples: int | None = None) -> Space:
    """Return the space of a configuration: the `RANGES` of those options that it has.

    A range is widened to the value of the configuration, if that is a number that it can hold.

    Args:
        options: All options of the configuration by dotted name.
        samples: Number of training samples, which no batch exceeds.

    >>> space = default_space({"model.optimizer.lr": 0.05, "data.batch_size": 32, "model.network.hidden": [64]})
    >>> {name: (each.low, each.high) for name, each in space.items()}
    {'model.optimizer.lr': (1e-05, 0.05), 'data.batch_size': (16, 512)}
    """
    places = {"lr": "model.optimizer.", "weight_decay": "model.optimizer.", "dropout": "model."}
    places |= {"batch_size": "data.batch_size", "max_epochs": "trainer.max_epochs"}
    space: dict[str, Parameter] = {}
    for option, own in options.items():
        name = option.rpartition(".")[2]
        if name not in RANGES or not option.startswith(places[name]):
            continue
        if type(own) not in (int, float) or own < 0:
            continue
        low, high, log, whole = RANGES[name]
        if own > 0 or not log:
            low, high = min(low, own), max(high, own)
        if name == "batch_size" and samples is not None:
            high = max(min(high, samples), low + 1)
        space[option] = Parameter(low, high, log, whole)
    return space


def draw(space: Space, trial: Draws) -> dict[str, Any]:
    """Return a value for each option whose conditions hold."""
    values: dict[str, Any] = {}
    for name, parameter in space.items():
        if all(other in values and values[other] in allowed for other, allowed in parameter.when.items()):
            values[name] = parameter.draw(name, trial)
    return values


def own_values(space: Space, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what Optuna stores for the values of a configuration, or None if one of them is outside the space.

    >>> own_values({"k": Parameter(1, 9)}, {"k": 3}), own_values({"k": Parameter(1, 9)}, {"k": 0})
    ({'k': 3}, None)
    """
    stored: dict[str, Any] = {}
    for name, parameter in space.items():
        if not all(options.get(other) in allowed for other, allowed in parameter.when.items()):
            continue
        found = parameter.stored(name, options.get(name))
        if found is None:
            return None
        stored |= found
    return stored
