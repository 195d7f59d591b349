"""End all processes of a fit together: after the same step on a signal, and when one of them fails."""

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

from firstlight.callbacks.checkpoints import LastCheckpoint, validation_follows
from firstlight.distributed import RankWatchdog
from firstlight.errors import check_range, emit, say


class GracefulShutdown(Checkpoint):
    """Stop all processes of a fit after the same step when one of them gets a signal, and end all when one fails.

    SIGTERM, Ctrl-C and, in a SLURM job, SIGUSR1 let the current optimiser step finish, and a validation that follows
    it. If a validation follows each step, the epoch finishes. `LastCheckpoint` writes its file. Then `SystemExit(143)`
    is raised, or `KeyboardInterrupt` for Ctrl-C. A second Ctrl-C stops at once; schedulers repeat SIGTERM, so another
    one is ignored.

    A process that failed, was killed or is frozen ends the others, and `failed_rank` describes it. A process is frozen
    if the system does not run it; an endless loop does not count. Lightning calls a `Checkpoint` after all other
    callbacks; list this one after `LastCheckpoint`.

    Args:
        timeout: Seconds without an answer after which a process counts as frozen, at least 5.
    """

    def __init__(self, timeout: float = 300) -> None:
        check_range("GracefulShutdown", "[5, inf]", timeout=timeout)
        self.timeout = timeout
        self.failed_rank: str | None = None
        self._signal: int | None = None
        self._raised: BaseException | None = None
        self._has_stepped = False
        self._watchdog: RankWatchdog | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the fit writes no checkpoint: Lightning adds none of its own if this callback is present."""
        if stage == "fit" and all(isinstance(each, GracefulShutdown) for each in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "this fit writes no checkpoint: add LastCheckpoint, because GracefulShutdown alone writes none"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching the other processes."""
        self.failed_rank = self._signal = self._raised = self._watchdog = None
        if trainer.world_size > 1:
            # Lightning 2.6.6 watches the processes that it started, and kills this one silently when one has ended.
            self._children = list(_started_processes(trainer))
            _started_processes(trainer).clear()
            self._watchdog = RankWatchdog(
                _connect_store(trainer, self.timeout),
                trainer.global_rank,
                trainer.world_size,
                self.timeout,
                {trainer.global_rank + index: child for index, child in enumerate(self._children, 1)},
                trainer.local_rank > 0 or "TORCHELASTIC_RUN_ID" in os.environ,
            )
            trainer.strategy.barrier()
            self._watchdog.start()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals from here; they take effect after the first step."""
        self._install_handlers()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals."""
        self._install_handlers()

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Note that the optimiser steps in this batch."""
        self._has_stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a complete optimiser step, if a process got a signal."""
        has_stepped, self._has_stepped = self._has_stepped, False
        if not has_stepped or not (self._signal or self._watchdog):
            return
        step = trainer.global_step
        if self._signal and self._watchdog and self._watchdog.stop is None:
            # No process can complete the next step without this one's gradient.
            self._watchdog.ask(step + 1, self._signal)
        # After the last step the run ends by itself, once that step is logged.
        if not validation_follows(trainer, batch_idx) and not 0 <= trainer.max_steps <= step:
            self._stop_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the validation, if a process got a signal."""
        self._stop_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching the other processes; a signal at the very end still ends the run."""
        self._leave(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching the others if there was nothing to train. Lightning has restored the signal handlers."""
        self._handlers.clear()
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the other processes, and find out which one failed."""
        if self._watchdog and exception is not self._raised:
            if isinstance(exception, DistError) or "gloo" in str(exception):
                self.failed_rank = self._watchdog.diagnose()
            if self.failed_rank is None:
                self._watchdog.fail()
            elif trainer.global_rank and self._watchdog.is_reporter():
                sys.stderr.write(f"firstlight: {self.failed_rank}\n")
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
        # Lightning must not watch the processes again: it would see that one has ended, and kill this one.
        children, deadline = self._close(), time.monotonic() + 10
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0, deadline - time.monotonic()))
            child.kill()

    def _leave(self, trainer: Trainer) -> None:
        """Wait for the other processes, and raise if one of them got a signal."""
        number = self._signal
        if self._watchdog:
            # The process that holds the store must not end before the others have left.
            trainer.strategy.barrier()
            number = self._watchdog.stop[1] if self._watchdog.stop else number
        if number:
            self._raise_for(number)
        _started_processes(trainer).extend(self._close())

    def _stop_if_due(self, trainer: Trainer) -> None:
        step, number = self._watchdog.stop or (0, None) if self._watchdog else (0, self._signal)
        if number and trainer.global_step >= step:
            for each in trainer.checkpoint_callbacks:
                if isinstance(each, LastCheckpoint):
                    each.write(trainer)
            self._raise_for(number)

    def _raise_for(self, number: int) -> NoReturn:
        self._signal = None
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
        raise self._raised

    def _install_handlers(self) -> None:
        """Replace the signal handlers of Lightning 2.6.6.

        Its SIGTERM ends with code 0 and no checkpoint, or waits forever for other processes. Its handler of SLURM's
        warning saves within a step and requeues the job, which is up to the job's script.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM]
        # A handler that the user installed stays.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        for number in numbers:
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if number == signal.SIGINT:
            signal.signal(number, self._handlers.pop(number, signal.default_int_handler))
            if self._watchdog is None or not self._watchdog.rank:
                # Not `print`: the signal may have interrupted one.
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def _close(self) -> list[subprocess.Popen[bytes]]:
        """Close the watchdog, and return the processes that Lightning started."""
        if self._watchdog:
            self._watchdog.close()
        children, self._watchdog, self._children = self._children, None, []
        return children


def _started_processes(trainer: Trainer) -> list[Any]:
    """Return the list of processes that Lightning started and watches."""
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    return processes


def _connect_store(trainer: Trainer, timeout: float) -> PrefixStore:
    """Return a store for this fit alone, at the address where the processes met; each call takes at most `timeout`."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = trainer.strategy.broadcast(f"firstlight/{os.getpid()}/{os.urandom(8).hex()}")
    limit = timedelta(seconds=timeout)
    return PrefixStore(name, TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit))


@contextmanager
def interruptible(trainer: Trainer, left: Callable[[], str]) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, print what is left and exit with 130 or 143; Lightning 2.6.6 prints nothing."""
    try:
        yield
    except SystemExit as stopped:
        if not trainer.interrupted:
            raise
        is_sigterm = stopped.code == 143 or isinstance(stopped, SIGTERMException)
        code = 143 if is_sigterm else 130
        if not rank_zero_only.rank:  # type: ignore[attr-defined]  # set by Lightning
            say(text := left(), always=True)
            emit("error", kind="interrupted", message=text, exit_code=code)
        raise SystemExit(code) from stopped
