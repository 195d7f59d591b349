"""Augmentation with kornia, from the extra `vision`."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.__main__ import main
from firstlight.data import Digits
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.data.helpers import images, ready
from tests.helpers import CONFIG, Ranks, called, newest

augmentation = pytest.importorskip("kornia.augmentation", reason="kornia, from the extra `vision`, is not installed")

KINDS = {
    "rotate": lambda: augmentation.RandomRotation(degrees=30.0, p=1.0),
    "shift": lambda: augmentation.RandomAffine(degrees=0.0, translate=(0.3, 0.3), p=1.0),
    "crop": lambda: augmentation.RandomCrop((6, 6), padding=3, p=1.0),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_samples_of_a_batch_are_augmented_differently(make):
    data = ready(images(augment=[make()]))
    one = data.samples.inputs[:1].repeat(16, axis=0)
    torch.manual_seed(0)
    found = data.prepare_batch(torch.from_numpy(one), train=True)
    assert found.shape == (16, 2, 6, 6)
    assert len(found.flatten(1).unique(dim=0)) > 8
    plain = data.prepare_batch(torch.from_numpy(one))
    assert len(plain.flatten(1).unique(dim=0)) == 1


def test_flip_flips_half_of_the_samples_and_changes_nothing_else():
    data = ready(images(rows=400, augment=[augmentation.RandomHorizontalFlip(p=0.5)]))
    pixels = torch.from_numpy(data.samples.inputs)
    plain, found = data.prepare_batch(pixels), data.prepare_batch(pixels, train=True)
    same, flipped = (torch.isclose(found, each, atol=1e-5).flatten(1).all(1) for each in (plain, plain.flip(3)))
    assert (flipped | same).all()
    assert 150 < flipped.sum() < 250


def test_same_seed_repeats_the_augmentation():
    data = ready(images(augment=[make() for make in KINDS.values()]))
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(data.prepare_batch(torch.from_numpy(data.samples.inputs), train=True))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_shifted_images_are_filled_with_black():
    data = ready(images(augment=[augmentation.RandomAffine(degrees=0.0, translate=(0.3, 0.3), p=1.0)]))
    state = data.state_dict()
    found = (
        data.prepare_batch(torch.full((8, 2, 6, 6), 255, dtype=torch.uint8), train=True) * state["std"] + state["mean"]
    )
    assert found.min().item() == pytest.approx(0, abs=1e-5)
    assert found.max().item() == pytest.approx(1, abs=1e-5)


def test_checkpoint_of_a_program_with_augmentation_loads_with_weights_only(tmp_path):
    data = Digits(augment=[augmentation.RandomRotation(degrees=10.0)])
    task = Classification(MLP(64, [], 10), torch.nn.CrossEntropyLoss(), torch.optim.SGD, Constant(), 10)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, **quiet)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]["batch_size"] == 32
    found = Trainer(**quiet).test(
        task, datamodule=Digits(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    assert found[0]["test/loss"] > 0


def test_config_can_name_augmentations(tmp_path):
    (tmp_path / "augment.yaml").write_text(
        "data:\n  init_args:\n    augment:\n"
        "      - class_path: kornia.augmentation.RandomRotation\n        init_args: {degrees: 10.0, p: 1.0}\n"
        "      - kornia.augmentation.RandomHorizontalFlip\n"
    )
    config = ["--config", CONFIG, "--config", "augment.yaml", "--trainer.max_epochs=1", "--report=false"]
    errors = Ranks(main, ["run", *config], cwd=tmp_path).succeed().stderr
    assert [line for line in errors.splitlines() if not line.startswith("epoch ")] == []
    run = newest(tmp_path)
    assert "degrees: 10.0" in (run / "config.yaml").read_text()
    called("predict", "--run", str(run), "--ckpt", str(run / "checkpoints" / "best.ckpt"), cwd=tmp_path)
    (written,) = run.glob("evaluations/predict-*/predictions.csv")
    assert len(list(csv.reader(written.read_text().splitlines()))) == 271
    loaded = Digits.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True, trust="kornia")
    assert loaded.state_dict()["mean"].shape == (1, 1, 1)
