"""How a module was made, kept as plain values, so that its checkpoint loads with `weights_only=True`."""

import inspect
from collections.abc import Collection

from lightning.pytorch import LightningDataModule, LightningModule

from firstlight.errors import UsageError

__all__ = ["keep_hyperparameters"]

_OBJECT = "<object of "
"""How the note begins that stands in a checkpoint where a part was given as an object."""


def keep_hyperparameters(
    module: LightningModule | LightningDataModule, leave_out: Collection[str] = (), **parts: object
) -> None:
    """Keep the arguments of the constructor that calls this in `module.hparams`.

    From the command line that is the module's configuration, parts included. In a program a part is an object: a note
    takes its place, and to load the checkpoint without that part is refused.

    Args:
        module: What is being made.
        leave_out: Arguments that follow from others.
        **parts: The arguments that may be objects, which Lightning would copy.

    Raises:
        UsageError: When a checkpoint is loaded without a part that was given as an object.
    """
    here = inspect.currentframe()
    assert here is not None
    module.save_hyperparameters(ignore=[*parts, *leave_out], frame=here.f_back, logger=False)
    if "_instantiator" in module.hparams:  # Lightning's mark of the command line.
        module.save_hyperparameters(frame=here.f_back, logger=False)
        return
    given = {**module.hparams, **parts}
    missing = [name for name, value in given.items() if isinstance(value, str) and value.startswith(_OBJECT)]
    if missing:
        raise UsageError(
            f"the checkpoint of this {type(module).__name__} was written by a program that gave {', '.join(missing)} "
            f"as objects: give them again, load_from_checkpoint(path, {', '.join(f'{m}=...' for m in missing)})"
        )
    for name, value in given.items():
        if not _is_plain(value):
            module.hparams[name] = f"{_OBJECT}{type(value).__module__}.{type(value).__qualname__}>"


def _is_plain(value: object) -> bool:
    """Tell whether a checkpoint with `value` loads with `weights_only=True`; a subclass of a number does not."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, float, str)
