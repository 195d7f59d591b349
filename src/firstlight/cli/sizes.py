"""Fill arguments that are left out and that the data determine, such as `in_features`."""

from collections.abc import Iterator, Set
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

SIZES = frozenset({"classes", "in_channels", "in_features", "kind", "labels", "numeric_features", "out_features"})
"""Arguments of any class in the configuration that may be left out; `DataModule.sizes` describes them."""
_OF_DATA = frozenset({"kind"})
"""Those of data modules only: a network may have another `kind`."""


class Holes:
    """The arguments in a configuration that were left out and that the data may determine.

    Those of the model hold a placeholder until they are filled, so that the configuration is valid.
    """

    def __init__(self, config: Namespace) -> None:
        of_model = [*_find(config.get("model"), SIZES - _OF_DATA)]
        of_data = [*_find(config.get("data"), SIZES)]
        self._found = [*of_model, *of_data]
        for arguments, name in of_model:
            arguments[name] = 1

    def __bool__(self) -> bool:
        return bool(self._found)

    def fill(self, datamodule: LightningDataModule) -> None:
        """Fill the holes with the sizes of the data. None stays where the data module does not tell them."""
        datamodule.prepare_data()
        datamodule.setup("fit")
        sizes = datamodule.sizes() if hasattr(datamodule, "sizes") else {}
        for arguments, name in self._found:
            arguments[name] = sizes.get(name)


def _find(config: Any, names: Set[str]) -> Iterator[tuple[Namespace, str]]:
    if isinstance(config, list | tuple):
        for each in config:
            yield from _find(each, names)
    elif isinstance(config, dict):
        yield from _find([*config.values()], names)
    elif isinstance(config, Namespace):
        for name, value in vars(config).items():
            if value is None and name in names:
                yield config, name
            else:
                yield from _find(value, names)
