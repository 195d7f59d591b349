"""Fill arguments that are left out and that the data determine, such as `in_features`."""

from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

SIZES = frozenset({"classes", "in_channels", "in_features", "kind", "labels", "numeric_features", "out_features"})
"""Arguments of any class in the configuration that may be left out; `DataModule.sizes` describes them."""


class Holes:
    """The arguments in a configuration that were left out and that the data may determine.

    Those of the model hold a placeholder until they are filled, so that the configuration is valid.
    """

    def __init__(self, config: Namespace) -> None:
        self._found = [*_find(config.get("model")), *_find(config.get("data"))]
        self._of_data = [*_find(config.get("data"))]
        for arguments, name in self._found:
            arguments[name] = None if (arguments, name) in self._of_data else 1

    def __bool__(self) -> bool:
        return bool(self._found)

    def fill(self, datamodule: LightningDataModule) -> None:
        """Fill the holes with the sizes of the data. None stays where the data module does not tell them."""
        datamodule.prepare_data()
        datamodule.setup("fit")
        sizes = datamodule.sizes() if hasattr(datamodule, "sizes") else {}
        for arguments, name in self._found:
            arguments[name] = sizes.get(name)


def _find(config: Any) -> Iterator[tuple[Namespace, str]]:
    if isinstance(config, list | tuple):
        for each in config:
            yield from _find(each)
    elif isinstance(config, dict):
        yield from _find([*config.values()])
    elif isinstance(config, Namespace):
        for name, value in vars(config).items():
            if value is None and name in SIZES:
                yield config, name
            else:
                yield from _find(value)
