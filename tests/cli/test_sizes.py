"""Sizes that are left out follow from the data."""

from pathlib import Path

import pytest
import yaml

from firstlight.cli.parser import CLI
from firstlight.cli.sizes import SIZES
from tests.helpers import called, newest

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = {
    "digits_mlp": "classes in_features out_features",
    "digits_convnet": "classes in_channels out_features",
    "breast_cancer": "in_features out_features",
    "bicycles": "in_features out_features kind",
    "letters": "classes out_features",
}


def without_sizes(config, found):
    """Remove the sizes in a configuration, and add their names to `found`."""
    if isinstance(config, dict):
        for name in SIZES & config.keys():
            found.append(name)
            del config[name]
        for value in config.values():
            without_sizes(value, found)
    if isinstance(config, list):
        for value in config:
            without_sizes(value, found)


@pytest.mark.parametrize("name", EXAMPLES)
def test_sizes_that_are_left_out_become_those_of_the_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    found = []
    without_sizes(config, found)
    assert sorted(found) == sorted(EXAMPLES[name].split())
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    given, left_out = (
        CLI("fit", ["--config", str(folder / f"{name}.yaml")]).experiment for folder in (CONFIGS, tmp_path)
    )
    assert left_out.config == given.config
    assert left_out.task.hparams == given.task.hparams
    assert left_out.datamodule.hparams == given.datamodule.hparams
    for one, other in zip(given.task.parameters(), left_out.task.parameters(), strict=True):
        assert one.equal(other)


CONFIG = """
model:
  class_path: firstlight.tasks.Classification
  init_args:
    network: {class_path: firstlight.networks.MLP, init_args: {hidden: [8]}}
    loss: torch.nn.CrossEntropyLoss
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
    schedule: firstlight.schedules.WarmupCosine
data: firstlight.data.Digits
trainer: {max_epochs: 1, limit_train_batches: 2}
"""


def test_a_run_without_sizes_is_tested_resumed_and_tested_from_its_checkpoint_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    called("run", "--config", "mine.yaml", cwd=tmp_path)
    run = newest(tmp_path, "mine")
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert model["classes"] == model["network"]["init_args"]["out_features"] == 10
    assert model["network"]["init_args"]["in_features"] == 64
    called("fit", "--run", str(run), "--trainer.max_epochs=2", "--allow_inexact", cwd=tmp_path)
    called("test", "--ckpt", str(run / "checkpoints" / "best.ckpt"), cwd=tmp_path)


def test_a_size_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    error = called("run", "--config", "mine.yaml", "--model.network.out_features=9", cwd=tmp_path, code=2).stderr
    assert error == (
        "firstlight: Classification has classes=10, but MLP returns 9 outputs per sample: set out_features=10\n"
    )


def test_data_that_do_not_tell_their_sizes_need_them_in_the_config(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    data = "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"
    error = called("run", "--config", "mine.yaml", data, cwd=tmp_path, code=2).stderr
    assert error == "firstlight: model.network: firstlight.networks.MLP needs in_features, out_features\n"


NETWORK = """
from torch import nn

class Network(nn.Sequential):
    def __init__(self, in_features: int, out_features: int, kind: str | None = None):
        assert kind is None
        super().__init__(nn.Flatten(), nn.Linear(in_features, out_features))
"""


def test_a_network_may_have_a_kind_of_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "own_network.py").write_text(NETWORK)
    called("fit", "--config", "mine.yaml", "--model.network=own_network.Network", cwd=tmp_path)


LABELLED_NETWORK = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, in_features: int, out_features: "int | None" = None, labels: list[str] | None = None) -> None:
        assert labels is None
        super().__init__(nn.Flatten(), nn.Linear(in_features, out_features))
"""


def test_an_argument_of_another_type_than_a_size_stays_as_it_is(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "mine_sizes.py").write_text(LABELLED_NETWORK)
    called("run", "--config", "mine.yaml", "--model.network=mine_sizes.Net", cwd=tmp_path)
    network = yaml.safe_load((newest(tmp_path, "mine") / "config.yaml").read_text())["model"]["init_args"]["network"]
    assert network["init_args"] == {"in_features": 64, "out_features": 10, "labels": None}
