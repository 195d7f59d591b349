"""Which callbacks have something to do in which hook."""

from typing import Any

from lightning.pytorch import Trainer

from firstlight.lean.names import has_work

__all__ = ["Acting"]


class Acting:
    """The callbacks of a trainer that have something to do in a hook, remembered for an epoch.

    Args:
        trainer: Of the callbacks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.callbacks: list[Any] = []
        self.hooks: dict[str, list[Any]] = {}

    def find(self, hook: str) -> list[Any]:
        """Return those that act in a hook, and remember them until others take their place or an epoch starts."""
        callbacks: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        if self.callbacks != callbacks or hook == "on_train_epoch_start":
            self.callbacks, self.hooks = list(callbacks), {}
        if hook not in self.hooks:
            found = [(each, getattr(each, hook)) for each in callbacks]
            self.hooks[hook] = [each for each, function in found if callable(function) and has_work(function)]
        return self.hooks[hook]
