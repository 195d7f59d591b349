"""Networks that `torch.compile` makes faster while a fit lasts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from firstlight.errors import UsageError

__all__ = ["Compile"]

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(Callback):
    """Compile what a module is made of with `torch.compile`, each child that has parameters by itself.

    A child is compiled for when it is called; a training step that calls none of them is told of. Weights, checkpoints
    and names stay what they are, and after the fit nothing is compiled. The first batch of each size takes seconds to
    minutes: it pays on a GPU and in long runs, where the network and not the loop takes the time.

    Args:
        mode: As in `torch.compile`. `"reduce-overhead"` and `"max-autotune"` record CUDA graphs, which take the place
            of many launches in a small network; what a network gives is then copied, because the next step overwrites
            it.
        dynamic: Whether one compilation serves batches of all sizes (None: torch decides when it meets a second one).
            False is one for each size, the fastest; after eight of a child torch warns and compiles no more.
        backend: As in `torch.compile`.

    Raises:
        UsageError: When `accumulate_grad_batches` keeps gradients where the next step of a CUDA graph overwrites them.
    """

    def __init__(
        self, mode: Mode = "default", dynamic: bool | None = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.mode = mode
        self.dynamic = dynamic
        self.backend = backend
        self._compiled: list[nn.Module] = []
        self._is_called = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile; nothing is traced before the first batch."""
        if self._records and trainer.accumulate_grad_batches > 1:
            raise UsageError(
                f"Compile was given mode={self.mode}, whose CUDA graphs overwrite gradients that "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} keeps: take default or "
                "max-autotune-no-cudagraphs"
            )
        # What its user has compiled stays so.
        self._compiled = [part for part in _parts(pl_module) if part._compiled_call_impl is None]
        for part in self._compiled:
            part._compiled_call_impl = self._compile(part._call_impl)
        self._is_called = not self._compiled

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of a step that calls nothing of what is compiled."""
        if not self._is_called:
            self._is_called = True
            names = ", ".join(name for name, part in pl_module.named_modules() if part in self._compiled)
            rank_zero_warn(
                f"Compile speeds up nothing: a training step of {type(pl_module).__name__} calls none of {names}"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let everything be as it was."""
        self._undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let everything be as it was."""
        self._undo()

    @property
    def _records(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return self.mode in ("reduce-overhead", "max-autotune")

    def _compile(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        # torch 2.13 leaves out what begins in `torch.nn` itself: with `nn.Module.compile` a `Sequential` would not be
        # compiled at all, without a word. And it counts the compilations of a code, so each child has its own.
        whole.__code__ = whole.__code__.replace()
        compiled = torch.compile(whole, mode=self.mode, dynamic=self.dynamic, backend=self.backend)

        def called(*args: Any, **kwargs: Any) -> Any:
            self._is_called = True
            outputs = compiled(*args, **kwargs)
            return apply_to_collection(outputs, Tensor, torch.clone) if self._records else outputs

        return called

    def _undo(self) -> None:
        for part in self._compiled:
            part._compiled_call_impl = None
        self._compiled = []


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters; of lists and dictionaries of modules, which nobody calls, theirs."""
    found = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _parts(child)
        elif next(child.parameters(), None) is not None:
            found.append(child)
    return found
