"""Predict from raw inputs in a program, with the network and the preparation of a run or a checkpoint."""

from argparse import ArgumentError
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from firstlight.checkpoints.io import raise_fault, read
from firstlight.checkpoints.trust import fill_locations, only_trusted, stored_config
from firstlight.data import DataModule
from firstlight.errors import UsageError, innermost_statement, root_cause
from firstlight.run import directory
from firstlight.run.evaluate import choose_checkpoint, joined_columns

if TYPE_CHECKING:
    import pandas


class Predictor:
    """A trained network with everything that prepares its inputs. It is safe to use from several threads.

    Predictions equal those that `firstlight predict` writes for the same file, to the last digit: it takes the same
    batches in the same order, on the same device, in the same precision. The last digits of a row depend on the batch
    that it is in, because libraries add numbers of a matrix product in another order for another size. Callbacks are
    not called, so a network that a callback compiles may also differ in the last digits.

    Args:
        module: A task, or any LightningModule with a `predict_step` as tasks have it.
        datamodule: Its data module, with the fitted state of a checkpoint, or after `setup`.
        device: `"cpu"`, `"cuda"`, ... or `"auto"`, which is a GPU if there is one.
        precision: As in `Trainer`.

    Raises:
        UsageError: If the data module was not fitted, or there is no such device.
    """

    def __init__(
        self, module: LightningModule, datamodule: DataModule, device: str = "auto", precision: Any = "32-true"
    ) -> None:
        if not datamodule.fitted:
            raise UsageError(f"{type(datamodule).__name__} was not fitted: call setup, or load a checkpoint")
        try:
            fabric = Fabric(accelerator=device, devices=1, precision=precision)
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise UsageError(f"device={device} cannot be used: {error}; device='cpu' always can") from error
        self.device = fabric.device
        self._precision = fabric.strategy.precision
        self._precision.convert_module(module.eval()).to(self.device)  # In place.
        self.module = module
        self.datamodule = datamodule
        self._lock = Lock()

    @property
    def class_names(self) -> list[str]:
        """Name of each class; empty if predictions are not classes."""
        return self.datamodule.class_names

    def predict(self, raw: Any) -> "pandas.DataFrame":
        """Return predictions for raw inputs: the columns of `predictions.csv` without `index` and targets.

        Args:
            raw: What the data module takes: the path of a file or folder like that of the training data; for tables a
                DataFrame or a list of dicts; for texts a list of them; for images and numbers an array `(N, ...)` as
                the training data had it, before any scaling.

        Returns:
            A row for each sample, without those that `missing="drop"` drops. Its index is that of a DataFrame, the
            name of an image's file, or else the position of the sample, from 0.

        Raises:
            UsageError: If the inputs do not fit the training data.
        """
        import pandas  # Imported here: it takes half a second.

        with self._lock:
            dataset, loaded, rows = self.datamodule.prepare(raw)
            outputs = []
            with torch.inference_mode(), self._precision.forward_context():
                for step, indices in enumerate(torch.split(torch.arange(len(dataset)), self.datamodule.batch_size)):
                    inputs, targets = (each.to(self.device) for each in dataset.__getitems__(indices))
                    batch = self.datamodule.on_after_batch_transfer((inputs, targets), 0)
                    batch = self._precision.convert_input(batch[0]), batch[1]
                    outputs.append(_without_targets(self.module.predict_step(batch, step)))
        columns = directory.named_columns(joined_columns(self.module, outputs), self.class_names)
        names = (
            raw.index
            if isinstance(raw, pandas.DataFrame)
            else getattr(loaded, "names", []) or range(len(loaded.inputs))
        )
        return pandas.DataFrame(columns, index=pandas.Index(names)[rows])


def load(
    run_or_checkpoint: str | Path,
    which: str | None = None,
    *,
    trust: str | Collection[str] = (),
    device: str | None = None,
) -> Predictor:
    """Return the predictor of a run directory or of a checkpoint, see `firstlight.load`."""
    path = Path(run_or_checkpoint).expanduser()
    if (path.is_file() and path.name != "latest") or path.suffix == ".ckpt":
        if which is not None:
            raise UsageError(f"which={which} is a checkpoint of a run, but {path} is a checkpoint: leave it out")
        config = yaml.safe_load(stored_config(path, trust))
        fill_locations(config, path, trust)
        module, datamodule = _build(config, path, trust, is_trusted=False)
        checkpoint = path
    else:
        run = directory.find(path)
        if trust:
            raise UsageError(
                "trust is for a checkpoint alone: the classes that a run's configuration names are trusted"
            )
        config = directory.load_config(run)
        module, datamodule = _build(config, run / "config.yaml")
        default = "last" if getattr(module, "monitor", None) is None and not config.get("monitor") else "best"
        checkpoint = choose_checkpoint("load", run, which, default)
    if not isinstance(datamodule, DataModule):
        raise UsageError(
            f"{checkpoint} has the data module {type(datamodule).__name__}: it must be a firstlight.data.DataModule"
        )
    restore(module, datamodule, checkpoint)
    trainer: dict[str, Any] = config.get("trainer") or {}  # A checkpoint alone holds none.
    device = device or trainer.get("accelerator") or "auto"
    return Predictor(module, datamodule, device, trainer.get("precision") or "32-true")


def restore(module: LightningModule, datamodule: DataModule, path: Path) -> None:
    """Give a module and a data module what a checkpoint holds of them."""
    checkpoint = read(path)
    name = type(datamodule).__qualname__
    if not checkpoint.get(name):
        raise UsageError(f"{path} was trained without {name}: it has no statistics to scale the inputs with")
    try:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        datamodule.load_state_dict(checkpoint[name])
    except Exception as error:
        raise_fault(error, path)


def _without_targets(output: Any) -> Any:
    """Return what `predict_step` returned without targets, which raw inputs do not have."""
    if not isinstance(output, Mapping):
        return output
    return {
        name: column
        for name, column in output.items()
        if name != "target" and not (isinstance(column, Tensor) and column.ndim > 1 and not column.shape[1])
    }


def _build(
    config: Mapping[str, Any], source: Path, trust: str | Collection[str] = (), is_trusted: bool = True
) -> tuple[LightningModule, LightningDataModule]:
    """Return the task and the data module of a configuration."""
    if missing := [part for part in ("model", "data") if not config.get(part)]:
        raise UsageError(f"{source} holds no {missing[0]}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    try:
        with nullcontext() if is_trusted else only_trusted(source, trust):
            parsed = parser.parse_object({part: config[part] for part in ("model", "data")})
            built: Namespace = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise UsageError(f"{source}: {innermost_statement(str(error))}") from error
    except ValueError as error:
        # jsonargparse 4.53 wraps what a constructor raises in its own error.
        raise root_cause(error) from None
    return built.model, built.data
