"""Make any training loader resume after the last batch that was used."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from firstlight.callbacks.state import (
    find_stateful,
    fingerprints,
    get_states,
    is_position,
    restore,
    set_states,
    snapshot,
)
from firstlight.data.loader import obedient_workers
from firstlight.errors import UsageError


class ResumableLoader:
    """A training loader that can resume in the middle of a pass over it, after the last batch that was used.

    Each pass starts by recording the random states. A resumed pass starts with the recorded ones, and takes the used
    batches again without training on them. So samplers, datasets and worker processes draw what they drew before. A
    loader with `state_dict` and `load_state_dict` restores itself instead.

    All other attributes are those of the loader, and `isinstance` takes it for one of its class.

    Args:
        loader: A `DataLoader` or another iterable of batches.
        trainer: The trainer of the fit.
        waits: Whether the fit will call `resume`. Until then a pass has one empty batch, and takes none of the loader.
    """

    loader: Any
    trainer: Trainer
    waits: bool
    restores_itself: bool
    start: dict[str, Any]
    used: int
    ahead: dict[str, Any] | None
    resumed: Mapping[str, Any] | None
    allow_inexact: bool

    def __init__(self, loader: Any, trainer: Trainer, waits: bool = False) -> None:
        own = vars(self)  # `__setattr__` would set attributes of the loader.
        own["loader"], own["trainer"], own["waits"] = loader, trainer, waits
        own["restores_itself"] = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        own["start"], own["used"], own["ahead"], own["resumed"] = {}, 0, None, None
        own["allow_inexact"] = False

    @property  # type: ignore[misc]  # `object` lets it be set
    def __class__(self) -> Any:
        """The class of the loader."""
        return type(vars(self)["loader"])

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the loader."""
        return getattr(vars(self)["loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the loader: Lightning sets `_iterator` and `worker_init_fn`."""
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self.loader, name, value)

    def __len__(self) -> int:
        """Return the number of batches, if the loader has a length."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of a pass, or the remaining ones of the pass that is resumed.

        The pass starts when the first batch is taken, because Lightning asks for an iterator before training starts.
        """
        if self.waits:
            yield None
            return
        # Lightning fetches a batch ahead where only that tells which batch is the last.
        fetches_ahead = getattr(self.trainer.fit_loop._data_fetcher, "length", None) is None
        resumed, self.resumed, self.used, self.ahead = self.resumed, None, 0, None
        if resumed:
            now = snapshot()
            if not self.restores_itself:
                restore(resumed["start"]["random"])
        self.start = self._state()
        with obedient_workers(self.loader):
            batches = iter(self.loader)
        if resumed:
            if not self.restores_itself:
                deque(islice(batches, resumed["used"]), maxlen=0)  # Takes them, and keeps none.
            self.used, self.ahead = resumed["used"], resumed["ahead"]
            restore(self.ahead["random"] if self.ahead else now)
            if not self.ahead:
                self._refuse_changes(resumed)
        while True:
            if fetches_ahead and not (resumed and self.ahead):
                self.ahead = {
                    "random": snapshot(),
                    "loader": self.loader.state_dict() if self.restores_itself else None,
                }
            batch = next(batches, self)
            if resumed and self.ahead:
                restore(now)  # The batch was fetched before the checkpoint was written.
                self._refuse_changes(resumed)
            resumed = None
            if batch is self:
                return
            self.used += 1
            yield batch

    def state_dict(self, is_within_pass: bool = True) -> dict[str, Any]:
        """Return what `resume` needs, as plain values and tensors."""
        batches_ahead = len(getattr(self.trainer.fit_loop._data_fetcher, "batches", ()))
        ahead, loader = self.ahead if batches_ahead else None, None
        if self.restores_itself:
            loader = ahead["loader"] if ahead else self.loader.state_dict()
        return {
            "start": self.start if is_within_pass else self._state(),
            "used": self.used - batches_ahead if is_within_pass else 0,
            "ahead": ahead,
            "loader": loader,
            "now": self._now(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: Lightning 2.6.6 restores a loader too late or too early. `resume` restores this one."""

    def lost(self, state: Mapping[str, Any], epoch: int) -> str | None:
        """Return what a resumed pass cannot restore, with its value then and now, or None."""
        loader = self.loader
        if self.restores_itself:
            return None
        if getattr(loader, "persistent_workers", False):
            return "the loader has persistent_workers=True, whose processes keep their own random states"
        _set_sampler_epoch(loader, epoch)
        return difference(state["start"]["values"], self._state()["values"])

    def resume(self, state: Mapping[str, Any] | None, is_within_pass: bool, allow_inexact: bool = False) -> None:
        """Let the next pass resume after the batches that were used, or start as the next one of the saved run.

        That pass raises a `UsageError` if the loader then differs from the saved one, unless `allow_inexact` is on.
        """
        self.waits, self.allow_inexact = False, allow_inexact
        if state is None:
            return
        if self.restores_itself:
            self.loader.load_state_dict(state["loader"])
        else:
            set_states(self._objects(), state["start"]["objects"])
        self.resumed = state if is_within_pass else None

    def _refuse_changes(self, resumed: Mapping[str, Any]) -> None:
        """Refuse a loader that something else than the pass has changed, for example weights of its sampler."""
        if not self.allow_inexact and not self.restores_itself:
            if found := difference(resumed["now"], self._now()):
                raise UsageError(cannot_resume(found))

    def _now(self) -> dict[str, str]:
        """Describe the loader in a pass, without iterators, which the pass has made and moved."""
        values = {} if self.restores_itself else fingerprints(roots(self.loader))
        return {path: value for path, value in values.items() if not is_position(value)}

    def _state(self) -> dict[str, Any]:
        if self.restores_itself:
            return {}
        return {
            "random": snapshot(),
            "objects": get_states(self._objects()),
            "values": fingerprints(roots(self.loader)),
        }

    def _objects(self) -> dict[str, Any]:
        return find_stateful(roots(self.loader))


def roots(loader: Any) -> dict[str, Any]:
    """Return by name the objects that decide the batches of a loader."""
    if not isinstance(loader, DataLoader):
        return {type(loader).__name__: loader}
    names = ("generator", "sampler", "batch_sampler", "dataset", "collate_fn")
    return {name: getattr(loader, name) for name in names}


def cannot_resume(reason: str) -> str:
    """Return the message that refuses a run."""
    return (
        f"the run cannot resume exactly: {reason}; --allow_inexact (in a program, RandomState(allow_inexact=True)) "
        "resumes anyway"
    )


def difference(before: Mapping[str, str], now: Mapping[str, str], split: str = "training") -> str | None:
    """Return the first value that two descriptions of a loader do not share, or None."""
    for path in dict.fromkeys([*before, *now]):
        old, new = before.get(path, "not set"), now.get(path, "not set")
        if old != new:
            return f"{path} of the {split} loader was {old} and is {new}"
    return None
