"""Compile the network with `torch.compile` during a fit."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from firstlight.errors import UsageError

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(Callback):
    """Compile each child of the module that has parameters with `torch.compile`, for the time of a fit.

    Weights, checkpoints and names do not change, and after the fit nothing is compiled. A warning says so if a training
    step calls no compiled child. The first batch of each size takes seconds to minutes, so compiling pays in long runs
    on a GPU, if the network takes most of the time.

    Args:
        mode: As in `torch.compile`. `"reduce-overhead"` and `"max-autotune"` record CUDA graphs, which replace the many
            launches of a small network; the outputs are copied, because the next step overwrites them.
        dynamic: Whether one compilation serves batches of all sizes. `None`: torch decides at the second size. `False`
            compiles for each size and is fastest; after eight sizes of a child torch warns and compiles no more.
        backend: As in `torch.compile`.

    Raises:
        UsageError: When `accumulate_grad_batches` keeps gradients that the next step of a CUDA graph overwrites.
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
        """Compile the parts that the user has not compiled; tracing starts with the first batch."""
        if self._records and trainer.accumulate_grad_batches > 1:
            raise UsageError(
                f"Compile was given mode={self.mode}, whose CUDA graphs overwrite gradients that "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} keeps: use default or "
                "max-autotune-no-cudagraphs"
            )
        self._compiled = [part for part in _parts(pl_module) if part._compiled_call_impl is None]
        for part in self._compiled:
            part._compiled_call_impl = self._compile(part._call_impl)
        self._is_called = not self._compiled

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if the first step calls no compiled part."""
        if not self._is_called:
            self._is_called = True
            names = ", ".join(name for name, part in pl_module.named_modules() if part in self._compiled)
            rank_zero_warn(
                f"Compile has no effect: a training step of {type(pl_module).__name__} calls none of {names}"
            )

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Remove the compiled calls."""
        for part in self._compiled:
            part._compiled_call_impl = None
        self._compiled = []

    on_exception = teardown

    @property
    def _records(self) -> bool:
        """Whether `mode` records CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune")

    def _compile(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        # torch 2.13 silently does not compile a call that starts in `torch.nn`, such as a `Sequential`'s with
        # `nn.Module.compile`. It counts compilations by code object, so each child gets one.
        whole.__code__ = whole.__code__.replace()
        compiled = torch.compile(whole, mode=self.mode, dynamic=self.dynamic, backend=self.backend)

        def called(*args: Any, **kwargs: Any) -> Any:
            self._is_called = True
            outputs = compiled(*args, **kwargs)
            return apply_to_collection(outputs, Tensor, torch.clone) if self._records else outputs

        return called


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters, and those inside a `ModuleList` or `ModuleDict`, which has no call."""
    found = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _parts(child)
        elif next(child.parameters(), None) is not None:
            found.append(child)
    return found
