"""Objects of the package `pytorch_lightning`, a copy of `lightning.pytorch` with other classes, are refused."""

import warnings

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch import Callback

from firstlight import callbacks
from firstlight.data import Digits
from firstlight.errors import UsageError
from tests.helpers import CONFIG, called

log = rank_zero_module.log
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    other = pytest.importorskip("pytorch_lightning")
rank_zero_module.log = log  # The other package replaces it, so that all later tests of this process log there.

MINE = """
import pytorch_lightning
class Module(pytorch_lightning.LightningModule): pass
class Data(pytorch_lightning.LightningDataModule): pass
class Hook(pytorch_lightning.Callback): pass
"""


@pytest.mark.parametrize(
    ("option", "base"),
    [("model", "LightningModule"), ("data", "LightningDataModule"), ("trainer.callbacks", "Callback")],
)
def test_a_class_of_the_other_package_is_refused_in_one_line(option, base, tmp_path):
    name = {"LightningModule": "Module", "LightningDataModule": "Data", "Callback": "Hook"}[base]
    (tmp_path / "theirs.py").write_text(MINE)
    (tmp_path / "base.yaml").write_text("data: firstlight.data.Digits\n")
    config = str(tmp_path / "base.yaml") if option == "model" else CONFIG
    told = called("fit", "--config", config, f"--{option}=theirs.{name}", cwd=tmp_path, code=2).stderr
    assert (
        told
        == f"firstlight: {option}: theirs.{name} is a {base} of pytorch_lightning: import it from lightning.pytorch\n"
    )


@pytest.mark.parametrize("name", callbacks.__all__)
def test_each_callback_refuses_a_trainer_of_the_other_package(name):
    kind = getattr(callbacks, name)
    if isinstance(kind, type) and issubclass(kind, Callback):
        trainer = other.Trainer.__new__(other.Trainer)
        with pytest.raises(UsageError, match=rf"^{name} was given to a Trainer of pytorch_lightning"):
            kind.setup(kind.__new__(kind), trainer, None, "fit")


def test_a_data_module_refuses_a_trainer_of_the_other_package():
    class Module(other.LightningModule):
        pass

    trainer = other.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for call in (trainer.fit, trainer.test):
        with pytest.raises(UsageError, match=r"^Digits was given to a Trainer of pytorch_lightning"):
            call(Module(), datamodule=Digits())
