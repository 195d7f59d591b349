"""Save the constructor arguments of a module as plain values, so that checkpoints load with `weights_only=True`."""

import inspect
from collections.abc import Collection

from lightning.pytorch import LightningDataModule, LightningModule

from firstlight.checkpoints.allowed import without_locations
from firstlight.errors import UsageError

_PLACEHOLDER = "<object of "  # Start of the text that a checkpoint holds in place of an object.


def keep_hyperparameters(
    module: LightningModule | LightningDataModule, leave_out: Collection[str] = (), **parts: object
) -> None:
    """Save the arguments of the calling constructor in `module.hparams`.

    The command line saves the configuration of the module and of its parts, without locations. In a program, a part is
    an object: a placeholder is saved, and loading the checkpoint without that part is refused.

    Args:
        module: The module whose constructor calls this function.
        leave_out: Arguments that are not saved.
        **parts: Arguments that may be objects. Lightning would copy them.
    """
    here = inspect.currentframe()
    assert here is not None
    module.save_hyperparameters(ignore=[*parts, *leave_out], frame=here.f_back, logger=False)
    if "_instantiator" in module.hparams:  # The command line of Lightning sets it.
        module.save_hyperparameters(frame=here.f_back, logger=False)
        kept = without_locations(dict(module.hparams))
        module.hparams.clear()
        module.hparams.update(kept)
        return
    given = {**module.hparams, **parts}
    missing = [name for name, value in given.items() if isinstance(value, str) and value.startswith(_PLACEHOLDER)]
    if missing:
        raise UsageError(
            f"the checkpoint of this {type(module).__name__} was written by a program and does not hold "
            f"{', '.join(missing)}: pass them: load_from_checkpoint(path, {', '.join(f'{m}=...' for m in missing)})"
        )
    for name, value in given.items():
        if not _is_plain(value):
            module.hparams[name] = f"{_PLACEHOLDER}{type(value).__module__}.{type(value).__qualname__}>"


def _is_plain(value: object) -> bool:
    """Return whether a checkpoint with `value` loads with `weights_only=True`. A subclass of a number does not."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, float, str)
