"""What the hyper-parameters of a checkpoint may hold: plain values, and names of listed classes.

Every value is judged before anything is imported, opened or built, because anybody may have written it.
"""

import inspect
import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

from firstlight.errors import UsageError
from firstlight.schedules import Schedule

_SOURCES: dict[str, tuple[type, str]] = {
    "firstlight.tasks": (LightningModule, "firstlight.tasks"),
    "firstlight.data": (LightningDataModule, "firstlight.data"),
    "firstlight.data.augment": (nn.Module, "firstlight.data"),
    "firstlight.networks": (nn.Module, "firstlight.networks"),
    "firstlight.losses": (nn.Module, "firstlight.losses"),
    "firstlight.metrics": (Metric, "firstlight.metrics"),
    "firstlight.optim": (Optimizer, "firstlight.optim"),
    "firstlight.schedules": (Schedule, "firstlight.schedules"),
    "torch.nn.modules": (nn.Module, "torch.nn"),
    "torch.optim": (Optimizer, "torch.optim"),
    # Of torchmetrics, the groups whose constructors open no file and fetch no network. Those of images, audio, video
    # and text load networks and word lists.
    "torchmetrics.aggregation": (Metric, "torchmetrics"),
    "torchmetrics.classification": (Metric, "torchmetrics.classification"),
    "torchmetrics.clustering": (Metric, "torchmetrics.clustering"),
    "torchmetrics.nominal": (Metric, "torchmetrics.nominal"),
    "torchmetrics.regression": (Metric, "torchmetrics.regression"),
    "torchmetrics.retrieval": (Metric, "torchmetrics.retrieval"),
    "torchmetrics.segmentation": (Metric, "torchmetrics.segmentation"),
}
"""By module that lists classes: the kind that a checkpoint may name, and the module's public name."""

_CLASS_NAMES = ("class_path", "_class_path")
_MOST_DEPTH, _MOST_VALUES, _MOST_CHARACTERS, _MOST_INTEGER = 32, 100_000, 10_000, 2**63

_LOCATION_NAME = re.compile(r"(^|[_.])(path|root|dir|directory|folder|file|filename|url|uri|address)s?$")
_YAML_ANCHOR, _YAML_ALIAS = re.compile(r"(^|[\s\[{,:-])&\w"), re.compile(r"(^|[\s\[{,:-])\*\w")
_LOCATION_TEXT = re.compile(r"://|::|^(file|data):|^[~/\\]|^\.\.?([/\\]|$)|[/\\]\.\.([/\\]|$)|^[A-Za-z]:[/\\]|\0")


@cache
def allowed_classes() -> dict[str, type]:
    """Return the classes that a checkpoint may name, by each of their names."""
    found: dict[str, type] = {}
    for source, (kind, public) in _SOURCES.items():
        module = import_module(source)
        for name in getattr(module, "__all__", vars(module)):
            each = getattr(module, name)
            # What a module has imported is not listed with it.
            if inspect.isclass(each) and issubclass(each, kind) and is_within(each.__module__, [public]):
                names = {f"{public}.{name}", f"{each.__module__}.{each.__qualname__}"}
                if public.startswith("torchmetrics"):  # Its top level repeats the classes of its groups.
                    names.add(f"torchmetrics.{name}")
                found |= dict.fromkeys(names, each)
    return found


def judge(values: Mapping[str, Any], source: str, trust: Collection[str] = ()) -> None:
    """Refuse hyper-parameters that are not plain values and names that a checkpoint may hold.

    Args:
        values: Hyper-parameters by name.
        source: The checkpoint, for messages.
        trust: Further modules whose classes the checkpoint may name, with their submodules.

    Raises:
        UsageError: With the place of the first value that is refused.
    """
    left = _MOST_VALUES

    def refuse(place: str, why: str) -> None:
        raise UsageError(f"{source} holds {shorten(place)}{why}")

    def visit(value: object, place: str, name: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if depth > _MOST_DEPTH or left < 0:
            limit = f"{_MOST_DEPTH} levels" if depth > _MOST_DEPTH else f"{_MOST_VALUES:,} values"
            raise UsageError(f"{source} holds hyper-parameters of more than {limit}: refused")
        if name in _CLASS_NAMES:
            refuse_class(value, source, trust)
        elif type(value) is dict:
            for key, inner in value.items():
                if type(key) is not str or len(key) > _MOST_CHARACTERS:
                    refuse(place, f", a mapping with the key {shorten(key)}, which is not a short text")
                visit(inner, f"{place}.{key}" if place else key, key, depth + 1)
        elif type(value) in (list, tuple):
            for index, inner in enumerate(value):  # type: ignore[arg-type]
                visit(inner, f"{place}[{index}]", name, depth + 1)
        elif is_location(name, value):
            refuse(place, f"={shorten(value)}, a location: a checkpoint may hold no path and no address")
        elif type(value) is str and len(value) > _MOST_CHARACTERS:
            refuse(place, f", a text of more than {_MOST_CHARACTERS:,} characters")
        elif type(value) is str and _YAML_ANCHOR.search(value) and _YAML_ALIAS.search(value):
            refuse(place, f"={shorten(value)}, a YAML alias")  # jsonargparse reads text as YAML, and may expand it.
        elif type(value) is int and abs(value) >= _MOST_INTEGER:
            refuse(place, ", a whole number of more than 64 bits")
        elif value is not None and type(value) not in (bool, int, float, str):
            refuse(place, f", a {type(value).__name__}: hyper-parameters must be plain values")

    # A mapping of a library, such as Lightning's, counts as its content.
    visit(dict(values), "", "", 0)


def refuse_class(name: object, source: str, trust: Collection[str] = ()) -> None:
    """Raise a `UsageError` if a checkpoint may not name this class."""
    if isinstance(name, str) and (name in allowed_classes() or is_within(name, trust)):
        return
    if not isinstance(name, str) or is_location("", name) or len(name) > _MOST_CHARACTERS:
        raise UsageError(f"{source} names {shorten(name)}, which is not a class")
    package = name.split(".")[0]
    if package in ("firstlight", "torch", "torchmetrics"):
        raise UsageError(
            f"{source} names {shorten(name)}, which is not a network, loss, optimiser, schedule, metric, task or data "
            "module that a checkpoint may name"
        )
    raise UsageError(
        f"{source} names {shorten(name)}, but classes of a checkpoint must be parts of firstlight, torch or "
        f"torchmetrics; if you trust {shorten(package)}, use trust=[...] in a program or --trust on the command line"
    )


def check_metrics(owner: str, metrics: Mapping[str, Metric]) -> None:
    """Refuse a metric of torchmetrics that a checkpoint may not name, because the checkpoint could not be used."""
    for name, metric in metrics.items():
        kind = type(metric)
        if is_within(kind.__module__, ["torchmetrics"]) and kind not in allowed_classes().values():
            groups = [public.partition(".")[2] for public in _SOURCES if public.startswith("torchmetrics.")]
            raise UsageError(
                f"{owner} was given metrics.{name}={kind.__module__}.{kind.__qualname__}, which a checkpoint may not "
                f"name: use a metric of torchmetrics' {', '.join(groups)}"
            )


def is_location(name: str, value: object) -> bool:
    """Return whether an option says where something is: by its name, or because its text is a path or an address.

    >>> is_location("path", "wine.csv"), is_location("weights", "https://host/x"), is_location("monitor", "val/loss")
    (True, True, False)
    """
    if isinstance(value, list | tuple):
        return any(is_location(name, each) for each in value)
    if isinstance(value, str) and name not in _CLASS_NAMES:
        return bool(_LOCATION_NAME.search(name) or _LOCATION_TEXT.search(value))
    return name == "download" and value is True


def without_locations(value: Any) -> Any:
    """Return plain values without the options that say where something is; a checkpoint holds none.

    >>> without_locations({"path": "wine.csv", "target": "kind", "parts": [{"init_args": {"weights": "/a.pt"}}]})
    {'target': 'kind', 'parts': [{'init_args': {}}]}
    """
    if isinstance(value, Mapping):
        return {key: without_locations(inner) for key, inner in value.items() if not is_location(str(key), inner)}
    if isinstance(value, list | tuple):
        return type(value)(without_locations(inner) for inner in value)
    return value


def is_within(path: str, modules: Collection[str]) -> bool:
    """Return whether a dotted name is one of these modules or in one of them."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def shorten(value: object) -> str:
    """Return a value as text of at most 80 printable characters."""
    text = value if isinstance(value, str) else f"a {type(value).__name__}"
    return "".join(each if each.isprintable() else "?" for each in text[:80]) + "..." * (len(text) > 80)
