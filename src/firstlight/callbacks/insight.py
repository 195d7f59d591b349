"""Record how a run learns, and say in words what the record shows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from firstlight.callbacks.activations import Update, gradient_norms, layers, main_weight, measure_layer, read
from firstlight.callbacks.facts.data import data_findings, of_data, of_inputs, of_order, relation, shuffled
from firstlight.callbacks.facts.losses import (
    aim_of_loss,
    chance_loss,
    meets_own_targets,
    of_first_loss,
    of_path,
    of_token_offset,
)
from firstlight.callbacks.facts.network import (
    evaluating,
    is_compiled,
    network_of,
    of_network,
    synchronises,
    with_gradients,
)
from firstlight.callbacks.facts.outputs import of_first_outputs
from firstlight.callbacks.facts.plan import merged, of_configuration
from firstlight.callbacks.fixed_sample import FixedSample, undisturbed
from firstlight.callbacks.gradient_norm import dense
from firstlight.data import DataModule
from firstlight.data.quality.finding import Finding
from firstlight.data.samples import TensorBatches
from firstlight.errors import check_saved, current_mode, emit, say
from firstlight.insight.findings import TIMED, find
from firstlight.insight.record import Record, Series, SeriesReader
from firstlight.loggers import History, MetricsCSV, current_step, log, log_findings, steps_done
from firstlight.tasks import Task

_SHARE = 0.02
"""Share of a run's work that the fixed sample may take."""
_GROWTH = 1.25
"""Findings are evaluated when a run has this many times the steps of the last time, so that they take little time."""
_WATCHED = 64  # Batches of an epoch whose targets are compared with chance.
_REPEATED = 4  # Batches of an epoch that are compared with those of the next one.
_MOST_CLASSES = 20
_FAILURES = 5  # Reasons that are kept.


class Insight(Callback):
    """Record what explains how a run learns, and print a finding when the record first shows it.

    Logs for each of at most 40 layers, every `log_every_n_steps` optimiser steps: `activation/zeros`,
    `activation/dead`, `activation/saturated`, `activation/std`, `gradient/norm` and `update/ratio`, and `clipped`,
    `seconds/step` and `seconds/wait`. After a validation it logs `val/class_share/CLASS`, and `fixed/loss_eval` and
    `fixed/loss_train`, the loss of a fixed sample of the training split in both modes. `docs/record.md` describes them.

    Findings need a logger `MetricsCSV`, which every run has, or `History`. In a program, `finish` returns them after
    `fit`.

    Nothing that is recorded changes the run: weights have the same bits without this callback. Between two loggings it
    does not wait for the device. What fails while it is measured is left out, and the fact `not_recorded` says why.
    """

    def __init__(self) -> None:
        self.measured: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self._reset()

    def _reset(self) -> None:
        self._is_on = self._is_new = self._is_plain = self._is_armed = self._has_stepped = False
        self._checks_gradients = False
        self._layers: dict[str, nn.Module] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._values: dict[str, Tensor] = {}
        self._updates: list[Update] = []
        self._stepped: set[int] = set()
        self._scale = 1  # Lightning divides the loss of a batch by the batches of a step.
        self._activations: set[str] = set()
        self._evaluated = 0
        self._first: dict[str, tuple[int | None, int | None]] = {}  # Epoch and step at which each finding became true.
        self.told: set[str] = set()  # Findings whose text this process has printed.
        self._failures: list[str] = []
        self._started = self._trained = self._waited = 0.0
        self._ended: float | None = None
        self._steps = 0
        self._watches = False
        self._shuffled: dict[str, Any] = {}
        self._targets: list[Tensor] = []
        self._order: list[Tensor] = []
        self._fixed: FixedSample | None = None
        self._fixed_step = -1
        self._configuration: dict[str, Any] = {}
        self._reader: SeriesReader | None = None
        self._probe: Any = None  # A hook on the network during the first step.
        self._outputs: Any = None
        self._first_batch: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured at the start, and at which steps something was measured last."""
        return {
            "measured": dict(self.measured),
            "armed": self._is_armed,
            "checks_gradients": self._checks_gradients,
            "fixed_step": self._fixed_step,
            "evaluated": self._evaluated,
            # The same run has the same checkpoints on a slow machine.
            "first": {name: list(place) for name, place in self._first.items() if name not in TIMED},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        flags = dict.fromkeys(("armed", "checks_gradients"), bool)
        check_saved("Insight", state_dict, measured=dict, fixed_step=int, evaluated=int, **flags)
        check_saved("Insight", state_dict, first=dict[str, list[int | None]])
        self.measured = dict(state_dict["measured"])
        self._is_armed, self._checks_gradients = state_dict["armed"], state_dict["checks_gradients"]
        self._fixed_step, self._evaluated = state_dict["fixed_step"], state_dict["evaluated"]
        self._first = {name: (place[0], place[1]) for name, place in state_dict["first"].items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self.measured, self.findings = {}, []
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe network, options and data; other processes than the first record nothing."""
        self._is_on = trainer.is_global_zero and bool(trainer.loggers)
        if not self._is_on:
            return
        self._is_plain = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
        may_compile = self._try(lambda: is_compiled(pl_module)) is not False
        path = next((each.path for each in trainer.loggers if isinstance(each, MetricsCSV)), None)
        self._reader = None if path is None else SeriesReader(path)
        self._configuration = self._try(lambda: of_configuration(trainer, pl_module)) or {}
        self._configuration["compiled"] = may_compile
        self._scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        if self._is_plain:
            self._weights = _weights(layers(pl_module))
            self._layers = {} if may_compile else layers(pl_module)
        data, samples = getattr(trainer, "datamodule", None), _samples(trainer)
        can_score = isinstance(pl_module, Task) and self._is_plain and not may_compile
        if can_score and samples is not None and isinstance(data, DataModule):
            self._fixed = self._try(lambda: FixedSample.of(trainer, samples, data))
        self._is_new = not self.measured
        if self._is_new and self._is_plain:
            self.measured |= self._try(lambda: of_network(pl_module)) or {}
        elif self._evaluated:
            self.evaluate(trainer, says=False, resumes=True)
        self._shuffled = self._try(lambda: shuffled(trainer.train_dataloader)) or {}
        self._watches = self._is_new and not self._shuffled

    def _measure_first_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        self.measured["inputs"] = self._try(lambda: of_inputs(inputs))
        if self._is_plain and not self._configuration["compiled"]:
            self.measured |= self._try(lambda: of_first_outputs(trainer, module, inputs)) or {}
            self._probe_first_loss(module, batch)
        samples, kind = _samples(trainer), self._configuration.get("kind")
        targets = None if samples is None else next(samples.target_chunks()).cpu()
        data = getattr(trainer, "datamodule", None)
        findings = self._try(lambda: data_findings(data, module))
        self.measured |= self._try(lambda: of_data(data, targets, kind, findings)) or {}
        self.measured["relation"] = self._try(lambda: relation(trainer, samples))
        if self._fixed is not None:
            prepared = self._fixed.batches[0][0]
            self.measured["inputs_in_evaluation"] = self._try(lambda: of_inputs(prepared))
        if isinstance(module, Task):
            size, spread = self.measured.get("output_size"), getattr(module, "target_std", None)
            self.measured["chance_loss"] = self._try(lambda: chance_loss(module, kind, targets, size))
            self.measured |= self._try(lambda: aim_of_loss(module, kind, targets, size)) or {}
            self.measured["target_std"] = spread.flatten().tolist() if isinstance(spread, Tensor) else None

    def _probe_first_loss(self, module: LightningModule, batch: Any) -> None:
        """Keep the outputs of the first step until its loss is known."""
        network = network_of(module)

        def keep(_: nn.Module, __: Any, outputs: Any) -> None:
            self._outputs = outputs

        if network is not None:
            self._probe = network.register_forward_hook(keep)
            self._first_batch = batch if isinstance(batch, tuple | list) and len(batch) == 2 else None

    # A step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait for the loader."""
        self._ended = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put hooks on the layers if the coming step is logged."""
        if not self._is_on:
            return
        self._started = perf_counter()
        if self._ended is not None:
            self._waited += self._started - self._ended
        if self._is_new:
            self._is_new = False
            self._try(lambda: self._measure_first_batch(trainer, pl_module, batch))
            self._started = perf_counter()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the class
        if self._is_armed or (every and (current_step(trainer) + 1) % every == 0):
            self._is_armed = True
            if not self._handles:
                self._handles = [
                    layer.register_forward_hook(partial(self._measure, name)) for name, layer in self._layers.items()
                ]
        if self._watches and trainer.current_epoch < 2 and batch_idx < _WATCHED:
            self._watch_order(trainer.current_epoch, batch, batch_idx)

    def _measure(self, name: str, layer: nn.Module, args: Any, outputs: Any) -> None:
        if f"activation/std/{name}" not in self._values:
            before, found = self._try(lambda: measure_layer(layer, args[0] if args else None, outputs)) or ("", {})
            self._activations.add(before)
            self._values |= {f"activation/{what}/{name}": value for what, value in found.items()}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """In the first step, see how outputs become the loss; in the second one, whether its gradients are gone."""
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
            self._try(lambda: self._measure_first_loss(trainer, pl_module, loss))
        if self._checks_gradients:
            self._checks_gradients = False
            self._try(lambda: self._check_gradients(trainer))

    def _measure_first_loss(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        outputs, (inputs, targets) = self._outputs, self._first_batch or (None, None)
        self._outputs = self._first_batch = None
        self.measured |= of_path(loss)
        if isinstance(outputs, Tensor) and isinstance(inputs, Tensor) and outputs.requires_grad:
            self.measured["token_offset"] = of_token_offset(loss, outputs, inputs)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.requires_grad and targets.ndim:
            samples = _samples(trainer)
            every = targets if samples is None else next(samples.target_chunks()).to(targets.device)
            found = of_first_loss(loss * self._scale, outputs, targets, every)
            self.measured |= {**found, **self.measured} if isinstance(module, Task) else found
            if isinstance(module, Task) and self.measured.get("loss_pairs") is None and not module.members:
                with isolate_rng():
                    self.measured["loss_pairs"] = self._try(lambda: meets_own_targets(module, outputs, targets))

    def _check_gradients(self, trainer: Trainer) -> None:
        parameters = [p for each in trainer.optimizers for group in each.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.measured["zero_grad_seen"] = not any(bool(each.count_nonzero()) for each in map(dense, gradients))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """In a logged step, measure the gradient and keep the weights."""
        self._has_stepped = True
        if self._is_armed and self._is_on and self._is_plain and id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
            self._try(lambda: self._before_step(trainer, optimizer))

    def _before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: weight for name, weight in self._weights.items() if id(weight) in optimized}
        self._values |= {f"gradient/norm/{name}": value for name, value in gradient_norms(weights).items()}
        if trainer.gradient_clip_val:
            every = [dense(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            by_value = self._configuration.get("clip_algorithm") == "value"
            total = nn.utils.get_total_norm(every, norm_type=math.inf if by_value else 2.0)
            self._values["clipped"] = (total > trainer.gradient_clip_val).float()
        self._updates.append(Update({name: each for name, each in weights.items() if each.grad is not None}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step has measured."""
        if not self._is_on:
            return
        now = self._ended = perf_counter()
        self._trained += now - self._started
        if self._probe is not None:  # Nothing has called backward.
            self._probe.remove()
            self._probe = self._outputs = self._first_batch = None
        if "initial_loss" not in self.measured:
            self._try(lambda: self._end_first_batch(trainer, pl_module, outputs))
        if self._has_stepped:
            if "zero_grad_seen" not in self.measured:
                self._try(lambda: self._end_first_step(trainer, pl_module))
            self._steps += 1
            self._has_stepped = False
            if self._is_armed:
                self._try(lambda: self._log_step(trainer))
                self._disarm()
                self._ended = perf_counter()

    def _end_first_batch(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        self.measured["initial_loss"] = None
        self.measured["modules_in_eval"] = evaluating(module)
        first = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(first, Tensor) and first.numel() == 1:
            loss = float(first) * self._scale
            self.measured["initial_loss"] = loss if math.isfinite(loss) else None
            log(trainer, {"initial/loss": loss})

    def _end_first_step(self, trainer: Trainer, module: LightningModule) -> None:
        self.measured["zero_grad_seen"] = None
        self._checks_gradients = self._is_plain and len(trainer.optimizers) == 1
        self.measured["layers"] = with_gradients(self.measured.get("layers", []), module)

    def _log_step(self, trainer: Trainer) -> None:
        for update in self._updates:
            self._values |= {f"update/ratio/{name}": value for name, value in update.ratios().items()}
        if "activations" not in self.measured:
            modules = self.measured.pop("activation_modules", [])
            self.measured["activations"] = sorted({*self._activations, *modules} - {""})
        steps = max(self._steps, 1)
        seconds = {"seconds/step": self._trained / steps, "seconds/wait": self._waited / steps}
        log(trainer, {**_by_kind(read(self._values)), **seconds})
        self._trained = self._waited = 0.0
        self._steps = 0

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._values, self._updates = [], {}, []
        self._stepped.clear()
        self._is_armed = False

    def _watch_order(self, epoch: int, batch: Any, batch_idx: int) -> None:
        """Keep targets of the first two epochs, to see whether they are shuffled."""
        targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if not isinstance(targets, Tensor) or not targets.ndim:
            return
        if epoch == 0:
            self._targets.append(targets.detach().clone())
        elif batch_idx < _REPEATED:
            self._order.append(targets.detach().clone())

    def _order_facts(self) -> dict[str, bool | float | None]:
        """Return what the kept targets show."""
        found = {"label_runs": None, "autocorrelation": None, "order_repeats": None, **self._shuffled}
        if self._targets:
            found |= of_order(torch.cat(self._targets))
        pairs = list(zip(self._targets, self._order, strict=False))
        if len(self._order) >= min(_REPEATED, len(self._targets)) and pairs:
            repeats = all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)
            is_constant = all(bool((one == one.flatten()[0]).all()) for one, _ in pairs if one.numel())
            found["order_repeats"] = None if is_constant else repeats
        return found

    # A validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count it as waiting for the loader."""
        self._ended = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log predicted classes and the fixed sample, and print new findings."""
        if not self._is_on or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._try(lambda: self._log_classes(trainer, pl_module))
        step = current_step(trainer)
        is_last = trainer.should_stop or step + 1 >= (self._configuration.get("planned_steps") or math.inf)
        if self._fixed_step < 0 or is_last or step - self._fixed_step >= self._fixed_every():
            self._score_fixed(trainer, pl_module, step)
        if step + 1 >= _GROWTH * self._evaluated:
            self._evaluated = step + 1
            self.evaluate(trainer)

    def _fixed_every(self) -> float:
        """Return the steps between two scores of the fixed sample, which takes at most `_SHARE` of the work.

        A step is three passes of a batch, forward and backward.
        """
        if self._fixed is None:
            return math.inf
        return 2 * len(self._fixed.batches) / 3 / (self._configuration.get("accumulate") or 1) / _SHARE

    def _score_fixed(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        fixed = self._fixed
        if fixed is None or not isinstance(module, Task):
            return
        self._fixed_step = step
        kept: list[str] = self.measured.get("modules_in_eval") or []
        found: dict[str, Tensor] = {}
        with undisturbed(module):
            for mode, name in ((False, "eval"), (True, "train")):
                if mode and synchronises(module):
                    continue  # It would wait for the other processes.
                scores = self._try(lambda mode=mode: fixed.score(trainer, module, mode, kept)) or {}  # type: ignore[misc]
                found |= {f"fixed/{what}_{name}": value for what, value in scores.items()}
        log(trainer, read(found))

    def _log_classes(self, trainer: Trainer, module: LightningModule) -> None:
        counts = getattr(getattr(module, "val_metrics", None), "class_counts", None)
        if counts is None or counts.shape[1] > _MOST_CLASSES:
            return
        predicted = counts[1].tolist()
        names = self.measured.get("class_names") or []
        names = names if len(names) == len(predicted) else range(len(predicted))
        total = max(sum(predicted), 1)
        shares = {f"val/class_share/{name}": count / total for name, count in zip(names, predicted, strict=True)}
        log(trainer, shares)

    # Findings

    def record(self, trainer: Trainer) -> Record:
        """Return what was recorded until now."""
        return Record(self._series(trainer), self.facts(trainer))

    def _series(self, trainer: Trainer) -> dict[str, Series]:
        """Return what `metrics.csv` holds, or what a `History` keeps."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.save()
        if self._reader is not None:
            return self._reader.read()
        kept = next((each.logged for each in trainer.loggers if isinstance(each, History)), {})
        return {name: Series.of(*each) for name, each in kept.items()}

    def facts(self, trainer: Trainer) -> dict[str, Any]:
        """Return what is known of the run, as plain values."""
        progress = {
            "shuffled": self._try(self._order_facts),
            "done_steps": self._try(lambda: steps_done(trainer)),
            "done_epochs": trainer.current_epoch,
            "not_recorded": list(self._failures),
        }
        modules = {"activations": self.measured.get("activation_modules")}  # Until a logged step shows the others.
        return merged(self._configuration, modules, self.measured, progress)

    def evaluate(self, trainer: Trainer, says: bool = True, resumes: bool = False) -> None:
        """Find what the record shows, and tell what is new; a run that resumes has told it."""
        found = self._try(lambda: find(self.record(trainer))) or []
        in_data = self.measured.get("data_findings") or []  # The run has told them at its start.
        new = [each for each in found if each.name not in self._first and each.plain() not in in_data]
        self._first |= {each.name: (each.epoch, each.step) for each in new}
        places = [self._first.get(each.name, (each.epoch, each.step)) for each in found]
        self.findings = [
            replace(each, epoch=epoch, step=step) for each, (epoch, step) in zip(found, places, strict=True)
        ]
        if resumes or not new:
            return
        for logger in trainer.loggers:
            log_findings(logger, [each.plain() for each in self.findings], current_step(trainer))
        for finding in new:
            emit("finding", **finding.plain())
            if says:
                self.told |= {finding.name} if current_mode() == "lines" else set()
                say(line(finding, trainer.current_epoch))  # With `--quiet`, the end of the run tells it.

    def finish(self, trainer: Trainer, cause: str = "") -> list[Finding]:
        """Return the findings of a run that has ended; `cause` is what ended it before its plan, or `""`."""
        if self._is_on:
            self.measured["ending"] = cause or None
            stopping = self._configuration.get("early_stopping")
            if stopping:
                stopping["stopped"] = cause.startswith("stopped early")
            self.evaluate(trainer, says=False)
        return self.findings

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off."""
        self._disarm()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what a step that failed has measured, and take the hooks off."""
        if self._is_on and self._values and isinstance(exception, Exception):
            self._try(lambda: log(trainer, _by_kind(read(self._values))))
        self._disarm()

    def _try(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`, or None if it fails: no run ends because something cannot be measured."""
        try:
            return call()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if reason not in self._failures and len(self._failures) < _FAILURES:
                self._failures.append(reason)
            return None


def line(finding: Finding, epoch: int) -> str:
    """Return a finding as a run prints it when it becomes true, with epochs from 1.

    >>> line(Finding("plateau", "info", "val/loss is flat", {}, "stop here", epoch=6), 9)
    'seen   epoch 7: info plateau: val/loss is flat: stop here'
    """
    return f"seen   epoch {(epoch if finding.epoch is None else finding.epoch) + 1}: {finding.line}"


def _weights(measured: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the weight of each layer that trains numbers; one that layers share is that of the first."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in measured.items():
        weight = main_weight(layer)
        if weight is not None and weight.is_floating_point() and all(weight is not each for each in found.values()):
            found[name] = weight
    return found


def _samples(trainer: Trainer) -> TensorBatches | None:
    """Return the training samples of a loader of firstlight."""
    samples = getattr(trainer.train_dataloader, "dataset", None)
    return samples if isinstance(samples, TensorBatches) else None


def _by_kind(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of each kind together, in the order in which the network called its layers."""
    return dict(sorted(values.items(), key=lambda item: item[0].split("/")[:2]))
