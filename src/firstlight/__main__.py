"""`firstlight VERB ...`. Only the verb's own module is imported, so that `firstlight --help` is instant."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from firstlight import __version__
from firstlight.cli import TOOLS, VERBS
from firstlight.errors import Mode, TrainingError, UsageError, did_you_mean, emit, is_users, printable, printing

_KNOWN = {**VERBS, **TOOLS}
_VERB_LINES = "\n".join(f"  {verb:<12}{line}" for verb, line in _KNOWN.items())
_HELP = f"""usage: firstlight VERB [options]

{_VERB_LINES}

  firstlight run --config firstlight:digits_mlp    a first run
  firstlight VERB --help                           the options of a verb
  firstlight --version"""


def main(args: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for wrong use, or 1 for a run that cannot continue.

    Wrong use is printed in one line. `FIRSTLIGHT_TRACEBACK=1` adds the traceback. Any other exception is a bug and is
    not caught. If standard output fails, the verb still does its work and writes its files.

    With `--json`, standard output has only JSON objects. What else is printed there, by parts of the user, libraries
    and child processes, goes to standard error.
    """
    verb, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    mode: Mode = "json" if "--json" in rest else "quiet" if "--quiet" in rest else "lines"
    outputs = _Output(sys.stdout), _Output(sys.stderr)
    sys.stdout, sys.stderr = outputs
    if mode == "json":
        outputs[0].leave_descriptor()
        sys.stdout = outputs[1]
    here = os.getcwd()  # Unlike `python -m`, a console script does not look for the user's modules there.
    is_added = here not in sys.path and "" not in sys.path
    if is_added:
        sys.path.append(here)
    try:
        try:
            with printing(mode, outputs[0]):  # type: ignore[arg-type]
                code = _call(verb, rest)
        except SystemExit as stopped:  # For example after the help of a class.
            outputs[0].flush()
            if stopped.code or outputs[0].error is None:
                raise
            code = 0
        outputs[0].flush()
        error = outputs[0].error
        if code or error is None:
            return code
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # The reader of the output, for example `head`, has ended.
        sys.stderr.write(f"firstlight: cannot write to standard output: {error.strerror}\n")
        return 1
    finally:
        if is_added and here in sys.path:
            sys.path.remove(here)
        sys.stdout, sys.stderr = (each.close() for each in outputs)


def _call(verb: str, args: list[str]) -> int:
    """Call a verb and return the exit code."""
    try:
        if verb in ("--help", "-h"):
            print(_HELP)
        elif verb == "--version":
            print(f"firstlight {__version__}")
        elif verb in _KNOWN:
            getattr(import_module(f"firstlight.cli.{'verbs' if verb in VERBS else 'tools'}"), verb)(args)
        else:
            raise UsageError(f"unknown verb {verb}; available: {', '.join(_KNOWN)}" + did_you_mean(verb, _KNOWN))
    except KeyboardInterrupt:  # Before a run has started, or after its end.
        emit("error", kind="interrupted", message="interrupted", exit_code=130)
        sys.stderr.write("firstlight: interrupted\n")
        return 130
    except (UsageError, TrainingError) as error:
        if os.environ.get("FIRSTLIGHT_TRACEBACK") == "1":
            traceback.print_exc()
        # All processes of a run get the same TrainingError, and one prints it.
        if isinstance(error, UsageError) or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            # One write, because several processes may write at the same time.
            sys.stderr.write(f"firstlight: {printable(str(error))}\n")
            is_usage = isinstance(error, UsageError)
            emit("error", kind="usage" if is_usage else "training", message=str(error), exit_code=2 if is_usage else 1)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or is_users(error):  # Others are handled where a file is opened.
            emit("error", kind="bug", message=f"OSError: {error}", exit_code=1)
            raise
        message = f"{error.strerror}: {str(error.filename)[:80]}..."
        sys.stderr.write(f"firstlight: {printable(message)}\n")
        emit("error", kind="usage", message=message, exit_code=2)
        return 2
    except Exception as error:
        emit("error", kind="bug", message=f"{type(error).__name__}: {error}", exit_code=1)
        raise
    return 0


class _Output:
    """Standard output or error, whose failure ends no run: a disk is full, or the reader of a pipe has ended.

    Args:
        stream: The stream, or `None` if the shell closed it with `>&-`.

    Attributes:
        error: The first fault; nothing is written after it.
    """

    def __init__(self, stream: Any) -> None:
        self._own = stream
        self._stream = open(os.devnull, "w") if stream is None else stream  # for the life of the process
        self._copy: int | None = None
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        # The names of files may hold characters that the terminal cannot show.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def leave_descriptor(self) -> None:
        """Write to a copy of descriptor 1 from now on. What others write there goes to standard error."""
        self.flush()
        with suppress(OSError, ValueError, AttributeError):  # A stream in memory has no descriptor.
            if self._stream.fileno() == 1:
                copy = os.dup(1)
                os.dup2(2, 1)
                self._copy, self._stream = copy, os.fdopen(copy, "w", encoding="utf-8")

    def close(self) -> Any:
        """Return the stream, which Python flushes once more when it exits."""
        self.flush()
        if self._copy is not None:
            os.dup2(self._copy, 1)
            with suppress(OSError):
                self._stream.close()
            self._stream = self._own
        if self.error is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return self._own

    def _try(self, call: Callable[..., object], *args: str) -> None:
        if self.error is None:
            try:
                call(*args)
            except OSError as error:
                self.error = error


if __name__ == "__main__":
    sys.exit(main())
