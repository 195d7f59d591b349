"""What is known of a run beside its series: network, loss, optimiser, plan, data. All values are plain.

Shapes: `B` batch, `N` samples, `C` classes; `...` the shape of one sample, output or target.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn.modules.activation import MultiheadAttention
from torch.nn.modules.dropout import _DropoutNd

from firstlight.callbacks.activations import NORMS, activation_before, layers, main_weight
from firstlight.callbacks.fixed_sample import undisturbed
from firstlight.callbacks.probes import look, mixed_samples, of_head, of_loss, of_relation, seen_future
from firstlight.data import DataModule
from firstlight.data.loader import Loader, per_process
from firstlight.data.quality.finding import Finding, most_severe_first
from firstlight.data.samples import TensorBatches
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
_MOST_TARGETS = 20_000  # From which the loss of the best constant is computed.
_MOST_CLASSES = 1_000
_RELATED = 400  # Samples, so that it takes less than a tenth of a second.
_FEW = 8  # Samples that show whether they are mixed.


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


def of_network(module: nn.Module) -> dict[str, Any]:
    """Return layers, dropout, normalisation and the weights of a network before training."""
    measured = layers(module)
    spread, constant = {}, []
    for name, layer in measured.items():
        weight = main_weight(layer)
        if weight is None or not weight.is_floating_point() or weight.numel() < 2:
            continue
        values = weight.detach().float()
        spread[name] = float(values.std())
        # Normalisation starts at one on purpose.
        if not isinstance(layer, NORMS) and weight.ndim > 1 and bool((values == values.flatten()[0]).all()):
            constant.append(name)
    modules = list(module.modules())
    return {
        "layers": [
            {
                "name": name,
                "kind": type(layer).__name__,
                "parameters": sum(each.numel() for each in _own(layer)),
                "trainable": any(each.requires_grad for each in _own(layer)),
            }
            for name, layer in layers(module, 1000).items()
        ],
        "measured_layers": list(measured),
        "activation_modules": sorted(
            {
                type(each).__name__
                for each in modules
                if type(each).__module__ == "torch.nn.modules.activation" and not isinstance(each, MultiheadAttention)
            }
        ),
        "dropout": [each.p for each in modules if isinstance(each, _DropoutNd)],
        "normalisation": sorted({type(each).__name__ for each in modules if isinstance(each, NORMS)}),
        "weights_std": spread,
        "constant_weights": constant,
    }


def with_gradients(found: list[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Return the layers of `of_network` with whether each got a gradient."""
    every = dict(module.named_modules())
    return [
        {**each, "has_gradient": any(p.grad is not None for p in _own(every[each["name"]]))}
        for each in found
        if each["name"] in every
    ]


def evaluating(module: nn.Module) -> list[str]:
    """Return the names of modules in evaluation mode, without those inside of others that are, `""` for the whole.

    >>> network = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.ReLU()).eval())
    >>> evaluating(network)
    ['1']
    """
    found: list[str] = []
    for name, each in module.named_modules():
        is_inside = any(outer == "" or name == outer or name.startswith(f"{outer}.") for outer in found)
        if not each.training and not is_inside and not type(each).__module__.startswith("torchmetrics"):
            found.append(name)
    return found


def weighs_classes(module: LightningModule) -> bool:
    """Return whether the loss of a task weighs classes differently."""
    loss = module.loss if isinstance(module, Task) else None
    return any(getattr(loss, name, None) is not None for name in ("weight", "pos_weight"))


def data_findings(data: object, module: LightningModule) -> list[Finding] | None:
    """Return what looks wrong in the data; an imbalance of classes that the loss weighs is information.

    None if the data are not known, because another data module than one of firstlight loads them.
    """
    if not isinstance(data, DataModule):
        return None
    found = data.findings()
    if not weighs_classes(module):
        return found
    weighed = [replace(each, severity="info") if each.name == "class_imbalance" else each for each in found]
    return most_severe_first(weighed)


def of_data(
    data: object, targets: Tensor | None, kind: str | None, findings: Sequence[Finding] | None = ()
) -> dict[str, Any]:
    """Return classes and their counts for training targets `(N, ...)`, and the findings in the data."""
    names = data.class_names if isinstance(data, DataModule) else []
    counts = None
    if targets is not None and kind == "classification" and not targets.is_floating_point() and targets.ndim == 1:
        counts = targets[targets >= 0].bincount(minlength=len(names)).tolist()
    elif targets is not None and kind == "binary":
        ones = int(targets.sum())
        counts = [targets.numel() - ones, ones]
    elif targets is not None and kind == "multilabel":
        counts = targets.sum(0).long().tolist()
    is_short = counts is not None and len(counts) <= _MOST_CLASSES
    return {
        "classes": len(counts) if counts is not None else len(names) or None,
        "class_names": names if is_short else None,
        "class_counts": counts if is_short else None,
        "data_findings": None if findings is None else [each.plain() for each in findings],
    }


def of_inputs(inputs: Any) -> dict[str, Any] | None:
    """Return the scale of inputs `(B, ...)` as the network takes them.

    >>> found = of_inputs(torch.tensor([[0.0, 0.0], [1.0, 100.0]]))
    >>> found["kind"], found["max"], found["feature_std_ratio"]
    ('numbers', 100.0, 100.0)
    """
    if not isinstance(inputs, Tensor) or not inputs.numel():
        return None
    if not inputs.is_floating_point():
        return {"kind": "tokens", "min": int(inputs.min()), "max": int(inputs.max())}
    values = inputs.detach().double().transpose(0, 1).flatten(1) if inputs.ndim > 1 else inputs
    deviations = values.std(-1, correction=0)
    deviations = deviations[deviations > 0]
    return {
        "kind": "images" if inputs.ndim == 4 else "numbers",
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "min": float(values.min()),
        "max": float(values.max()),
        "feature_std_ratio": float(deviations.max() / deviations.min()) if len(deviations) else None,
    }


def network_of(module: nn.Module) -> nn.Module | None:
    """Return the network of a task, or the only child with parameters of another module."""
    parts = [each for each in module.children() if next(each.parameters(), None) is not None]
    has_own = next(module.parameters(recurse=False), None) is not None
    network = module.network if isinstance(module, Task) else parts[0] if len(parts) == 1 and not has_own else None
    return network if isinstance(network, nn.Module) else None


def of_first_outputs(trainer: Trainer, module: LightningModule, inputs: Any) -> dict[str, Any]:
    """Return what a network does with a batch of inputs before training, and leave it as it was."""
    found, network = of_outputs(None), network_of(module)
    if network is None:
        return found
    with undisturbed(module), torch.enable_grad():
        if synchronises(module):  # It would wait for the other processes.
            module.eval()
        with trainer.precision_plugin.forward_context():
            outputs = module(inputs) if isinstance(module, Task) else network(inputs)
        members = isinstance(module, Task) and module.members and isinstance(outputs, Tensor) and network.training
        found = of_outputs(outputs.mean(1) if members else outputs)
        module.eval()
        error = affine_error(network, inputs)
        found |= of_head(network, inputs)
        found |= {"mixes_samples": None, "depends_on_order": None, "sees_future": None}
        if isinstance(inputs, Tensor):
            called = module if isinstance(module, Task) else network
            found["sees_future"] = seen_future(called, inputs[:_FEW])
            with suppress(ValueError):
                shares = mixed_samples(called, inputs[:_FEW], reorders=True)
                found["mixes_samples"], found["depends_on_order"] = shares
    return {**found, "affine_error": error}


def synchronises(module: nn.Module) -> bool:
    """Return whether a forward pass in training mode waits for other processes."""
    return any(isinstance(each, nn.SyncBatchNorm) for each in module.modules())


def is_compiled(module: nn.Module) -> bool:
    """Return whether a part of a module is compiled, so that a hook or another batch would compile it again.

    >>> network = nn.Sequential(nn.Linear(1, 1))
    >>> is_compiled(network), is_compiled(nn.Sequential(torch.compile(network)))
    (False, True)
    """
    modules = list(module.modules())
    is_called = any(each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in modules)
    return is_called or getattr(module, "_compiler_ctx", None) is not None


def of_outputs(outputs: Any) -> dict[str, Any]:
    """Return what outputs `(B, ...)` with their gradient function look like before training.

    >>> of_outputs(torch.ones(2, 3, requires_grad=True).softmax(1))["outputs_look_like"]
    'constant'
    >>> of_outputs(torch.arange(6.0, requires_grad=True).view(3, 2).softmax(1).flip(0))["last_activation"]
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim < 2 or not outputs.numel():
        unknown = ("initial_output_std", "outputs_look_like", "last_activation", "outputs_follow_one")
        return dict.fromkeys(unknown)
    values = outputs.detach().double()
    return {
        "initial_output_std": float(values.std(0, correction=0).mean()),
        "outputs_look_like": look(values),
        "last_activation": activation_before(outputs)[0] or None,
        "output_size": outputs.shape[-1],
        "outputs_follow_one": follow_one(values.flatten(0, -2)),
    }


def follow_one(outputs: Tensor) -> bool | None:
    """Return whether all columns of `(N, K)` rise and fall with one of them; None if there are too few, or no change.

    >>> outputs = torch.arange(6.0).view(6, 1)
    >>> follow_one(outputs * torch.tensor([1.0, 2.0]) + 3), follow_one(torch.cat([outputs, outputs**2], 1))
    (True, False)
    """
    values = outputs[:_RELATED].detach().double()
    if values.shape[1] < 2 or len(values) < 3 or values.shape[1] > _MOST_CLASSES or not values.isfinite().all():
        return None
    sizes = torch.linalg.svdvals(values - values.mean(0))
    # Rounding of float32, relative to the outputs, is no change.
    return None if sizes[0] <= 1e-5 * values.norm() else bool(sizes[1] <= 1e-5 * sizes[0])


@torch.no_grad()
def chance_loss(task: Task, kind: str | None, targets: Tensor | None, output_size: int | None) -> float | None:
    """Return the loss of the best constant outputs for training targets `(N, ...)`, or None if it is unknown.

    It is the loss of a network that ignores its inputs. For classes it is their entropy, with the class weights and the
    label smoothing of the loss. A language model has `ln(vocabulary)`.
    """
    if kind == "language":
        return math.log(output_size) if output_size else None
    if targets is None or not len(targets) or kind in (None, "retrieval", "other"):
        return None
    targets = targets[torch.linspace(0, len(targets) - 1, min(len(targets), _MOST_TARGETS)).long()].to(task.device)
    found = []
    for constant in _constants(task, kind, targets):
        loss: Any = task.compute_loss(constant.expand(len(targets), *constant.shape[1:]), targets)
        found.append(float(loss if isinstance(loss, Tensor) else sum(loss.values())))
    return min(found, default=None)


def _constants(task: Task, kind: str | None, targets: Tensor) -> list[Tensor]:
    """Return outputs `(1, ...)`, of which one is about the best constant."""
    small = 1e-6
    if isinstance(task, Classification):
        weight, smoothing = getattr(task.loss, "weight", None), float(getattr(task.loss, "label_smoothing", 0.0))
        counts = targets[(targets >= 0) & (targets < task.classes)].bincount(minlength=task.classes).double()
        shares = counts if weight is None else counts * weight.double()
        shares = (1 - smoothing) * shares / shares.sum() + smoothing / task.classes
        logs = shares.clamp(small).log()[None].float()
        return [logs] if task.outputs_are in ("logits", "log_probabilities") else []
    if kind in ("binary", "multilabel"):
        weight = getattr(task.loss, "pos_weight", None)
        share = targets.double().mean(0, keepdim=True).clamp(small, 1 - small)
        odds = share / (1 - share) * (1 if weight is None else weight.double())
        return [(odds / (1 + odds)).float() if task.outputs_are == "probabilities" else odds.log().float()]
    if isinstance(task, Regression):
        values = targets.double()
        means = [values.mean(0, keepdim=True), values.median(0, keepdim=True).values]
        if task.outputs_are == "standardised":
            means = [(each - task.target_mean) / task.target_std for each in means]
        elif task.outputs_are == "log_rates":
            means = [means[0].clamp(small).log()]
        return [each.float() for each in means]
    return []


def aim_of_loss(module: nn.Module, kind: str | None, targets: Tensor | None, output_size: int | None) -> dict[str, Any]:
    """Return what the loss of a task aims at, and leave the task as it was; `{}` for another module."""
    if not isinstance(module, Task):
        return {}
    with undisturbed(module):
        return of_loss(module, kind, targets, output_size)


def relation(trainer: Trainer, samples: TensorBatches | None) -> dict[str, float] | None:
    """Return how well targets follow from inputs, of some training samples as the network takes them."""
    data = getattr(trainer, "datamodule", None)
    if samples is None or not isinstance(data, DataModule):
        return None
    count = min(len(samples), _RELATED)
    inputs, targets = samples[torch.linspace(0, len(samples) - 1, count).long().to(samples.device)]
    return of_relation(data.prepare_batch(inputs).cpu(), targets.cpu())


@torch.no_grad()
def affine_error(network: nn.Module, inputs: Any) -> float | None:
    """Return how far a network is from an affine function of inputs `(B, ...)`, relative to its outputs.

    It is the norm of `f(a) + f(b) - f(a + b) - f(0)`, divided by that of `f(a) - f(0)`: about 0 for an affine one.

    >>> affine_error(nn.Linear(3, 2), torch.randn(8, 3)) < 1e-5, affine_error(nn.Tanh(), torch.randn(8, 3)) > 0.1
    (True, True)
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or len(inputs) < 2:
        return None
    half = len(inputs) // 2
    one, other = inputs[:half], inputs[half : 2 * half]
    outputs = [network(each) for each in (one, other, one + other, torch.zeros_like(one))]
    if not all(isinstance(each, Tensor) and each.dtype in (torch.float32, torch.float64) for each in outputs):
        return None  # Half precision rounds too much.
    first, second, both, zero = (each.double() for each in outputs)
    size = float((first - zero).norm())
    return float((first + second - both - zero).norm()) / size if size > 0 else None


def shuffled(loader: object) -> dict[str, Any]:
    """Return how a loader of firstlight orders the training samples of its first epoch; `{}` for other loaders."""
    if not isinstance(loader, Loader) or not isinstance(loader.dataset, TensorBatches):
        return {}
    sampler, targets = loader.sampler, next(loader.dataset.target_chunks()).cpu()
    ordered = targets[sampler.order(0)] if len(targets) == sampler.samples else targets[:0]
    return {**of_order(ordered), "order_repeats": not sampler.shuffle}


def of_order(targets: Tensor) -> dict[str, float | None]:
    """Return how targets `(N, ...)` in the order of training differ from a random order.

    `label_runs` is for class indices. `autocorrelation` is that of numbers and the next ones, at most 1 and near 0 in a
    random order.

    >>> of_order(torch.arange(100.0))
    {'label_runs': None, 'autocorrelation': 0.97}
    """
    runs = label_runs(targets) if targets.ndim == 1 and not targets.is_floating_point() else None
    found = None
    if targets.is_floating_point() and len(targets) > 2 and targets[0].numel() == 1:
        values = targets.flatten().double()
        values = values - values.mean()
        size = float(values.square().sum())
        found = round(float((values[1:] * values[:-1]).sum()) / size, 4) if size > 0 else None
    return {"label_runs": runs, "autocorrelation": found}


def label_runs(labels: Tensor) -> float | None:
    """Return the mean length of runs of equal labels `(N,)`, divided by the length that chance gives.

    >>> label_runs(torch.tensor([0, 0, 0, 1, 1, 1])), label_runs(torch.tensor([1, 1]))
    (1.5, None)
    """
    if len(labels) < 2:
        return None
    shares = torch.unique(labels, return_counts=True)[1].double() / len(labels)
    chance = float(1 - (shares**2).sum())
    if not chance:
        return None
    runs = 1 + int((labels[1:] != labels[:-1]).sum())
    return round(len(labels) / runs * chance, 4)


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


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return [
        each for each in layer.parameters(recurse=False) if not isinstance(each, nn.parameter.UninitializedParameter)
    ]


def _samples(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
