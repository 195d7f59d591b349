"""Refuse the trainer of the package `pytorch_lightning`."""

from functools import wraps
from typing import Any

from lightning.pytorch import Callback

from firstlight.errors import refuse_other_trainer


def refuse_other_package(kind: type[Callback]) -> None:
    """Let the `setup` of a callback refuse a trainer of `pytorch_lightning`, a copy of `lightning.pytorch`.

    Its classes are others, so each `isinstance` would be false: checkpoints would be missing without a word.
    """
    own = kind.setup

    @wraps(own)
    def setup(self: Callback, trainer: Any, *args: Any, **kwargs: Any) -> None:
        refuse_other_trainer(kind.__name__, trainer)
        own(self, trainer, *args, **kwargs)

    kind.setup = setup  # type: ignore[method-assign]
