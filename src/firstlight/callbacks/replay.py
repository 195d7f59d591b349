"""Find the first layer whose output is not finite."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from firstlight.callbacks.finite import all_finite


def first_fault(
    trainer: Trainer, module: LightningModule, batches: Sequence[tuple[Any, int]]
) -> tuple[int, str] | None:
    """Run the training step of some batches again, and return where the first number that is not finite came from.

    It runs forward and backward on this process alone, without optimiser steps and logging. It changes gradients and
    buffers, for example running means. `batches` are pairs of a batch on the module's device and its index. The result
    is the index of a batch and what was found, or `None` if all was finite.
    """
    module.zero_grad()
    # The fault may lie between `toggle_optimizer` and `untoggle_optimizer`, which the step calls again.
    toggled: Any = module._param_requires_grad_state  # Lightning 2.6.6 annotates the keys as texts.
    for parameter, needs_gradient in toggled.items():
        parameter.requires_grad = needs_gradient
    for batch, index in batches:
        found: list[str] = []
        try:
            with ExitStack() as stack:
                _prepare(stack, trainer, module, found)
                _step(trainer, module, batch, index, found)
        except Exception as error:  # For example an assertion of finite numbers; what was found before it counts.
            found.append(f"{type(error).__name__} in training_step: {error}")
        if found:
            source = "" if all_finite(batch) else "the batch itself is not finite; "
            return index, source + found[0]
    return None


def fault_message(step: int, epoch: int, batches: list[int], found: list[tuple[int, str] | None]) -> str:
    """Return the message about a step that was not made; `found` are the results of `first_fault` on each process.

    Step, epoch and batches are indices from 0.

    >>> print(fault_message(7, 0, [7], [None, (7, "the loss is nan")]))
    step 7 (epoch 1, batch_idx 7 of process 1): the gradient is not finite, and no update was made from it
    the loss is nan
    no checkpoint was written from it; a lower learning rate or clipping may help
    --nonfinite.action skip skips such steps and continues
    """
    where, text = f"batch_idx {', '.join(map(str, batches))}", "all numbers are finite when the step is repeated"
    for process, each in enumerate(found):
        if each is not None:
            where, text = f"batch_idx {each[0]}" + (f" of process {process}" if len(found) > 1 else ""), each[1]
            break
    return (
        f"step {step} (epoch {epoch + 1}, {where}): the gradient is not finite, and no update was made from it\n"
        f"{text}\nno checkpoint was written from it; a lower learning rate or clipping may help\n"
        "--nonfinite.action skip skips such steps and continues"
    )


def _prepare(stack: ExitStack, trainer: Trainer, module: LightningModule, found: list[str]) -> None:
    """Watch each layer and each gradient; prevent optimiser steps and logging."""

    def watch(layer: nn.Module, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if not found and not all_finite(output):
                weights = all(all_finite(parameter.detach()) for parameter in layer.parameters(recurse=False))
                why = "" if all_finite(args) else ", whose input is not finite either"
                why += "" if weights else ", whose weights are not finite"
                found.append(f"the first layer whose output is not finite: {name} ({type(layer).__name__}){why}")

        return hook

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not found and parameter.grad is not None and not all_finite(parameter.grad):
                found.append(f"the first parameter whose gradient is not finite, in backward order: {name}")

        return hook

    for name, layer in module.named_modules():
        if name:
            stack.callback(layer.register_forward_hook(watch(layer, name)).remove)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            handle = parameter.register_post_accumulate_grad_hook(watch_gradient(name))  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
    for optimizer in trainer.optimizers:  # torch's optimisers skip parameters without a gradient.
        stack.callback(optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad()).remove)
    stack.enter_context(torch.compiler.set_stance("force_eager"))  # Compiled code does not call the layers' hooks.
    for name in ("log", "log_dict"):
        stack.enter_context(patch.object(module, name))


def _step(trainer: Trainer, module: LightningModule, batch: Any, index: int, found: list[str]) -> None:
    by_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        output = module.training_step(batch, index) if by_index else module.training_step(batch)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None or not module.automatic_optimization:
        return
    if not found and not all_finite(loss):
        found.append(f"the loss is {loss.item():.4g}, and the output of every layer is finite")
    loss.backward()
