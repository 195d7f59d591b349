"""Fill arguments that are left out and that the data determine, such as `in_features`."""

import inspect
import os
from collections.abc import Iterator, Set
from datetime import timedelta
from pkgutil import resolve_name
from typing import Any, get_args

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from torch.distributed.rendezvous import rendezvous

SIZES = frozenset({"classes", "in_channels", "in_features", "kind", "labels", "numeric_features", "out_features"})
"""Arguments of any class in the configuration that may be left out; `DataModule.sizes` describes them."""
_OF_DATA = frozenset({"kind"})
"""Those of data modules only: a network may have another `kind`."""


class Holes:
    """The arguments in a configuration that were left out and that the data may determine.

    Those of the model hold a placeholder until they are filled, so that the configuration is valid. Where an argument
    takes null, null is the same as leaving it out: the saved configuration would not tell them apart.

    Attributes:
        were_there: Whether there were any, so that sizes follow from the options of the data.
    """

    def __init__(self, config: Namespace) -> None:
        of_model = [*_find(config.get("model"), SIZES - _OF_DATA)]
        of_data = [*_find(config.get("data"), SIZES)]
        self._found = [*of_model, *of_data]
        self.were_there = bool(self._found)
        for arguments, name in of_model:
            arguments[name] = 1

    def __bool__(self) -> bool:
        return bool(self._found)

    def leave(self) -> None:
        """Leave the holes of a saved configuration: its run has found that the data do not tell these sizes."""
        for arguments, name in self._found:
            arguments[name] = None

    def fill(self, datamodule: LightningDataModule) -> None:
        """Fill the holes with the sizes of the data. None stays where the data module does not tell them."""
        sizes = {}
        if hasattr(datamodule, "sizes"):
            _prepare_data(datamodule)
            datamodule.setup("fit")
            sizes = datamodule.sizes()
        for arguments, name in self._found:
            arguments[name] = sizes.get(name)
        self._found = []


def _prepare_data(datamodule: LightningDataModule) -> None:
    """Call `prepare_data` as Lightning does: in the first process of each node, or of all, before the others go on."""
    names = ("LOCAL_RANK", "GROUP_RANK" if "GROUP_RANK" in os.environ else "NODE_RANK")
    local, node = (int(os.environ.get(name, 0)) for name in names)
    is_first = local == 0 and (datamodule.prepare_data_per_node or node == 0)
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_first or ("RANK" in os.environ and not has_store):  # Other launchers have nothing to wait with.
        datamodule.prepare_data()
    if has_store:  # Of torchrun. Lightning's launcher starts the others when the first process was here.
        store, _, _ = next(rendezvous("env://"))
        key = f"firstlight/prepared/{node if datamodule.prepare_data_per_node else 0}"
        store.set(key, "") if is_first else store.wait([key], timedelta(days=1))


def _find(config: Any, names: Set[str]) -> Iterator[tuple[Namespace, str]]:
    if isinstance(config, list | tuple):
        for each in config:
            yield from _find(each, names)
    elif isinstance(config, dict):
        yield from _find([*config.values()], names)
    elif isinstance(config, Namespace):
        init_args = config.get("init_args")
        for name, value in vars(config).items():
            if value is None and name in names:
                yield config, name
            elif value is init_args and init_args is not None:
                yield from (hole for hole in _find(value, names) if hole[0] is not value or _fits(config, hole[1]))
            else:
                yield from _find(value, names)


def _fits(config: Namespace, name: str) -> bool:
    """Return whether an argument of a class may be a size: `labels: list[str] | None` is something else."""
    parameter = inspect.signature(resolve_name(config.class_path)).parameters.get(name)
    if name in _OF_DATA or parameter is None or parameter.annotation is inspect.Parameter.empty:
        return True
    annotation = parameter.annotation
    return "int" in annotation if isinstance(annotation, str) else annotation is int or int in get_args(annotation)
