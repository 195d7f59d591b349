"""Sizes that are left out follow from the data."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.demos.boring_classes import BoringDataModule

from firstlight.cli.parser import CLI
from firstlight.cli.sizes import SIZES, Holes
from firstlight.data import Digits
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
    called("run", "--config", "mine.yaml", "--report=false", cwd=tmp_path)
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
    network = {"class_path": "mine_sizes.Net", "init_args": {"out_features": None}}  # As if it were left out.
    (tmp_path / "null.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": network}}}))
    called("run", "--config", "mine.yaml", "--config", "null.yaml", "--report=false", cwd=tmp_path)
    network = yaml.safe_load((newest(tmp_path, "mine") / "config.yaml").read_text())["model"]["init_args"]["network"]
    assert network["init_args"] == {"in_features": 64, "out_features": 10, "labels": None}


PREPARED = """
import os, time
from pathlib import Path
from firstlight.data import Digits

class Data(Digits):
    def prepare_data(self):
        time.sleep(1)
        with open("calls", "a") as file:
            file.write(os.environ.get("LOCAL_RANK", "0"))

    def setup(self, stage=None):
        assert Path("calls").exists(), "setup before prepare_data"
        super().setup(stage)
"""


def without_classes():
    init_args = Namespace(classes=None)
    return Namespace(model=Namespace(class_path="firstlight.tasks.Classification", init_args=init_args))


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, 1),
        ({"LOCAL_RANK": "1"}, 0),
        ({"NODE_RANK": "1"}, 1),
        ({"LOCAL_RANK": "1", "RANK": "1"}, 1),
    ],
)
def test_the_first_process_of_a_node_prepares_the_data(environment, calls, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    data, found = Digits(), []
    data.prepare_data = lambda: found.append(1)
    Holes(without_classes()).fill(data)
    assert len(found) == calls
    data.prepare_data_per_node = False
    Holes(without_classes()).fill(data)
    assert len(found) == calls * (2 if "NODE_RANK" not in environment else 1)


def test_data_without_sizes_are_not_prepared_for_them(monkeypatch):
    data = BoringDataModule()
    monkeypatch.setattr(data, "setup", lambda stage: pytest.fail("setup was called"))
    config = without_classes()
    Holes(config).fill(data)
    assert config.model.init_args.classes is None


@pytest.mark.slow
def test_processes_of_torchrun_wait_until_the_first_has_prepared_the_data(tmp_path):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "mine_data.py").write_text(PREPARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "firstlight"]
    options = ["--config", str(CONFIGS / "overlays" / "ddp.yaml"), "--data=mine_data.Data"]
    done = subprocess.run(
        [*launch, "fit", "--config", "mine.yaml", *options], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text() == "00"  # For the sizes, and for the fit.


@pytest.mark.slow  # Only a new interpreter has not imported the parser yet.
def test_whole_numbers_of_the_trainer_stay_whole_whatever_was_imported_before(tmp_path):
    """1 is one batch, and 1.0 all of them. After scikit-learn, typing returned Lightning's types in another order."""
    program = (
        "import sklearn.metrics\n"
        "from firstlight.cli.parser import CLI\n"
        "limits = ['--trainer.limit_test_batches=1', '--trainer.limit_val_batches=1.0']\n"
        "trainer = CLI('fit', ['--config=firstlight:wine', *limits]).config.trainer\n"
        "print(repr(trainer.limit_test_batches), repr(trainer.limit_val_batches))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "1 1.0\n", done.stderr
