"""What a checkpoint of Lightning does not tell of optimisers: pending gradients, classes, and how they were made."""

import marshal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from firstlight.callbacks.state import name_of
from firstlight.errors import UsageError, restoring


def pending_gradients(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Return by parameter the gradients that the next batch may add to.

    With automatic optimisation the next batch clears them first, unless the module or an optimiser decides otherwise.
    """
    clears = all(type(each).zero_grad is Optimizer.zero_grad for each in trainer.optimizers)
    if module.automatic_optimization and clears and not is_overridden("optimizer_zero_grad", module, LightningModule):
        return {}
    return {name: each.grad.detach().clone() for name, each in _parameters(trainer, module) if each.grad is not None}


def set_gradients(trainer: Trainer, module: LightningModule, saved: Mapping[str, Tensor]) -> None:
    """Set the gradients that `pending_gradients` returned."""
    with restoring("a gradient"):
        for name, each in _parameters(trainer, module):
            if name in saved:
                each.grad = saved[name].to(each.device, copy=True)


def describe(trainer: Trainer) -> dict[str, Any]:
    """Return the class of each optimiser, and how many parameters each of its groups has."""
    return {
        "classes": [name_of(each) for each in trainer.optimizers],
        "sizes": [[len(group["params"]) for group in each.param_groups] for each in trainer.optimizers],
    }


def refuse_others(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Refuse optimisers that cannot load the state of those that training ended with.

    Raises:
        UsageError: When the classes or the parameter groups differ.
    """
    now = describe(trainer)
    if saved["classes"] != now["classes"]:
        raise UsageError(
            f"cannot resume: training ended with the optimiser {_listed(saved['classes'])}, and "
            f"{_listed(now['classes'])} is made at the start: make it in configure_optimizers"
        )
    for before, size, each in zip(saved["sizes"], now["sizes"], trainer.optimizers, strict=False):
        # A firstlight task adds the groups again, and fits them.
        if before != size and not each._optimizer_load_state_dict_pre_hooks:
            raise UsageError(
                f"cannot resume: training ended with parameter groups of {_listed(before)} parameters, and the "
                f"optimiser has groups of {_listed(size)} at the start: add all groups in configure_optimizers, those "
                "that start later with the learning rate 0"
            )


def options_of(trainer: Trainer) -> dict[str, str]:
    """Return by path the numbers and texts that optimisers and schedules are configured with."""
    return {path: repr(value) for path, value in _options(trainer) if _is_plain(value)}


def kept_options(trainer: Trainer, initial: Mapping[str, str], configured: Mapping[str, str]) -> list[str]:
    """Return the options that the user changed since the run started, and that the checkpoint has set back.

    Args:
        trainer: The trainer, after it has loaded the checkpoint.
        initial: What `options_of` returned at the start of the run.
        configured: What `options_of` returned before the checkpoint was loaded.
    """
    now = options_of(trainer)
    return [
        f"{path} {now.get(path)}, not {value}"
        for path, value in configured.items()
        if value != initial.get(path, value) and value != now.get(path)
    ]


def _parameters(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, Any]]:
    """Yield by name the parameters of the module, then those that only optimisers have."""
    seen = set[int]()
    groups = [
        (f"optimiser {index} group {number} {position}", each)
        for index, optimizer in enumerate(trainer.optimizers)
        for number, group in enumerate(optimizer.param_groups)
        for position, each in enumerate(group["params"])
    ]
    for name, each in [*module.named_parameters(), *groups]:
        if id(each) not in seen:
            seen.add(id(each))
            yield name, each


def _options(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for index, optimizer in enumerate(trainer.optimizers):
        for number, group in enumerate(optimizer.param_groups):
            # A schedule changes `lr`, and keeps what it was in `initial_lr`.
            options = {**group, "lr": group.get("initial_lr", group.get("lr"))}
            for name in options.keys() - {"params", "initial_lr"}:
                yield f"optimiser {index} group {number} {name}", options[name]
    for index, config in enumerate(trainer.lr_scheduler_configs):
        for name, value in config.scheduler.state_dict().items():
            if name != "base_lrs" and not name.startswith("_"):  # The rates of the groups, and what it has done.
                yield f"schedule {index} {name}", value


def _is_plain(value: Any) -> bool:
    try:
        marshal.dumps(dict(value) if isinstance(value, dict) else value)
    except ValueError:  # It holds a tensor or an object.
        return False
    return True


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
