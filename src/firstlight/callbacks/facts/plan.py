"""What the options of a run say: task, network, loss, optimiser, schedule, plan, batches. All values are plain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from firstlight.data import DataModule
from firstlight.data.loader import per_process
from firstlight.tasks import (
    BinaryClassification,
    Classification,
    Embedding,
    LanguageModel,
    MultilabelClassification,
    Regression,
    Task,
)

_KINDS: dict[type[Task], str] = {
    Classification: "classification",
    BinaryClassification: "binary",
    MultilabelClassification: "multilabel",
    Regression: "regression",
    LanguageModel: "language",
    Embedding: "retrieval",
}


def of_configuration(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what the options say: task, network, loss, optimiser, schedule, plan, batches."""
    task = module if isinstance(module, Task) else None
    loader: Any = trainer.train_dataloader
    data = getattr(trainer, "datamodule", None)
    batches = trainer.num_training_batches
    accumulate = trainer.accumulate_grad_batches
    planned = trainer.estimated_stepping_batches if task is None else task.total_steps
    stopping = next((each for each in trainer.callbacks if isinstance(each, EarlyStopping)), None)  # type: ignore[attr-defined]
    batch_size = getattr(data, "batch_size", None) or getattr(loader, "batch_size", None)
    if isinstance(data, DataModule):
        batch_size = per_process(data.batch_size, data.batch_size_is, trainer.world_size)
    return {
        "task": type(module).__name__,
        "network": type(task.network).__name__ if task else None,
        "kind": next((kind for each, kind in _KINDS.items() if isinstance(module, each)), "other") if task else None,
        "loss": type(task.loss).__name__ if task and task.loss is not None else None,
        "outputs_are": task.outputs_are if task else None,
        "optimizer": of_optimizer(trainer.optimizers[0]) if trainer.optimizers else None,
        "optimizers": len(trainer.optimizers),
        "schedule": of_schedule(trainer, task),
        "planned_steps": planned if 0 <= planned < math.inf else None,
        "warmup_steps": task.warmup_steps if task and math.isfinite(planned) else None,
        "epochs": trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else None,
        "steps_per_epoch": math.ceil(batches / accumulate) if math.isfinite(batches) else None,
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "accumulate": accumulate,
        "processes": trainer.world_size,
        "clip_value": trainer.gradient_clip_val,
        "clip_algorithm": str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm"),
        "precision": str(trainer.precision),
        "train_samples": _samples(loader),
        "val_samples": _samples(trainer.val_dataloaders),
        "early_stopping": None if stopping is None else {"patience": stopping.patience, "monitor": stopping.monitor},
        "monitor": getattr(module, "monitor", None),
        "mode": getattr(module, "mode", None),
        "l1": task.l1 if task else None,
        "augments": bool(len(data.augment)) if isinstance(data, DataModule) else None,
        "class_weights": weighs_classes(module),
        "label_smoothing": float(getattr(task.loss, "label_smoothing", 0.0)) if task else None,
    }


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return class and options of an optimiser; `lr` is the peak of the schedule.

    >>> found = of_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    >>> found["class"], found["lr"], found["momentum"]
    ('SGD', 0.1, 0.9)
    """
    group: dict[str, Any] = optimizer.param_groups[0]
    kept = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in group.items()
        if name not in ("params", "initial_lr")
        and isinstance(value, bool | int | float | str | tuple | None)
        and not (isinstance(value, tuple) and not all(isinstance(each, int | float) for each in value))
    }
    decay = max(float(each.get("weight_decay") or 0) for each in optimizer.param_groups)
    return {
        "class": type(optimizer).__name__,
        **kept,
        "lr": float(group.get("initial_lr", group["lr"])),
        "weight_decay": decay,
    }


def of_schedule(trainer: Trainer, task: Task | None) -> dict[str, Any] | None:
    """Return class and parameters of the schedule of a task, or the class of another scheduler."""
    if task is not None and task.optimization.has_schedule(trainer):
        schedule = task.optimization.schedule
        parameters: dict[str, Any] = asdict(schedule) if is_dataclass(schedule) else {}
        return {"class": type(schedule).__name__, **{name: _plain(value) for name, value in parameters.items()}}
    return {"class": type(trainer.lr_scheduler_configs[0].scheduler).__name__} if trainer.lr_scheduler_configs else None


def weighs_classes(module: LightningModule) -> bool:
    """Return whether the loss of a task weighs classes differently."""
    loss = module.loss if isinstance(module, Task) else None
    return any(getattr(loss, name, None) is not None for name in ("weight", "pos_weight"))


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return all facts, with None in place of numbers that JSON does not have."""
    return {name: _plain(value) for part in parts for name, value in part.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _samples(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
