"""`firstlight VERB ...`. Only the verb's own module is imported, so that `firstlight --help` is instant."""

import os
import select
import sys
import traceback
from importlib import import_module

from firstlight import __version__
from firstlight.cli import VERBS
from firstlight.errors import TrainingError, UsageError, did_you_mean

_VERB_LINES = "\n".join(f"  {verb:<10}{line}" for verb, line in VERBS.items())
_HELP = f"""usage: firstlight VERB [options]

{_VERB_LINES}

  firstlight run --config configs/digits_mlp.yaml    a first run
  firstlight VERB --help                             the options of a verb
  firstlight --version"""


def main(args: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for wrong use, or 1 for a run that cannot continue.

    Wrong use is printed in one line. `FIRSTLIGHT_TRACEBACK=1` adds the traceback. Any other exception is a bug and is
    not caught.
    """
    verb, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # The shell closed it with `>&-`.
            setattr(sys, name, open(os.devnull, "w"))  # for the life of the process
    here = os.getcwd()  # Unlike `python -m`, a console script does not look for the user's modules there.
    is_added = here not in sys.path and "" not in sys.path
    if is_added:
        sys.path.append(here)
    try:
        if verb in ("--help", "-h"):
            print(_HELP)
        elif verb == "--version":
            print(f"firstlight {__version__}")
        elif verb in VERBS:
            getattr(import_module("firstlight.cli.verbs"), verb)(rest)
        else:
            raise UsageError(f"unknown verb {verb}; available: {', '.join(VERBS)}" + did_you_mean(verb, VERBS))
        sys.stdout.flush()
    except KeyboardInterrupt:  # Before a run has started, or after its end.
        sys.stderr.write("firstlight: interrupted\n")
        return 130
    except BrokenPipeError:
        reader = select.poll()
        reader.register(sys.stdout.fileno(), 0)
        if not reader.poll(0):
            raise  # Another pipe broke.
        return 128 + 13  # The reader of the output, for example `head`, has ended.
    except OSError as error:
        if error.filename is not None or not _stdout_fails():
            raise
        sys.stderr.write(f"firstlight: cannot write to standard output: {error.strerror}\n")
        return 1
    except (UsageError, TrainingError) as error:
        if os.environ.get("FIRSTLIGHT_TRACEBACK") == "1":
            traceback.print_exc()
        # All processes of a run get the same TrainingError, and one prints it.
        if isinstance(error, UsageError) or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            # One write, because several processes may write at the same time.
            sys.stderr.write(f"firstlight: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if is_added and here in sys.path:
            sys.path.remove(here)
        try:
            sys.stdout.flush()
        except OSError:  # Python would flush again at exit, and print a message.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _stdout_fails() -> bool:
    """Return whether standard output cannot be written, for example because its disk is full."""
    try:
        sys.stdout.write("\n")  # What could not be written before is gone.
        sys.stdout.flush()
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
