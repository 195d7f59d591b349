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
from jsonargparse import _paths, _typehints, _util
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from firstlight.checkpoints.allowed import allowed_classes, is_location, is_within, judge, refuse_class, shorten
from firstlight.checkpoints.io import raise_fault, read
from firstlight.errors import UsageError, innermost_statement

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_STORED_UNDER = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
_lock = RLock()


@contextmanager
def only_trusted(source: str | Path, trust: str | Collection[str] = ()) -> Iterator[None]:
    """In this context, jsonargparse imports and builds only what a checkpoint may name, and opens no file.

    These are the `allowed_classes`, and all classes and functions of the modules in `trust`. The name of a class is
    judged before its module is imported; an object of a trusted module is judged by its own `__module__`. A text where
    a class is expected is never opened as a file or an address. It holds for all threads.

    Args:
        source: The checkpoint, for messages.
        trust: Further modules, including their submodules.

    Raises:
        UsageError: When anything else was named, even if another error occurred.
    """
    trusted = trusted_modules(trust)
    asked, refused = "", []

    def refuse(why: str) -> None:
        refused.append(why)
        raise ImportError(why)

    def before_import(path: str) -> None:
        nonlocal asked
        asked = path
        try:
            refuse_class(path, str(source), trusted)
        except UsageError as error:
            refuse(str(error))

    def after_import(found: object) -> set[str]:
        module = str(getattr(found, "__module__", None))
        is_trusted = (inspect.isclass(found) or inspect.isroutine(found)) and is_within(module, trusted)
        if found is not allowed_classes().get(asked) and not is_trusted:
            refuse(f"{source} names {asked}, which is not a class of {', '.join(trusted)} but of {module}")
        return set()

    def no_file(*args: Any, **options: Any) -> None:
        raise _paths.PathError("a checkpoint may name no file")

    # jsonargparse 4.53 can deny imports only for the whole process, and not by the imported object.
    hooks = {
        (_util, "check_import_path"): before_import,
        (_util, "canonical_import_paths"): after_import,
        (_typehints, "check_import_path"): before_import,
        (_paths.Path, "__init__"): no_file,
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
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        trust: str | Collection[str] = (),
        prepared_inputs: bool = False,
        **options: Any,
    ) -> Self:
        """Return a module with the weights and hyper-parameters of a checkpoint.

        Args:
            checkpoint_path: A file on a local disk.
            map_location: Device of the tensors.
            trust: Modules whose classes the checkpoint may name, besides the parts of firstlight, torch and
                torchmetrics.
            prepared_inputs: For a task: whether you prepare its inputs as the data module did. If not, the task refuses
                to be called without a trainer, because it would take raw inputs for prepared ones.
            **options: `strict`, and constructor arguments that replace those of the checkpoint.

        Raises:
            UsageError: When the file is damaged, holds code, names a class that is not trusted or not of this kind, or
                does not fit the class.
        """
        if options.pop("hparams_file", None) is not None:
            raise UsageError("hparams_file is not read: pass the arguments themselves")
        if options.pop("weights_only", None) is False:
            raise UsageError(f"weights_only=False would run code in {checkpoint_path}: leave it out")
        key = _STORED_UNDER["data" if issubclass(cls, LightningDataModule) else "model"]
        checkpoint = read(checkpoint_path, mmap=True)
        kept = _hyperparameters(checkpoint, checkpoint_path, key, trust)
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
        except Exception as error:
            raise_fault(error, checkpoint_path)
        if not prepared_inputs:
            loaded.start_alone(checkpoint)
        return loaded

    def start_alone(self, checkpoint: Mapping[str, Any]) -> None:
        """Prepare for use without the other parts of a checkpoint from which this object was just loaded."""


def stored_config(path: str | Path, trust: str | Collection[str] = ()) -> str:
    """Return the configuration of task and data in a checkpoint as YAML, after judging every value."""
    checkpoint = read(path, mmap=True)
    config = {}
    for part, key in _STORED_UNDER.items():
        kept = _hyperparameters(checkpoint, path, key, trust)
        if "_class_path" not in kept:
            raise UsageError(f"{path} was not written by the command line and does not say how to build its {part}")
        arguments = {name: value for name, value in kept.items() if not name.startswith("_")}
        config[part] = {"class_path": kept["_class_path"], "init_args": arguments}
    try:
        return yaml.safe_dump(config, sort_keys=False)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} holds hyper-parameters that are not plain values: {error}") from error


def fill_locations(config: dict[str, Any], source: str | Path, trust: str | Collection[str] = ()) -> None:
    """Give the data module in a `stored_config` an empty text for each location that its constructor needs.

    Checkpoints hold no locations, and a data module that only prepares inputs of a program needs none.
    """
    data = config["data"]
    with only_trusted(source, trust):
        parameters = inspect.signature(_util.import_object(data["class_path"])).parameters.values()
    for each in parameters:
        if each.default is each.empty and is_location(each.name, "") and each.name not in data["init_args"]:
            data["init_args"][each.name] = ""


def trusted_modules(trust: str | Collection[str]) -> tuple[str, ...]:
    """Return the modules that the user trusts, or refuse what is not the name of a module."""
    trusted = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in trusted:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{name!r} is not a module name; trust takes names such as my_project")
    return trusted


def _hyperparameters(
    checkpoint: Mapping[str, Any], source: str | Path, key: str, trust: str | Collection[str]
) -> dict[str, Any]:
    """Return the hyper-parameters under a key, and under the keys of old versions that Lightning also reads.

    Every value is judged.
    """
    kept: dict[str, Any] = {}
    for each in ("hparams", "module_arguments", key):
        found = checkpoint.get(each)
        if found is None:
            continue
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise UsageError(f"{source} holds {each} that is not a mapping of argument names to values")
        kept |= found
    instantiator = kept.get("_instantiator", _INSTANTIATOR)
    if not isinstance(instantiator, str) or instantiator != _INSTANTIATOR:
        raise UsageError(f"{source} asks to be built by {shorten(instantiator)}, which is not {_INSTANTIATOR}")
    judge(kept, str(source), trusted_modules(trust))
    return kept
