"""Random states and positions in loaders in each checkpoint, so that a resumed run has the same batches and bits."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden

from firstlight.callbacks.attributes import changed_values, digests, find_lost, holders, set_changed
from firstlight.callbacks.optimisers import (
    describe,
    kept_options,
    options_of,
    pending_gradients,
    refuse_others,
    set_gradients,
)
from firstlight.callbacks.replaced import find_replaced, names_of_code, replaced
from firstlight.callbacks.resumable_loader import ResumableLoader, cannot_resume, difference, roots
from firstlight.callbacks.state import (
    find_stateful,
    fingerprints,
    get_states,
    is_generator,
    is_position,
    restore,
    set_states,
    slots,
    snapshot,
)
from firstlight.data.loader import Loader
from firstlight.distributed import all_gather_objects
from firstlight.errors import UsageError, about, check_range, check_saved, restoring, say


class RandomState(Callback):
    """Save what a checkpoint of Lightning leaves out, and restore it on resume, for any module and data.

    A checkpoint gets the states of Python's, NumPy's and torch's generators, devices included, the position in each
    training loader (see `ResumableLoader`), the generators of loaders, samplers and data sets, and which parameters are
    frozen.

    Attributes that change during training are restored too, unless their object saves its state itself: generators,
    numbers, texts, dates, tensors, arrays, containers of these, and objects with `state_dict`. They may belong to the
    user's modules, data module, callbacks and optimisers, to layers and metrics, or to objects that these hold.

    A run resumed within an epoch calls `on_train_epoch_start` again, which Lightning 2.6.6 skips.

    Args:
        allow_inexact: Resume although something cannot be restored.

    Raises:
        UsageError: When a run is resumed and something cannot be restored.
    """

    def __init__(self, allow_inexact: bool = False) -> None:
        self.allow_inexact = allow_inexact
        self._loaders: list[ResumableLoader] = []
        self._loaded: dict[str, Any] | None = None
        self._initial: dict[str, Any] = {}
        self._code: dict[str, str] = {}
        self._options: dict[str, str] = {}  # As the optimisers were made at the start of the run.
        self._configured: dict[str, str] = {}  # As they were made in this process.
        self._validation: list[dict[str, str]] = []  # Of each loader, its description when it was made.
        self._known: list[dict[str, str]] = []  # Those of the run that is resumed.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the training loaders resumable as Lightning gets them."""
        self._loaders, self._loaded, self._validation, self._known = [], None, [], []
        self.teardown(trainer, pl_module, stage)  # A fit that raised has not called it.
        if stage == "fit":
            process = trainer.strategy.process_dataloader

            def wrap(dataloader: object) -> object:
                loader = process(dataloader)
                if trainer.training:
                    return self._wrap(trainer, loader)
                self._compare_validation(trainer, loader)
                return loader

            trainer.strategy.process_dataloader = wrap  # type: ignore[method-assign]  # `teardown` removes it

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the strategy."""
        vars(trainer.strategy).pop("process_dataloader", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the attributes and optimisers, before a checkpoint or training changes them.

        Raises:
            UsageError: When the optimisers cannot load the state of those of the checkpoint.
        """
        self._options = self._configured = options_of(trainer)
        if self._loaded and trainer.ckpt_path:
            for state in self._loaded["states"][:1]:
                refuse_others(trainer, state["optimisers"])
                self._options = state["optimisers"]["initial"]
        self._initial = digests(holders(trainer, pl_module))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes; every process calls this at the same point."""
        is_within_epoch = _is_within_epoch(checkpoint)
        objects = holders(trainer, pl_module)
        state = snapshot() | {
            "attributes": {"initial": self._initial, "saved": changed_values(objects, self._initial)},
            "code": {"initial": self._code, "replaced": replaced(names_of_code(objects, pl_module), self._code)},
            "generators": get_states(_generators(objects)),
            "loaders": [each.state_dict(is_within_epoch) for each in self._current(trainer)],
            "evaluation": get_states(_evaluation_objects(trainer)),
            "validation": self._validation,
            "gradients": pending_gradients(trainer, pl_module),
            "optimisers": {**describe(trainer), "initial": self._options},
            "repeats": is_within_epoch and _repeats_loader(trainer),
        }
        checkpoint["random_state"] = all_gather_objects(trainer, state)
        checkpoint["callback_metrics"] = {
            name: value.detach().cpu()
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, torch.Tensor) and value.numel() == 1
        }
        checkpoint["evaluating"] = _evaluating(trainer, pl_module)
        checkpoint["frozen"] = [name for name, each in pl_module.named_parameters() if not each.requires_grad]
        if self._loaders:
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the checkpoint until training starts, or refuse damaged ones."""
        _check_states(checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"] if "loops" in checkpoint else {}
        states = checkpoint.get("random_state", [])
        self._known = states[trainer.global_rank]["validation"] if len(states) == trainer.world_size else []
        self._loaded = {
            "states": states,
            "frozen": checkpoint.get("frozen"),
            "evaluating": checkpoint.get("evaluating"),
            "callback_metrics": {
                name: value
                for name, value in checkpoint.get("callback_metrics", {}).items()
                if isinstance(name, str) and isinstance(value, torch.Tensor) and value.numel() == 1
            },
            "is_within_epoch": _is_within_epoch(checkpoint),
            "epoch": max(progress.get("ready", 0) - 1, 0),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be restored, and restore the rest right before the first epoch."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or not trainer.ckpt_path:
            _before_first_epoch(trainer, lambda start: self._start(trainer, pl_module, start))
            return
        _refuse_wrong_optimizers(trainer)
        lost = self._find_lost(trainer, pl_module, loaded)
        # One process may lose what the others keep.
        faults = [each for each in all_gather_objects(trainer, lost) if each]
        if faults and not self.allow_inexact:
            raise UsageError(cannot_resume(faults[0]))
        _before_first_epoch(trainer, lambda start: self._resume(trainer, pl_module, loaded, start))

    def _find_lost(self, trainer: Trainer, module: LightningModule, loaded: dict[str, Any]) -> str | None:
        """Return what this process cannot restore, or None."""
        states, loaders = loaded["states"], self._current(trainer)
        if not states:
            return "the checkpoint has no random states: it was written without the callback RandomState"
        if len(states) != trainer.world_size:
            return f"the number of processes was {len(states)} and is {trainer.world_size}"
        state = states[trainer.global_rank]
        if len(state["loaders"]) != len(loaders):
            return f"the number of training loaders was {len(state['loaders'])} and is {len(loaders)}"
        if state["repeats"]:
            return "a loader without a length was used up and started again within the epoch (max_size_cycle)"
        for each, saved in zip(loaders, state["loaders"], strict=True):
            if (found := each.lost(saved, loaded["epoch"])) is not None:
                return found
        objects, values = holders(trainer, module), state["attributes"]
        if (found := find_replaced(state["code"]["replaced"], names_of_code(objects, module))) is not None:
            return found
        with restoring("an attribute"):
            return find_lost(objects, values["initial"], values["saved"], self._initial)

    def _start(self, trainer: Trainer, module: LightningModule, start: Any) -> None:
        """Start the first epoch of a run. The hooks before it may set functions, also in a resumed run."""
        self._code = names_of_code(holders(trainer, module), module)
        start()

    def _resume(self, trainer: Trainer, module: LightningModule, loaded: dict[str, Any], start: Any) -> None:
        """Start the first epoch of a resumed run with the states of the checkpoint."""
        states, loop = loaded["states"], trainer.fit_loop
        state = states[trainer.global_rank] if len(states) == trainer.world_size else {}
        objects, values = holders(trainer, module), dict[str, Any](initial={}, saved={})
        self._code = state["code"]["initial"] if state else names_of_code(objects, module)
        if state:
            values = state["attributes"]
            set_changed(objects, values["initial"], values["saved"], self._initial)
            set_states(_generators(objects), state["generators"])
            set_states(_evaluation_objects(trainer), state["evaluation"])
            set_gradients(trainer, module, state["gradients"])
            restore(state)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in loaded["frozen"])
            for name, each in module.named_modules():
                each.training = name not in loaded["evaluating"]
            if (kept := kept_options(trainer, self._options, self._configured)) and trainer.is_global_zero:
                more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
                say(f"keep   what the checkpoint holds stays, and the change does not act: {', '.join(kept[:3])}{more}")
        metrics = trainer._logger_connector._callback_metrics
        metrics.update({**loaded["callback_metrics"], **metrics})  # A task may have logged a step that was due.
        progress: Any = loop.epoch_progress.current
        if progress.ready == progress.processed:
            if state:
                _step_plateau_schedulers(trainer)
            _end_last_epoch(trainer)
        skips_hooks = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
        start()
        # Lightning 2.6.6 would not step ReduceLROnPlateau at the end of an epoch that is resumed.
        loop._restarting = loop._restarting and not loop.restarted_mid_epoch
        if skips_hooks:
            _repeat_epoch_start(trainer, module)
            set_changed(objects, values["initial"], values["saved"], self._initial)
            set_states(_generators(objects), state.get("generators", {}))
        loaders, saved = self._current(trainer), state.get("loaders", [])
        for index, each in enumerate(loaders):
            known = saved[index] if len(saved) == len(loaders) else None
            each.resume(known, loaded["is_within_epoch"], self.allow_inexact)
        if loaders and loop._data_fetcher is not None:
            iter(loop._data_fetcher)

    def _wrap(self, trainer: Trainer, loader: Any) -> Any:
        """Return a loader that can resume; firstlight's own one can already."""
        if isinstance(loader, Loader):
            return loader
        wrapped = ResumableLoader(loader, trainer, waits=self._loaded is not None)
        self._loaders.append(wrapped)
        return wrapped

    def _compare_validation(self, trainer: Trainer, loader: Any) -> None:
        """Describe a validation loader before it is used, and refuse another one than the saved run had."""
        if isinstance(loader, Loader) or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            return
        values = fingerprints(roots(loader))
        index, values = len(self._validation), {path: each for path, each in values.items() if not is_position(each)}
        self._validation.append(values)
        if index < len(self._known) and not self.allow_inexact:
            if found := difference(self._known[index], values, "validation"):
                raise UsageError(cannot_resume(found))

    def _current(self, trainer: Trainer) -> list[ResumableLoader]:
        """Return the loaders of this epoch; Lightning may have reloaded them."""
        combined = trainer.fit_loop._combined_loader
        return [] if combined is None else [each for each in combined.flattened if isinstance(each, ResumableLoader)]


def _repeats_loader(trainer: Trainer) -> bool:
    """Return whether Lightning 2.6.6 holds that a loader was used up once, which no checkpoint tells."""
    loop = trainer.fit_loop
    iterator = None if loop._combined_loader is None else loop._combined_loader._iterator
    has_length = getattr(loop._data_fetcher, "length", None) is not None  # The length ends the epoch.
    return not has_length and any(getattr(iterator, "_consumed", ()))


def _is_within_epoch(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint was written within an epoch, so that its next batch belongs to the same pass."""
    if "loops" not in checkpoint:
        return False
    progress, epoch = (
        checkpoint["loops"]["fit_loop"][name] for name in ("epoch_loop.batch_progress", "epoch_progress")
    )
    is_open = epoch["current"]["ready"] > epoch["current"]["processed"]
    return is_open and progress["current"]["ready"] > 0 and not progress["is_last_batch"]


_OF_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def _refuse_wrong_optimizers(trainer: Trainer) -> None:
    """Refuse options and averages of another form than the optimiser's: torch loads them, and a step fails."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name, default in optimizer.defaults.items():
                if not _is_like(group.get(name), default):
                    raise UsageError(
                        f"{trainer.ckpt_path} is damaged: {name} of the optimiser is a {type(group.get(name)).__name__}"
                    )
        for parameter, state in optimizer.state.items():
            for name in _OF_PARAMETER if isinstance(state, Mapping) else ():
                found = state.get(name)
                if found is None:
                    continue
                if not isinstance(found, torch.Tensor) or not isinstance(parameter, torch.Tensor):
                    raise UsageError(f"{trainer.ckpt_path} is damaged: {name} of the optimiser is not of a parameter")
                if found.shape != parameter.shape:
                    raise UsageError(
                        f"{trainer.ckpt_path} cannot be restored: {name} of the optimiser has the shape "
                        f"{tuple(found.shape)}, and its parameter {tuple(parameter.shape)}"
                    )


def _is_like(value: Any, default: Any) -> bool:
    """Return whether an option of an optimiser can be used in place of its default."""
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return True


def _check_states(checkpoint: dict[str, Any]) -> None:
    """Refuse states of another form than `on_save_checkpoint`, `ResumableLoader` and torch's schedulers give them."""
    for each in checkpoint.get("lr_schedulers", []):
        if isinstance(each, dict) and "last_epoch" in each:
            check_saved("a schedule", each, last_epoch=int | float)
    if not checkpoint.get("random_state", []):
        return
    check_saved("the run", checkpoint, random_state=list, frozen=list, evaluating=list, callback_metrics=dict)
    for state in checkpoint["random_state"]:
        check_saved(
            "the random states", state, attributes=dict, code=dict, generators=dict, loaders=list, evaluation=dict
        )
        check_saved("the attributes", state["attributes"], initial=dict, saved=dict)
        check_saved("the code", state["code"], initial=dict, replaced=dict)
        for values in state["attributes"].values():
            check_saved("the attributes", values, **dict.fromkeys(values, dict))
        for each in state["validation"]:
            check_saved("the validation loader", {"description": each}, description=dict)
        for each in state["loaders"]:
            check_saved("the training loader", each, start=dict, used=int, ahead=dict | None, now=dict)
            with about("the checkpoint is damaged"):
                check_range("the training loader", "[0, 1e18]", used=each["used"])
            if each["start"]:
                check_saved("the training loader", each["start"], random=dict, objects=dict, values=dict)
            if each["ahead"]:
                check_saved("the training loader", each["ahead"], random=dict)


def _evaluating(trainer: Trainer, module: LightningModule) -> list[str]:
    """Return the names of the modules that are in evaluation mode while the run trains."""
    # While it validates, Lightning keeps the modes of training here.
    modes: dict[str, bool] = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.validating else {}
    return [name for name, each in module.named_modules() if not modes.get(name, each.training)]


def _evaluation_objects(trainer: Trainer) -> dict[str, Any]:
    """Return the generators and stateful samplers of the validation loaders."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    loaders = [] if combined is None else [each for each in combined.flattened if not isinstance(each, Loader)]
    every = [(f"{index}.{name}", each) for index, loader in enumerate(loaders) for name, each in roots(loader).items()]
    return find_stateful(dict(every))


def _generators(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the random generators that are attributes of objects."""
    values = {
        f"{key}.{name}": each
        for key, holder in objects.items()
        for name, each in {**getattr(holder, "__dict__", {}), **slots(holder)}.items()
    }
    return find_stateful({path: each for path, each in values.items() if is_generator(each)})


def _before_first_epoch(trainer: Trainer, resume: Any) -> None:
    """Call `resume` in place of the start of the first epoch. No hook is called at that point of a resumed run."""
    loop = trainer.fit_loop

    def start_once() -> None:
        del loop.on_advance_start
        resume(loop.on_advance_start)

    loop.on_advance_start = start_once  # type: ignore[method-assign]


def _end_last_epoch(trainer: Trainer) -> None:
    """Let a run with `max_steps`, resumed at the end of an epoch, start the next one, as a run without it does.

    Lightning 2.6.6 counts an epoch without batches first, so the run ends too early, or shuffles in another order.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_progress.current
    if loop._iteration_based_training() and loop.restarting:
        progress.completed = progress.processed
        loop.reset_restart_stage()
        loop._restarting = loop.epoch_loop.restarting = False


def _step_plateau_schedulers(trainer: Trainer) -> None:
    """Step the schedulers that follow a metric. Lightning 2.6.6 steps them only after the checkpoint of an epoch."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.completed = progress.processed - 1  # Lightning compares the frequency with the epoch that ends.
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    progress.completed = progress.processed


def _repeat_epoch_start(trainer: Trainer, module: LightningModule) -> None:
    """Call `on_train_epoch_start`, which Lightning 2.6.6 skips for an epoch that is resumed, and nothing else.

    A hook may set what no checkpoint holds, for example `trainer.accumulate_grad_batches`. What the checkpoint holds
    is as it was after the hook, so it is put back.
    """
    callbacks = [each for each in trainer.callbacks if is_overridden("on_train_epoch_start", each, Callback)]  # type: ignore[attr-defined]
    if not callbacks and not is_overridden("on_train_epoch_start", module, LightningModule):
        return
    states = [(each, deepcopy(each.state_dict())) for each in callbacks]
    weights = {
        name: each.detach().clone()
        for name, each in module.state_dict(keep_vars=True).items()
        if isinstance(each, torch.Tensor)
    }
    groups = [[{**group, "params": None} for group in each.param_groups] for each in trainer.optimizers]
    schedulers = [
        (config.scheduler, deepcopy(config.scheduler.state_dict())) for config in trainer.lr_scheduler_configs
    ]
    random = snapshot()
    call._call_callback_hooks(trainer, "on_train_epoch_start")
    call._call_lightning_module_hook(trainer, "on_train_epoch_start")
    restore(random)
    for scheduler, state in schedulers:
        scheduler.load_state_dict(state)
    for optimizer, saved in zip(trainer.optimizers, groups, strict=True):
        for group, options in zip(optimizer.param_groups, saved, strict=False):
            group.update({name: value for name, value in options.items() if name != "params"})
    with torch.no_grad():
        for name, each in module.state_dict(keep_vars=True).items():
            if name in weights:
                each.copy_(weights[name])
    for callback, before in states:
        if before:
            callback.load_state_dict(before)
