"""`firstlight VERB ...`: which verbs there are. Nothing heavy is imported before a verb is known."""

import os
import select
import sys
import traceback
from importlib import import_module

from firstlight import __version__
from firstlight.errors import TrainingError, UsageError, did_you_mean

__all__ = ["VERBS", "main"]

VERBS = {
    "run": ("fit, then test the best checkpoint", "firstlight.cli.verbs:run"),
    "fit": ("train; with --run DIR, go on from its last checkpoint", "firstlight.cli.verbs:fit"),
    "check": ("tell in seconds what is wrong with a fit before it starts", "firstlight.cli.verbs:check"),
    "validate": ("score a checkpoint on the validation split", "firstlight.cli.verbs:validate"),
    "test": ("score a checkpoint on the test split", "firstlight.cli.verbs:test"),
    "predict": ("write a checkpoint's predictions for the test split", "firstlight.cli.verbs:predict"),
}

_VERB_LINES = "\n".join(f"  {verb:<10}{line}" for verb, (line, _) in VERBS.items())
_HELP = f"""usage: firstlight VERB [options]

{_VERB_LINES}

  firstlight run --config configs/digits_mlp.yaml    a first run
  firstlight VERB --help                             the options of a verb
  firstlight --version"""


def main(args: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for wrong use, said in one line, or 1 for a run that cannot go on.

    `FIRSTLIGHT_TRACEBACK=1` shows where either was found. Any other exception is a bug and passes through.
    """
    verb, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    # A console script does not look for the user's own modules where it is called, as `python -m` does.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if verb in ("--help", "-h"):
            print(_HELP)
        elif verb == "--version":
            print(f"firstlight {__version__}")
        elif verb in VERBS:
            module, function = VERBS[verb][1].split(":")
            getattr(import_module(module), function)(rest)
        else:
            raise UsageError(f"there is no verb {verb}: {', '.join(VERBS)}" + did_you_mean(verb, VERBS))
    except KeyboardInterrupt:  # before a run has begun, or after it
        sys.stderr.write("firstlight: interrupted\n")
        return 130
    except BrokenPipeError:
        reader = select.poll()
        reader.register(sys.stdout.fileno(), 0)
        if not reader.poll(0):
            raise  # It was another pipe.
        return 128 + 13  # Who reads, `head` for example, has seen enough.
    except (UsageError, TrainingError) as error:
        if os.environ.get("FIRSTLIGHT_TRACEBACK") == "1":
            traceback.print_exc()
        # All processes of a run stop alike, and one says why.
        if isinstance(error, UsageError) or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            # In one piece: several processes write at the same time.
            sys.stderr.write(f"firstlight: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would try again as it exits, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
