"""Networks that `torch.compile` makes faster while a fit lasts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from firstlight.errors import UsageError

__all__ = ["Compile"]

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(Callback):
    """Compile what a module is made of with `torch.compile`, each child that has parameters by itself.

    Weights, checkpoints and names stay what they are, and after the fit nothing is compiled. The first batch of each
    size takes seconds to minutes: it pays on a GPU and in long runs, where the network and not the loop takes the time.

    Args:
        mode: As in `torch.compile`. `"reduce-overhead"` and `"max-autotune"` record CUDA graphs, which take the place
            of many launches in a small network; what a network gives is then copied, because the next step overwrites
            it.
        dynamic: Whether one compilation serves batches of all sizes (None: torch decides when it meets a second one).
            False is one for each size, the fastest; torch makes at most eight of one function.
        backend: As in `torch.compile`.

    Raises:
        UsageError: When gradients are accumulated, which lie where the next step of a CUDA graph overwrites them.
    """

    def __init__(
        self, mode: Mode = "default", dynamic: bool | None = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.mode = mode
        self.dynamic = dynamic
        self.backend = backend
        self._compiled: list[nn.Module] = []

    @property
    def _records(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return self.mode in ("reduce-overhead", "max-autotune")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile; nothing is traced before the first batch."""
        if self._records and trainer.accumulate_grad_batches > 1:
            raise UsageError(
                f"Compile was given mode={self.mode}, whose CUDA graphs overwrite gradients that "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} keeps: take default or "
                "max-autotune-no-cudagraphs"
            )
        for part in _parts(pl_module):
            whole = _whole(part._call_impl)
            compiled = torch.compile(whole, mode=self.mode, dynamic=self.dynamic, backend=self.backend)
            part._compiled_call_impl = _copied(compiled) if self._records else compiled
            self._compiled.append(part)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let everything be as it was."""
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let everything be as it was."""
        self._undo()

    def _undo(self) -> None:
        for part in self._compiled:
            part._compiled_call_impl = None
        self._compiled = []


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters; the module itself, where it has some that belong to no child."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    return [module] if next(module.parameters(recurse=False), None) is not None else children


def _whole(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `nn.Module.compile` should compile: torch 2.13 leaves out what begins in `torch.nn` itself.

    A `Sequential` would not be compiled at all, without a word.
    """

    def whole(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return whole


def _copied(call: Callable[..., Any]) -> Callable[..., Any]:
    """Copy what a function returns."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        return apply_to_collection(call(*args, **kwargs), Tensor, torch.clone)

    return copied
