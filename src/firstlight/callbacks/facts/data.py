"""What the data of a run show: their classes, scale, order, and how well targets follow from inputs.

Shapes: `N` samples, `B` batch, `T` tokens, `K` numbers; `...` the shape of one sample or target.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from firstlight.callbacks.facts.plan import weighs_classes
from firstlight.data import DataModule
from firstlight.data.loader import Loader
from firstlight.data.quality.finding import Finding, most_severe_first
from firstlight.data.samples import TensorBatches

_MOST_NAMES = 1_000
_RELATED = 400  # Samples, so that it takes less than a tenth of a second.
_HASHED, _ORDERS = 512, 39
_PENALTIES = (0.01, 0.1, 1.0, 10.0)
_MOST_COLUMNS = 100


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
    is_short = counts is not None and len(counts) <= _MOST_NAMES
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


def relation(trainer: Trainer, samples: TensorBatches | None) -> dict[str, float] | None:
    """Return how well targets follow from inputs, of some training samples as the network takes them."""
    data = getattr(trainer, "datamodule", None)
    if samples is None or not isinstance(data, DataModule):
        return None
    count = min(len(samples), _RELATED)
    inputs, targets = samples[torch.linspace(0, len(samples) - 1, count).long().to(samples.device)]
    return of_relation(data.prepare_batch(inputs).cpu(), targets.cpu())


@torch.no_grad()
def of_relation(inputs: Tensor, targets: Tensor) -> dict[str, float] | None:
    """Return how well a simple method predicts targets from inputs, each sample from the others, and if by chance.

    The method is ridge regression with a kernel, Gaussian for numbers and linear for counts of tokens. Its R² for
    samples left out is exact without fitting again. It is compared with that of targets in random orders.

    Args:
        inputs: `(N, ...)` as the network takes them: numbers, or tokens `(N, T)`.
        targets: Class indices `(N,)`, or numbers `(N, K)`.

    Returns:
        `r2`; `p_value`, the share of random orders that are as good; `samples`. None if there are too few samples.
    """
    is_class = targets.ndim == 1 and not targets.is_floating_point()
    wanted = functional.one_hot(targets.long()).double() if is_class else targets.double()
    wanted = wanted[:, None] if wanted.ndim == 1 else wanted
    wanted = wanted[:, wanted.std(0) > 0]
    if len(targets) < 30 or wanted.ndim > 2 or not 0 < wanted.shape[1] <= _MOST_COLUMNS:
        return None
    wanted = wanted - wanted.mean(0) if is_class else (wanted - wanted.mean(0)) / wanted.std(0)
    kernel = _kernel(inputs)
    values, vectors = torch.linalg.eigh(kernel)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(wanted), generator=generator) for _ in range(_ORDERS)]
    every = torch.stack([wanted, *(wanted[order] for order in orders)], 1)
    best = torch.full((len(orders) + 1,), -torch.inf, dtype=torch.float64)
    for penalty in _PENALTIES:
        smoother = (vectors * (values / (values + penalty))) @ vectors.T
        errors = every - (smoother @ every.flatten(1)).view_as(every)
        errors /= (1 - smoother.diagonal())[:, None, None]
        best = torch.maximum(best, 1 - errors.square().sum((0, 2)) / wanted.square().sum())
    return {
        "r2": float(best[0]),
        "p_value": float((best >= best[0]).double().mean()),
        "samples": len(wanted),
    }


def _kernel(inputs: Tensor) -> Tensor:
    """Return the kernel `(N, N)` of samples, 1 on its diagonal.

    It is not centred: the mean of the others would tell the target that was left out.
    """
    if not inputs.is_floating_point():
        tokens = inputs.flatten(1).long()
        pairs = (tokens[:, 1:] * 31 + tokens[:, :-1] * 1009 + 7) % _HASHED
        counts = torch.zeros(len(tokens), 2 * _HASHED, dtype=torch.float64)
        counts.scatter_add_(1, tokens % _HASHED, torch.ones_like(tokens, dtype=torch.float64))
        counts.scatter_add_(1, _HASHED + pairs, torch.ones_like(pairs, dtype=torch.float64))
        features = functional.normalize(counts.sqrt(), dim=1)
        return features @ features.T
    features = inputs.flatten(1).double().nan_to_num()
    if inputs.ndim == 2:  # Columns have units of their own; pixels have one.
        features = (features - features.mean(0)) / features.std(0).clamp(1e-12)
    distances = torch.cdist(features, features).square()
    return torch.exp(-distances / distances[distances > 0].median().clamp(1e-12))


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
