"""Which classes a checkpoint may name.

A checkpoint may come from anyone, so loading it must not run code that its author chose.
"""

import inspect
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, Self

import yaml
from jsonargparse import _typehints, _util
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import nn
from torch.optim import Optimizer

from firstlight.checkpoints.io import read, weights_fault
from firstlight.compat import innermost_statement
from firstlight.errors import UsageError, root_cause
from firstlight.schedules import Schedule

__all__ = ["SafeLoading", "only_trusted", "stored_config"]

_TRUSTED_PACKAGES = ("firstlight", "torch", "torchmetrics")
_PART_TYPES = (nn.Module, Optimizer, Schedule, LightningDataModule)  # Tasks and metrics are nn.Modules.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_STORED_UNDER = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
_lock = RLock()


@contextmanager
def only_trusted(source: str | Path, trust: str | Collection[str] = ()) -> Iterator[None]:
    """In this context, jsonargparse imports and builds only what a checkpoint may name. It holds for all threads.

    From firstlight, torch and torchmetrics, these are networks, losses, optimisers, schedules, metrics, tasks and data
    modules. From the modules in `trust`, these are all classes and functions. The name of a module is checked before
    it is imported; an object is checked by its own `__module__`.

    Args:
        source: The checkpoint, for messages.
        trust: Further modules, including their submodules.

    Raises:
        UsageError: When anything else was named, even if another error occurred.
    """
    trusted = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in trusted:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{name!r} is not a module name; trust takes names such as my_project")
    asked, refused = "", []

    def refuse(why: str) -> None:
        refused.append(f"{source} names {asked}, {why}")
        raise ImportError(refused[-1])

    def before_import(path: str) -> None:
        nonlocal asked
        asked = path
        if not _within(path, (*_TRUSTED_PACKAGES, *trusted)):
            refuse(
                f"but classes of a checkpoint must be in {', '.join(_TRUSTED_PACKAGES)}; if you trust "
                f"{path.split('.')[0]}, use trust=[...] in a program or --trust on the command line"
            )

    def after_import(found: object) -> set[str]:
        module = str(getattr(found, "__module__", None))
        allowed = (*_TRUSTED_PACKAGES, *trusted)
        if not (inspect.isclass(found) or inspect.isroutine(found)) or not _within(module, allowed):
            refuse(f"which is not a class of {', '.join(allowed)} but a {type(found).__name__} of {module}")
        if not _within(module, trusted) and not (inspect.isclass(found) and issubclass(found, _PART_TYPES)):
            refuse("which is not a network, loss, optimiser, schedule, metric, task or data module")
        return set()

    # jsonargparse 4.53 can deny imports only for the whole process, and not by the imported object.
    hooks = {
        (_util, "check_import_path"): before_import,
        (_util, "canonical_import_paths"): after_import,
        (_typehints, "check_import_path"): before_import,
    }
    with _lock:
        replaced = {place: getattr(*place) for place in hooks}
        try:
            for place, hook in hooks.items():
                setattr(*place, hook)
            yield
        except Exception as error:
            if refused:
                raise UsageError(refused[0]) from error
            raise
        finally:
            for place, hook in replaced.items():
                setattr(*place, hook)
    if refused:
        raise UsageError(refused[0])


class SafeLoading:
    """A `load_from_checkpoint` that runs no code of the file. It must precede Lightning's class among the bases."""

    @_restricted_classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, map_location: Any = None, *, trust: str | Collection[str] = (), **options: Any
    ) -> Self:
        """Return a module with the weights and hyper-parameters of a checkpoint.

        Args:
            checkpoint_path: A file on a local disk.
            map_location: Device of the tensors.
            trust: Modules besides firstlight, torch and torchmetrics whose classes the checkpoint may name.
            **options: `strict`, and constructor arguments that replace those of the checkpoint.

        Raises:
            UsageError: When the file is damaged or holds code, when it names a class that is not trusted or not of
                this kind, or when it does not fit the class.
        """
        if options.pop("hparams_file", None) is not None:
            raise UsageError("hparams_file is not read: pass the arguments themselves")
        if options.pop("weights_only", None) is False:
            raise UsageError(f"weights_only=False would run code in {checkpoint_path}: leave it out")
        key = _STORED_UNDER["data" if issubclass(cls, LightningDataModule) else "model"]
        kept = _hyperparameters(read(checkpoint_path, mmap=True), checkpoint_path, key)
        try:
            with only_trusted(checkpoint_path, trust):
                built: Any = cls
                if class_path := kept.get("_class_path"):
                    built = _util.import_object(class_path)
                    if not (inspect.isclass(built) and issubclass(built, cls)):
                        raise UsageError(f"{checkpoint_path} holds a {class_path}, which is not a {cls.__name__}")
                loaded: Self = super(SafeLoading, built).load_from_checkpoint(  # type: ignore[misc]  # of the next base
                    Path(checkpoint_path).absolute(), map_location, weights_only=True, **options
                )
        except ArgumentError as error:
            raise UsageError(f"{checkpoint_path}: {innermost_statement(str(error))}") from error
        except RuntimeError as error:
            raise weights_fault(error, Path(checkpoint_path)) from error
        except ValueError as error:
            raise root_cause(error) from None
        return loaded


def stored_config(path: str | Path) -> str:
    """Return the configuration of task and data in a checkpoint as YAML. Its classes are not yet checked."""
    checkpoint = read(path, mmap=True)
    config = {}
    for part, key in _STORED_UNDER.items():
        kept = _hyperparameters(checkpoint, path, key)
        if "_class_path" not in kept:
            raise UsageError(f"{path} was not written by the command line and does not say how to build its {part}")
        arguments = {name: value for name, value in kept.items() if not name.startswith("_")}
        config[part] = {"class_path": kept["_class_path"], "init_args": arguments}
    try:
        return yaml.safe_dump(config, sort_keys=False)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} holds hyper-parameters that are not plain values: {error}") from error


def _hyperparameters(checkpoint: Mapping[str, Any], source: str | Path, key: str) -> dict[str, Any]:
    """Return the hyper-parameters under a key, and under the keys of old versions that Lightning also reads."""
    kept: dict[str, Any] = {}
    for each in ("hparams", "module_arguments", key):
        found = checkpoint.get(each) or {}
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise UsageError(f"{source} holds {each} that is not a mapping of argument names to values")
        kept |= found
    if kept.get("_instantiator", _INSTANTIATOR) != _INSTANTIATOR:
        raise UsageError(f"{source} asks to be built by {kept['_instantiator']}, which is not {_INSTANTIATOR}")
    return kept


def _within(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
