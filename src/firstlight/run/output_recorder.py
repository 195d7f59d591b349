"""Keep what a module predicts while it is tested or validated, for `outputs/SPLIT.npz` of a run.

Shapes: `B` batch, `N` samples of a split, `...` shape of one output or target.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from firstlight.data import DataModule
from firstlight.losses.weights import ignore_index, target_weights
from firstlight.run.outputs import compact
from firstlight.tasks import (
    BinaryClassification,
    Classification,
    Embedding,
    LanguageModel,
    MultilabelClassification,
    Regression,
    Task,
)

MAX_BYTES = 2**26
"""Outputs of a split that take more are left out."""

_EXTRA_SECONDS = 2.0  # By which recording may prolong an evaluation, besides doubling it.
_KINDS: Mapping[type[LightningModule], str] = {
    Classification: "classes",
    BinaryClassification: "binary",
    MultilabelClassification: "labels",
    Regression: "numbers",
    LanguageModel: "tokens",
    Embedding: "embeddings",
}


class OutOfTimeError(Exception):
    """An evaluation that only records has taken longer than it may."""


class AsYielded:
    """A loader that Lightning does not build again; before it predicts, it would let no batch be left out.

    Args:
        loader: Any iterable of batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        """Return a pass over the batches."""
        return iter(self.loader)

    def __len__(self) -> int:
        """Return the number of batches; a loader without a length raises a TypeError."""
        return len(self.loader)


class OutputRecorder(Callback):
    """Keep what `predict_step` returns for each batch.

    The `predict_step` of firstlight's tasks changes nothing. It is called for each batch that is tested or validated,
    and the network is not called again for inputs that the step has given it. Any other module is recorded in a pass of
    its own, `Trainer.predict`, because both steps may change what the other one reads: metrics, attributes, the batch.

    Args:
        module: The module that is evaluated.
        datamodule: Data of the evaluation.
        seconds: Longest time of the evaluation; None if there is no limit.

    Attributes:
        watches: Whether the callback records while the module is tested or validated.
        reason: Why nothing is recorded, or `""`.
        is_expected: Whether the reason needs no line on the screen.
    """

    def __init__(self, module: LightningModule, datamodule: LightningDataModule, seconds: float | None = None) -> None:
        self.datamodule = datamodule
        self.seconds = seconds
        self.watches = isinstance(module, Task) and type(module).__module__.partition(".")[0] == "firstlight"
        self.reason = ""
        self.is_expected = False
        self._batches: list[dict[str, Tensor]] = []
        self._calls: list[tuple[Any, Any]] = []  # Arguments and outputs of the module's `forward` in this step.
        self._handle: Any = None
        self._bytes = 0
        self._spent = 0.0
        if not is_overridden("predict_step", module, LightningModule):
            self.stop(f"{type(module).__name__} has no predict_step", is_expected=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self.check_order(trainer.test_dataloaders)
        self._start(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self.check_order(trainer.val_dataloaders)
        self._start(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self._start(pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep a batch."""
        self._end_batch(trainer, pl_module, *args)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep a batch."""
        self._end_batch(trainer, pl_module, *args)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Keep a batch."""
        calls, self._calls = self._calls, []
        self._check_time()
        if not self.reason:
            self._keep(pl_module, calls, batch, lambda: outputs)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop recording."""
        if self._handle is not None:  # An evaluation without batches does not start.
            self._handle.remove()

    def check_order(self, loaders: Any) -> None:
        """Record nothing if samples of these loaders have no known place in the data."""
        if isinstance(loaders, list | tuple | dict):
            self.stop("there are several data loaders")
        elif not isinstance(self.datamodule, DataModule) and not keeps_order(loaders):
            self.stop("the data loader does not keep the order of the samples", is_expected=True)

    def stop(self, reason: str, is_expected: bool = False) -> None:
        """Record nothing, for the first reason that was given."""
        if not self.reason:
            self.reason, self.is_expected = reason, is_expected
        self._batches = []

    def _start(self, module: LightningModule) -> None:
        def keep(_: Any, args: Any, output: Any) -> None:
            is_changeable = not self.watches and isinstance(output, Tensor)
            self._calls.append((args, output.clone() if is_changeable else output))

        self._handle = module.register_forward_hook(keep)
        self._started = time.monotonic()

    def _check_time(self) -> None:
        if self.seconds is not None and time.monotonic() - self._started > self.seconds:
            raise OutOfTimeError

    def _end_batch(self, trainer: Trainer, module: LightningModule, _: Any, batch: Any, index: int, *rest: Any) -> None:
        calls, self._calls = self._calls, []
        self._check_time()
        if self.reason:
            return
        begin = time.monotonic()
        with trainer.precision_plugin.forward_context(), _remembers(module, calls), isolate_rng():
            self._keep(module, calls, batch, lambda: module.predict_step(batch, index))
        self._calls = []
        now = time.monotonic()
        self._spent += now - begin
        if self._spent > _EXTRA_SECONDS + now - self._started - self._spent:
            self.stop(f"{type(module).__name__}.predict_step takes longer than the evaluation")

    def _keep(self, module: LightningModule, calls: list[Any], batch: Any, predict: Callable[[], Any]) -> None:
        try:
            kept = _arrays(module, batch, predict())
            if isinstance(module, Task) and len(calls) == 1:
                kept |= _losses(module, calls[0][1], batch[1])
            if len({len(each) for each in kept.values()}) > 1:
                raise ValueError("its tensors have several lengths")
        except Exception as error:
            self.stop(f"{type(module).__name__}.predict_step fails ({error!r:.100})")
            return
        self._batches.append(kept)
        self._bytes += sum(each.nbytes for each in kept.values())
        if self._bytes > MAX_BYTES:
            self.stop(f"they take more than {MAX_BYTES // 2**20} MiB")

    def arrays(self, module: LightningModule, split: Any) -> dict[str, Any]:
        """Return the arrays of `outputs.read_outputs`, or `{}` if nothing is recorded; `reason` says why."""
        if not self.reason and not (self._batches and self._batches[0]):
            self.stop("predict_step returns nothing that belongs to a sample", is_expected=True)
        if self.reason:
            return {}
        try:
            return self._joined(module, split)
        except Exception as error:  # For example, the batches have other shapes.
            self.stop(f"what {type(module).__name__}.predict_step returns cannot be joined ({error!r:.100})")
            return {}

    def _joined(self, module: LightningModule, split: Any) -> dict[str, Any]:
        found = {name: _numpy(torch.cat([each[name] for each in self._batches])) for name in self._batches[0]}
        size = len(next(iter(found.values())))
        is_own = isinstance(self.datamodule, DataModule)
        found["index"] = self.datamodule.rows(split)[:size] if is_own else np.arange(size)  # type: ignore[attr-defined]
        if len(found["index"]) != size:
            raise ValueError(f"{size} rows for {len(found['index'])} samples")
        kind = _kind(module)
        if kind in ("classes", "binary", "labels") and "outputs" in found:
            found["outputs"] = compact(found["outputs"])
        if "logits" in found and (found["logits"] == (rounded := found["logits"].astype(np.float32))).all():
            found["logits"] = rounded
        if kind == "classes" and "targets" in found:
            ignored = ignore_index(getattr(module, "loss", None))
            is_scored = (found["targets"] >= 0) & (found["targets"] != (-1 if ignored is None else ignored))
            found = {name: each[is_scored] for name, each in found.items()}
        return {"kind": np.array(kind), **found}


def keeps_order(loader: Any) -> bool:
    """Return whether a loader yields the samples of its data set in their order, as far as its samplers tell.

    Beside any `batch_sampler`, torch sets `sampler` to a `SequentialSampler`.
    """
    is_plain = type(getattr(loader, "batch_sampler", None)) in (BatchSampler, type(None))
    return is_plain and isinstance(getattr(loader, "sampler", None), SequentialSampler)


def _kind(module: LightningModule) -> str:
    return next((name for kind, name in _KINDS.items() if isinstance(module, kind)), "other")


@contextmanager
def _remembers(module: LightningModule, calls: list[tuple[Any, Any]]) -> Iterator[None]:
    """Let `module.forward` return the known output if it is called with the arguments of an earlier call."""
    own, forward = vars(module).get("forward"), module.forward

    def remembered(*args: Any, **options: Any) -> Any:
        for known, output in calls:
            if not options and len(args) == len(known) and all(a is b for a, b in zip(args, known, strict=True)):
                return output
        return forward(*args, **options)

    vars(module)["forward"] = remembered
    try:
        yield
    finally:
        vars(module).pop("forward")
        if own is not None:
            vars(module)["forward"] = own


def _arrays(module: LightningModule, batch: Any, columns: Any) -> dict[str, Tensor]:
    """Return what is kept of a batch, each `(B, ...)`: `targets`, `outputs` and `predictions`, if they exist."""
    columns = dict(columns) if isinstance(columns, Mapping) else {"prediction": columns}
    kind = _kind(module)
    prediction, outputs = columns.get("prediction"), columns.get("probabilities")
    targets = columns.get("target")
    if kind == "other" and targets is None and isinstance(batch, list | tuple) and len(batch) == 2:
        targets = batch[1]
    if kind == "binary" and outputs is not None:
        outputs = outputs[:, 1]
    logits = columns.get("score") if kind in ("binary", "labels") else None
    if logits is not None and outputs is not None and module.outputs_are == "probabilities":
        logits = outputs.logit().clamp(-745, 745)  # Of 0 and 1 they are infinite, and float64 ends at exp(-745).
    is_index = isinstance(prediction, Tensor) and not prediction.is_floating_point()
    found = {"targets": targets, "outputs": outputs, "predictions": prediction if is_index else None, "logits": logits}
    if kind in ("numbers", "other") and outputs is None and not is_index:
        found["outputs"] = prediction
    # A loader may write the next batch into the memory of this one.
    return {name: each.detach().clone() for name, each in found.items() if isinstance(each, Tensor) and each.ndim}


def _losses(task: Task, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return `loss` and `weight`, each `(B,)`, whose weighted mean is the loss of the batch; `{}` if unknown."""
    loss = task.loss
    is_of_torch = type(loss).__module__ == "torch.nn.modules.loss" and getattr(loss, "reduction", None) == "mean"
    if not is_of_torch or task.pairwise_loss or any(map(task.is_overridden, ("compute_loss", "batch_weight"))):
        return {}
    loss.reduction = "none"
    try:
        each = task.compute_loss(outputs, targets)
    finally:
        loss.reduction = "mean"
    if not isinstance(each, Tensor):
        return {}
    each = each.reshape(len(targets), -1)
    if ignore_index(loss) is None:
        return {"loss": each.mean(1), "weight": torch.ones_like(each[:, 0])}
    weights = target_weights(loss, targets).reshape(len(targets), -1).to(each.dtype)
    weight = weights.sum(1)
    return {"loss": each.sum(1) / weight.where(weight > 0, 1), "weight": weight}


def _numpy(values: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as an array; numpy has no bfloat16."""
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).cpu().numpy()
