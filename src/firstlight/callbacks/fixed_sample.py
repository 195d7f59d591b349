"""A few training samples that are scored again and again, without an effect on the run.

Shapes: `B` batch; `...` the shape of one sample or target.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from firstlight.callbacks.state import get_states, is_generator, restore, set_states, snapshot
from firstlight.data import DataModule
from firstlight.data.loader import ResumableDistributedSampler
from firstlight.data.samples import TensorBatches
from firstlight.losses.weights import ignore_index
from firstlight.metrics.whole_split import r2
from firstlight.tasks import BinaryClassification, Classification, Regression, Task

_MOST = 256
_FEWEST = 32


@dataclass
class FixedSample:
    """Batches of a fixed sample of the training split, as the network takes them, without augmentation.

    Batches are as large as those of the run, because batch normalisation and some losses depend on their size.
    """

    batches: list[tuple[Any, Tensor]]

    @classmethod
    def of(cls, trainer: Trainer, samples: TensorBatches, data: DataModule) -> "FixedSample":
        """Return at most 256 samples, evenly chosen from the training split, on the device of the run."""
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        of_process = sampler.batch_size if isinstance(sampler, ResumableDistributedSampler) else data.batch_size
        size = max(min(of_process, len(samples)), 1)
        count = max(_FEWEST, min(_MOST, 4 * size))
        count = min(max(count // size, 1) * size if size <= _MOST else _MOST, len(samples))
        inputs, targets = samples[torch.linspace(0, len(samples) - 1, count).long().to(samples.device)]
        device = trainer.strategy.root_device
        convert = trainer.strategy.precision_plugin.convert_input
        inputs, targets = convert(data.prepare_batch(inputs.to(device))), targets.to(device)
        targets = targets if targets.is_floating_point() else targets.long()
        return cls(list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True)))

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(len(targets) for _, targets in self.batches)

    @torch.no_grad()
    def score(self, trainer: Trainer, task: Task, train: bool, evaluating: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean `loss` `()` in train or evaluation mode, and `accuracy` or `r2` `()` where the task has it.

        Modules that are `evaluating` while the run trains do so here, too. Call it in `undisturbed`.
        """
        task.train(train)
        for name in evaluating:
            task.get_submodule(name).eval()
        losses, weights, seen = [], [], []
        with trainer.precision_plugin.forward_context():
            for inputs, targets in self.batches:
                predictions = outputs = task(inputs)
                counted = targets
                if task.members and task.network.training and isinstance(outputs, Tensor):
                    predictions, outputs, targets = task._split_members(outputs, targets)
                loss: Any = task.compute_loss(outputs, targets)
                losses.append(loss if isinstance(loss, Tensor) else sum(loss.values()))
                weights.append(torch.as_tensor(task.batch_weight(counted), device=counted.device).double())
                if isinstance(task, Classification | BinaryClassification | Regression):
                    seen.append(task.metric_inputs(predictions, counted))
        weight = torch.stack(weights)
        found = {"loss": (torch.stack(losses).double() * weight).sum() / weight.sum()}
        pairs = [each for each in seen if each is not None]
        return found | (_metric(task, *map(torch.cat, zip(*pairs, strict=True))) if pairs else {})


def _metric(task: Task, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the metric of predictions `(N, ...)`; targets that are no class do not count."""
    if isinstance(task, Regression):
        return {"r2": r2(predictions, targets)}
    if isinstance(task, BinaryClassification):
        threshold = 0.5 if task.outputs_are == "probabilities" else 0
        return {"accuracy": ((predictions > threshold) == (targets > 0)).double().mean()}
    ignored = ignore_index(task.loss)
    counts = (targets >= 0) & (targets != (-1 if ignored is None else ignored))
    return {"accuracy": (predictions.argmax(1) == targets)[counts].double().mean()}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore random states, modes, buffers and attributes of a module after forward passes in this context."""
    modules = list(module.modules())
    attributes = [(dict(vars(each)), dict(each._buffers)) for each in modules]
    buffers = [(each, each.clone()) for each in module.buffers()]
    generators = {
        f"{index}.{name}": value
        for index, (values, _) in enumerate(attributes)
        for name, value in values.items()
        if is_generator(value)
    }
    states, own = snapshot(), get_states(generators)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for each, (values, named) in zip(modules, attributes, strict=True):
            for held, before in ((vars(each), values), (each._buffers, named)):
                for name in held.keys() - before.keys():
                    del held[name]
                held.update(before)
        set_states(generators, own)
        restore(states)
