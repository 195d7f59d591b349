"""`RandomShift`, compared with torchvision's way: a crop of the padded image."""

import numpy as np
import pytest
import torch

from firstlight.__main__ import main
from firstlight.data import Digits, RandomShift
from firstlight.errors import UsageError
from tests.data.helpers import images, ready
from tests.helpers import CONFIG, newest


def crops(image, longest):
    """Return all crops of an image `(C, H, W)` that is padded with its reflection."""
    padded = np.pad(image, ((0, 0), *((each, each) for each in longest)), mode="reflect")
    _, height, width = image.shape
    return [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * longest[0] + 1)
        for left in range(2 * longest[1] + 1)
    ]


@pytest.mark.parametrize(("sides", "longest"), [((8, 16), (1, 2)), ((2, 1), (0, 0)), ((9, 28), (1, 4))])
def test_each_image_becomes_one_of_the_crops_of_the_padded_image(sides, longest):
    torch.manual_seed(0)
    batch = torch.rand(300, 3, *sides)
    found = RandomShift()(batch)
    for image, shifted in zip(batch.numpy(), found.numpy(), strict=True):
        assert any(np.array_equal(shifted, each) for each in crops(image, longest))


def test_all_shifts_are_drawn_about_equally_often():
    torch.manual_seed(0)
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    found = RandomShift()(image.repeat(9000, 1, 1, 1))
    counts = [(found == torch.from_numpy(each)).flatten(1).all(1).sum() for each in crops(image[0].numpy(), (1, 1))]
    assert sum(counts) == 9000
    assert all(850 < count < 1150 for count in counts)


def test_only_training_images_are_shifted():
    data = ready(images(augment=[RandomShift(0.4)]))
    pixels = torch.from_numpy(data.samples.inputs)
    plain = ready(images()).prepare_batch(pixels)
    assert data.prepare_batch(pixels).equal(plain)
    assert not data.prepare_batch(pixels, train=True).equal(plain)


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match="RandomShift was given share="):
        RandomShift(share)


def test_checkpoint_of_a_run_with_shifts_loads_without_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shift.yaml").write_text(
        "data:\n  init_args:\n    augment:\n"
        "      - class_path: firstlight.data.RandomShift\n        init_args: {share: 0.25}\n"
    )
    assert main(["fit", "--config", CONFIG, "--config", "shift.yaml", "--trainer.max_epochs=1"]) == 0
    loaded = Digits.load_from_checkpoint(newest(tmp_path) / "checkpoints" / "best.ckpt", weights_only=True)
    assert [each.share for each in loaded.augment] == [0.25]
