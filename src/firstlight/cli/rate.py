"""`firstlight lr`: suggest a learning rate, draw the range test, and write an overlay with the rate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from firstlight.cli.parser import CLI
from firstlight.cli.parser_errors import read_yaml
from firstlight.cli.side_effects import without_side_effects
from firstlight.errors import UsageError, emit, say
from firstlight.run import directory
from firstlight.run.experiment import is_first_process

_HEADER = "# firstlight lr: "
_METADATA = b"tEXtSoftware\0firstlight"
"""The beginning of an overlay, and the metadata of a PNG, that the verb writes. It replaces no other files."""
_NAMES = ("lr", "learning_rate")


@without_side_effects()
def suggest_rate(args: list[str]) -> None:
    """Print the suggestion with its plot, write `lr.png`, and with `--apply` the overlay `lr.yaml`."""
    cli = CLI("lr", args)
    if cli.run_dir is not None or cli.config.resume:
        raise UsageError("lr starts from new weights: leave out --resume, and give --config in place of --run")
    experiment = cli.training()
    folder = Path(cli.config.output or ".").expanduser()
    image, overlay = folder / "lr.png", folder / "lr.yaml"
    if is_first_process():
        if not folder.is_dir():
            raise UsageError(f"--output {folder} is not a folder")
        for path in (image, overlay) if cli.config.apply else (image,):
            _refuse_foreign(path)
        emit("start", verb="lr")
    found = experiment.test_rates()
    if not is_first_process():
        return
    for line in found.lines():
        say(line)
    say(f"suggest  {found.sentence}", always=True)
    found.plot(image)
    say(f"plot     {image}")
    if cli.config.apply:
        option = rate_option(cli.options(), found.own)
        before = f"; it held {_value(overlay)}" if overlay.is_file() else ""
        config = nested(yaml.safe_load(experiment.config), option, found.suggestion.rate)
        directory.write_text(overlay, f"{_HEADER}{found.sentence}\n{yaml.safe_dump(config)}")
        say(f"apply    --config {overlay} after your own sets {option}{before}", always=True)
    seen = found.suggestion
    rates = {"rate": seen.rate, "low": seen.low, "high": seen.high, "own": found.own}
    files = {"plot": str(image), "overlay": str(overlay) if cli.config.apply else None}
    emit("end", verb="lr", **rates, batch_size=found.batch_size, reason=seen.reason, seconds=found.seconds, **files)


def rate_option(options: Mapping[str, Any], rate: float) -> str:
    """Return the option of a model that sets the learning rate: its name is one of a rate, and its value the rate.

    Args:
        options: All options of a configuration, by their names on the command line.
        rate: The rate of the optimiser.

    Raises:
        UsageError: When there is none, or several.

    >>> rate_option({"model": "Own", "model.learning_rate": 0.1, "model.lr": 0.2, "lr.decay": 1}, 0.1)
    'model.learning_rate'
    """
    named = [name for name in options if name.startswith("model.") and name.rpartition(".")[2] in _NAMES]
    found = [name for name in named if isinstance(options[name], float | int) and float(options[name]) == rate]
    if len(found) != 1:
        seen = ", ".join(f"{name}={options[name]}" for name in named) or "no option named lr or learning_rate"
        raise UsageError(
            f"--apply needs the option that sets the rate {rate:g} of the optimiser, and the model has {seen}: leave "
            "out --apply, and set the rate yourself"
        )
    return found[0]


def nested(config: Any, option: str, value: Any) -> dict[str, Any]:
    """Return a configuration that sets one option of another one.

    >>> nested({"model": {"class_path": "A", "init_args": {"lr": 1}}}, "model.lr", 2)
    {'model': {'init_args': {'lr': 2}}}
    """
    name, _, rest = option.partition(".")
    if "class_path" in config:
        return {"init_args": nested(config["init_args"], option, value)}
    return {name: nested(config[name], rest, value) if rest else value}


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that this verb has not written."""
    try:
        if not path.exists():
            return
        start = path.read_bytes()[:200]
        if not (start.startswith(_HEADER.encode()) or (start.startswith(b"\x89PNG") and _METADATA in start)):
            raise UsageError(f"{path} exists, and firstlight lr has not written it: give --output DIR")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _value(overlay: Path) -> Any:
    """Return the only value of an overlay."""
    value = read_yaml(overlay)
    while isinstance(value, dict):
        value = next(iter(value.values()), None)
    return value
