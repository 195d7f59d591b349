"""A run ends as a whole: on a signal after a step that all its processes have done, and when one of them fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch exports them

from firstlight.callbacks.cadence import validation_follows
from firstlight.callbacks.checkpoints import LastCheckpoint
from firstlight.distributed.watchdog import RankWatchdog
from firstlight.errors import UsageError

__all__ = ["GracefulShutdown", "interruptible"]


class GracefulShutdown(Checkpoint):
    """Stop all processes of a fit after the same step, on a signal to any of them, and none of them without the others.

    SIGTERM, Ctrl-C and, in a job of SLURM, SIGUSR1 let the optimiser step under way finish, and a validation that
    follows it; where a validation follows each step, the epoch. `LastCheckpoint` writes its file, and
    `SystemExit(143)` is raised, or `KeyboardInterrupt` for Ctrl-C. A second Ctrl-C stops at once; another SIGTERM is
    ignored, as schedulers repeat it.

    A process that failed, was killed or is frozen ends the others; `lost` says which it was. Frozen is one that the
    system does not run, not one that loops. Processes that Lightning started are waited for, and killed after ten
    seconds, so that none is left.

    It is a `Checkpoint`, so that Lightning calls it after all others; it comes after `LastCheckpoint`. Lightning adds
    no checkpoint of its own beside it; where nothing is kept, it warns.

    Args:
        timeout: Seconds after which a process that does not answer counts as frozen.

    Raises:
        UsageError: When `timeout` is below 5 seconds.
    """

    def __init__(self, timeout: float = 300) -> None:
        if not timeout >= 5:
            raise UsageError(f"GracefulShutdown was given timeout={timeout}: it is at least 5 seconds")
        self.timeout = timeout
        self.failed_rank: str | None = None
        self._asked: int | None = None
        self._raised: BaseException | None = None
        self._step = 0
        self._watchdog: RankWatchdog | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn where nothing is kept."""
        if stage == "fit" and all(isinstance(each, GracefulShutdown) for each in trainer.checkpoint_callbacks):
            rank_zero_warn("nothing is kept of this fit: Stop writes no checkpoint without a LastCheckpoint beside it")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the processes know of each other."""
        self.failed_rank = self._asked = self._raised = self._watchdog = None
        if trainer.world_size > 1:
            # Lightning 2.6.6 watches what it started, and kills this process without a word when one has ended.
            self._children = list(_started(trainer))
            _started(trainer).clear()
            self._watchdog = RankWatchdog(
                _store(trainer, self.timeout),
                trainer.global_rank,
                trainer.world_size,
                self.timeout,
                {trainer.global_rank + index: child for index, child in enumerate(self._children, 1)},
                trainer.local_rank > 0 or "TORCHELASTIC_RUN_ID" in os.environ,
            )
            trainer.strategy.barrier()
            self._watchdog.start()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch the signals before the first step, which is when they take effect."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch the signals."""
        self._step = trainer.global_step
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to, after a step that is whole."""
        before, self._step = self._step, trainer.global_step
        if self._step > before:
            if self._asked and self._watchdog and self._watchdog.stop is None:
                # No process gets beyond the next step, which needs the gradient of this one.
                self._watchdog.ask(self._step + 1, self._asked)
            if (self._asked or self._watchdog) and not validation_follows(trainer, batch_idx):
                # After the last step the run ends by itself, once that is logged.
                if not 0 <= trainer.max_steps <= trainer.global_step:
                    self._stop_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if asked to, after the validation."""
        self._stop_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Part from the others; what was asked for at the very end is done all the same."""
        self._part(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Part from the others where nothing was left to train. Lightning has put back the handlers that it found."""
        self._handlers.clear()
        self._part(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the others, and find out which of them it was."""
        if self._watchdog and exception is not self._raised:
            if isinstance(exception, DistError) or "gloo" in str(exception):
                self.failed_rank = self._watchdog.diagnose()
            if self.failed_rank is None:
                self._watchdog.fail()
            elif trainer.global_rank and self._watchdog.is_reporter():
                sys.stderr.write(f"firstlight: {self.failed_rank}\n")
        while self._handlers:
            number, before = self._handlers.popitem()
            signal.signal(number, before)
        # Lightning does not get back what it started: it would see that one has ended, and kill this process.
        children, until = self._release(), time.monotonic() + 10
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0, until - time.monotonic()))
            child.kill()

    def _part(self, trainer: Trainer) -> None:
        asked = self._asked
        if self._watchdog:
            # Who ends first takes the store along.
            trainer.strategy.barrier()
            asked = self._watchdog.stop[1] if self._watchdog.stop else asked
        if asked:
            self._end(asked)
        _started(trainer).extend(self._release())

    def _stop_if_due(self, trainer: Trainer) -> None:
        step, asked = self._watchdog.stop or (0, None) if self._watchdog else (0, self._asked)
        if asked and trainer.global_step >= step:
            for each in trainer.checkpoint_callbacks:
                if isinstance(each, LastCheckpoint):
                    each.write(trainer)
            self._end(asked)

    def _end(self, number: int) -> NoReturn:
        self._asked = None
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
        raise self._raised

    def _listen(self) -> None:
        """Take the place of Lightning's handlers.

        That of SIGTERM ends with 0 and no checkpoint, or waits for ever for other processes. That of SLURM's warning
        saves in the middle of a step; it also requeues the job, which is left to the script of the job.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM]
        # Someone else's handler is left alone.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        for number in numbers:
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers.pop(number, signal.default_int_handler))
            if self._watchdog is None or not self._watchdog.rank:
                # Not `print`, which may be what was interrupted.
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def _release(self) -> list[subprocess.Popen[bytes]]:
        """Leave the others, and return the processes that Lightning started."""
        if self._watchdog:
            self._watchdog.close()
        children, self._watchdog, self._children = self._children, None, []
        return children


def _started(trainer: Trainer) -> list[Any]:
    """Return the processes that Lightning started, as the list that its observer looks at."""
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    return processes


def _store(trainer: Trainer, timeout: float) -> PrefixStore:
    """Return a store of this fit alone, where the processes found each other; what it does takes `timeout` at most."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = trainer.strategy.broadcast(f"firstlight/{os.getpid()}/{os.urandom(8).hex()}")
    limit = timedelta(seconds=timeout)
    return PrefixStore(name, TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit))


@contextmanager
def interruptible(trainer: Trainer, left: Callable[[], str]) -> Iterator[None]:
    """Say what is left after Ctrl-C or SIGTERM, and end with its exit code: Lightning 2.6.6 says nothing."""
    try:
        yield
    except SystemExit as stopped:
        if not trainer.interrupted:
            raise
        rank_zero_only(print)(left(), flush=True)
        told = stopped.code == 143 or isinstance(stopped, SIGTERMException)
        raise SystemExit(143 if told else 130) from stopped
