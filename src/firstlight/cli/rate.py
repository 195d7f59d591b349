"""`firstlight lr`: suggest a learning rate, draw the range test, and write an overlay with the rate.

The range test says where to look: short runs with rates around its suggestion decide.
"""

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from firstlight.cli.parser import CLI
from firstlight.cli.parser_errors import read_yaml
from firstlight.cli.side_effects import isolated, without_side_effects
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError, check_range, emit, printing, say
from firstlight.preflight.lr_range import next_rate
from firstlight.preflight.rate_sweep import RangeTest
from firstlight.run import directory
from firstlight.run.experiment import is_first_process

_HEADER = "# firstlight lr: "
_METADATA = b"tEXtSoftware\0firstlight"
"""The beginning of an overlay, and the metadata of a PNG, that the verb writes. It replaces no other files."""
_NAMES = ("lr", "learning_rate")
TRIES = 9
"""Short runs at most, if --tries does not say otherwise."""
_TRY_SECONDS, _TRY_STEPS = 20.0, 200
"""A short run has as many epochs as fit into this time, and at least so many steps, but no more than are configured."""
_QUIET = {"best", "last", "hparams", "insight", "progress", "lr", "gradient_norm", "shutdown", "random_state"}
"""Default callbacks that a short run leaves out: it keeps early stopping."""


@dataclass(frozen=True)
class Found:
    """The learning rate to use, and why.

    Args:
        test: The range test.
        tried: Lowest validation loss of short runs, by rate; infinite where it was not finite. Empty: none decided.
        epochs: Epochs of such a run.
    """

    test: RangeTest
    tried: Mapping[float, float] = field(default_factory=dict)
    epochs: int = 0

    @property
    def rate(self) -> float:
        """The rate with the lowest validation loss, or that of the range test."""
        return min(self.tried, key=lambda each: self.tried[each]) if self.tried else self.test.suggestion.rate

    @property
    def sentence(self) -> str:
        """The rate and its reasons."""
        if not self.tried:
            return self.test.sentence
        runs = f"{len(self.tried)} runs of {self.epochs:,} epoch{'s' * (self.epochs > 1)}"
        return f"lr {self.rate:.2g} has the lowest val/loss of {runs}; range test: {self.test.sentence}"

    def plain(self) -> list[dict[str, float | None]]:
        """Return the rates that were tried with their losses, None where the loss was not finite."""
        losses = ((rate, loss if math.isfinite(loss) else None) for rate, loss in self.tried.items())
        return [{"lr": rate, "val/loss": loss} for rate, loss in losses]


class _LowestLoss(Callback):
    """Keep the lowest validation loss of a fit."""

    lowest = math.inf
    is_logged = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the loss of this validation."""
        if not trainer.sanity_checking:
            self.is_logged = "val/loss" in trainer.callback_metrics
            loss = float(trainer.callback_metrics.get("val/loss", math.nan))
            self.lowest = min(self.lowest, loss) if math.isfinite(loss) else self.lowest


@without_side_effects()
def suggest_rate(args: list[str]) -> None:
    """Print the suggestion with its plot, write `lr.png`, and with `--apply` the overlay `lr.yaml`."""
    cli = CLI("lr", args)
    tries = TRIES if cli.config.tries is None else cli.config.tries
    check_range("lr", "[0, inf)", tries=tries)
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
    found = find_rate(cli, tries)
    if not is_first_process():
        return
    say(f"suggest  {found.sentence}", always=True)
    found.test.plot(image)
    say(f"plot     {image}")
    if cli.config.apply:
        option = rate_option(cli.options(), found.test.own)
        before = f"; it held {_value(overlay)}" if overlay.is_file() else ""
        config = nested(yaml.safe_load(experiment.config), option, found.rate)
        directory.write_text(overlay, f"{_HEADER}{found.sentence}\n{yaml.safe_dump(config)}")
        say(f"apply    --config {overlay} after your own sets {option}{before}", always=True)
    test, seen = found.test, found.test.suggestion
    rates = {"rate": found.rate, "low": seen.low, "high": seen.high, "own": test.own, "tries": found.plain()}
    files = {"plot": str(image), "overlay": str(overlay) if cli.config.apply else None}
    emit("end", verb="lr", **rates, batch_size=test.batch_size, reason=seen.reason, seconds=test.seconds, **files)


def find_rate(cli: CLI, tries: int) -> Found:
    """Return the learning rate with the lowest validation loss of short runs, around that of a range test.

    Where runs cannot decide, one line says why, and the range test does.

    Raises:
        UsageError: When the configuration cannot be tested so, or its loss falls at no rate.
    """
    test = cli.experiment.test_rates()
    if not is_first_process():
        return Found(test)
    for line in test.lines():
        say(line)
    epochs = _epochs(test, cli.experiment.options["max_epochs"])
    try:
        option = rate_option(cli.options(), test.own)
    except UsageError:
        option = ""
    reasons = {
        "no option of the model sets the rate": not option,
        "several processes train together": test.processes > 1,
        "an epoch takes too long": not epochs,
    }
    reason = next((text for text, holds in reasons.items() if holds and tries), "")
    if reason:
        say(f"try      no runs, because {reason}")
    tried: dict[float, float] = {}
    rate: float | None = test.suggestion.rate
    own = test.own if test.own > 0 else None
    while not reason and rate is not None and len(tried) < tries:
        started = time.monotonic()
        try:
            run = _train(cli, {option: rate, "trainer.max_epochs": epochs})
        except UsageError as error:
            say(f"try      no more runs: {error}")
            break
        if not run.is_logged:
            say("try      no more runs: validation logs no val/loss")
            break
        tried[rate] = run.lowest
        shown = f"val/loss {tried[rate]:.4g}" if math.isfinite(tried[rate]) else "no finite val/loss"
        say(f"try      lr {rate:.2g}: {shown}, {time.monotonic() - started:.2g} s")
        if own is not None and all(abs(math.log(own / each)) > 0.1 for each in tried):
            rate, own = own, None  # The suggestion must not be worse.
        else:
            rate = next_rate(tried)
    decides = any(map(math.isfinite, tried.values()))
    if test.suggestion.problem and not decides:
        raise UsageError(test.suggestion.problem)
    return Found(test, tried if decides else {}, epochs)


def _epochs(test: RangeTest, planned: int | None) -> int:
    """Return the epochs of a short run, 0 if an epoch takes too long."""
    fitting = _TRY_SECONDS / (test.epoch_steps * max(test.step_seconds, 1e-6))
    if fitting < 0.5 or not math.isfinite(test.epoch_steps):
        return 0
    epochs = max(int(fitting), math.ceil(_TRY_STEPS / test.epoch_steps))
    return epochs if planned is None or planned <= 0 else min(epochs, planned)


def _train(cli: CLI, values: Mapping[str, Any]) -> _LowestLoss:
    """Return what was seen of a run in a folder of its own; its loss is infinite if it fails."""
    recorder, given = _LowestLoss(), cli.experiment
    with tempfile.TemporaryDirectory() as folder, isolated(), printing("silent"):
        try:
            experiment = cli.variant(values)
            experiment.experiment_dir = Path(folder) / "lr"
            experiment.options = {**experiment.options, "callbacks": [recorder], "logger": False}
            experiment.disable = experiment.disable | _QUIET
            if isinstance(experiment.datamodule, DataModule) and isinstance(given.datamodule, DataModule):
                experiment.datamodule.share(given.datamodule)
            experiment.fit()
        except (TrainingError, torch.OutOfMemoryError):
            recorder.lowest, recorder.is_logged = math.inf, True
        finally:
            cli.experiment = given
    return recorder


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
