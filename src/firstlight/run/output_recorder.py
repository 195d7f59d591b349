"""Keep what a module predicts while it is tested or validated, for `outputs/SPLIT.npz` of a run.

Shapes: `B` batch, `N` samples of a split, `...` shape of one output or target.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import SequentialSampler

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


class OutputRecorder(Callback):
    """Call `predict_step` for each batch that is tested or validated, and keep what it returns.

    The network is not called again for inputs that the step has given it. The evaluation itself is not changed: a fault
    of `predict_step` only ends the recording.

    Args:
        datamodule: Data of the evaluation.
        seconds: Longest time of the evaluation; None if there is no limit.

    Attributes:
        reason: Why nothing is recorded, or `""`.
        is_expected: Whether the reason needs no line on the screen.
    """

    def __init__(self, datamodule: LightningDataModule, seconds: float | None = None) -> None:
        self.datamodule = datamodule
        self.seconds = seconds
        self.reason = ""
        self.is_expected = False
        self._batches: list[dict[str, Tensor]] = []
        self._calls: list[tuple[Any, Any]] = []  # Arguments and outputs of the module's `forward` in this step.
        self._bytes = 0
        self._spent = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self._start(pl_module, trainer.test_dataloaders)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording."""
        self._start(pl_module, trainer.val_dataloaders)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep a batch."""
        self._end_batch(trainer, pl_module, *args)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep a batch."""
        self._end_batch(trainer, pl_module, *args)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop recording."""
        self._handle.remove()

    def _start(self, module: LightningModule, loaders: Any) -> None:
        self._handle = module.register_forward_hook(lambda _, args, output: self._calls.append((args, output)))
        self._started = time.monotonic()
        name = type(module).__name__
        if not is_overridden("predict_step", module, LightningModule):
            self._stop(f"{name} has no predict_step", is_expected=True)
        elif isinstance(loaders, list | tuple | dict):
            self._stop("there are several data loaders")
        elif not isinstance(self.datamodule, DataModule):
            if not isinstance(getattr(loaders, "sampler", None), SequentialSampler):
                self._stop("the data loader does not keep the order of the samples", is_expected=True)

    def _stop(self, reason: str, is_expected: bool = False) -> None:
        self.reason, self.is_expected = reason, is_expected
        self._batches = []

    def _end_batch(self, trainer: Trainer, module: LightningModule, _: Any, batch: Any, index: int, *rest: Any) -> None:
        calls, self._calls = self._calls, []
        begin = time.monotonic()
        if self.seconds is not None and begin - self._started > self.seconds:
            raise OutOfTimeError
        if self.reason:
            return
        try:
            with trainer.precision_plugin.forward_context(), _remembers(module, calls), isolate_rng():
                columns = module.predict_step(batch, index)
                kept = _arrays(module, batch, columns)
                if isinstance(module, Task) and len(calls) == 1:
                    kept |= _losses(module, calls[0][1], batch[1])
            if len({len(each) for each in kept.values()}) > 1:
                raise ValueError("its tensors have several lengths")
        except Exception as error:
            self._stop(f"{type(module).__name__}.predict_step fails ({error!r:.100})")
            return
        self._calls = []
        self._batches.append(kept)
        self._bytes += sum(each.nbytes for each in kept.values())
        if self._bytes > MAX_BYTES:
            self._stop(f"they take more than {MAX_BYTES // 2**20} MiB")
        now = time.monotonic()
        self._spent += now - begin
        if self._spent > _EXTRA_SECONDS + now - self._started - self._spent:
            self._stop(f"{type(module).__name__}.predict_step takes longer than the evaluation")

    def arrays(self, module: LightningModule, split: Any) -> dict[str, Any]:
        """Return the arrays of `outputs.read_outputs`, or `{}` if nothing is recorded; `reason` says why."""
        if not self.reason and not (self._batches and self._batches[0]):
            self._stop("predict_step returns nothing that belongs to a sample", is_expected=True)
        if self.reason:
            return {}
        try:
            return self._joined(module, split)
        except Exception as error:  # For example, the batches have other shapes.
            self._stop(f"what {type(module).__name__}.predict_step returns cannot be joined ({error!r:.100})")
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
