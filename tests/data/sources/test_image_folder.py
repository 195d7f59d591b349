import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image

from firstlight.data import ImageFolder
from firstlight.data.sources.image_folder import read_layout
from firstlight.errors import UsageError
from tests.data.helpers import ready, write_images
from tests.helpers import ROOT, called, newest


def loaded(folder, file, **options):
    """Return the pixels `(C, H, W)` of one file, in a folder of its own."""
    data = ImageFolder(str(folder), **options)
    samples = data.load()
    return samples.inputs[samples.names.index(file)]


def save(path, values, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values), mode).save(path, **options)


def uniform(mode, colour, side=4):
    return Image.new(mode, (side, side), colour)


COLOURS = {
    "grey": (uniform("L", 77), "png", [77, 77, 77]),
    "black and white": (uniform("1", 1), "png", [255, 255, 255]),
    "colour": (uniform("RGB", (10, 20, 30)), "png", [10, 20, 30]),
    "palette": (uniform("RGB", (10, 20, 30)).quantize(4), "png", [10, 20, 30]),
    "transparent": (uniform("RGBA", (10, 20, 30, 0)), "png", [255, 255, 255]),
    "opaque": (uniform("RGBA", (10, 20, 30, 255)), "png", [10, 20, 30]),
    "half transparent grey": (uniform("LA", (0, 128)), "png", [127, 127, 127]),
    "four inks, no ink": (uniform("CMYK", (0, 0, 0, 0)), "tif", [255, 255, 255]),
    "four inks, black": (uniform("CMYK", (0, 0, 0, 255)), "tif", [0, 0, 0]),
    "four inks, cyan and black": (uniform("CMYK", (255, 0, 0, 51)), "tif", [0, 204, 204]),
    "four inks in a JPEG": (uniform("CMYK", (0, 0, 0, 255)), "jpg", [0, 0, 0]),
    "16 bits, highest": (Image.fromarray(np.full((4, 4), 65535, np.uint16)), "png", [255, 255, 255]),
    "16 bits, middle": (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), "tif", [100, 100, 100]),
    "16 bits, low": (Image.fromarray(np.full((4, 4), 300, np.uint16)), "png", [1, 1, 1]),
}


@pytest.mark.parametrize("case", COLOURS)
def test_every_kind_of_pixel_becomes_the_same_kind(case, tmp_path):
    image, suffix, expected = COLOURS[case]
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"x.{suffix}")
    pixels = loaded(tmp_path, f"a/x.{suffix}", channels=3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(expected)[:, None, None], (3, 4, 4)))


def test_animation_is_its_first_frame(tmp_path):
    frames = [uniform("L", value) for value in (50, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (loaded(tmp_path, "x.gif", channels=1) == 50).all()


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: a.T[:, ::-1]), (8, lambda a: a.T[::-1])],
)
def test_images_are_upright_as_their_orientation_asks(orientation, turned, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "x.png", stored, exif=exif)
    upright = turned(stored)
    assert loaded(tmp_path, "x.png").shape == (1, *upright.shape)
    np.testing.assert_array_equal(loaded(tmp_path, "x.png")[0], upright)


def test_grey_files_have_one_channel_and_a_colour_file_makes_it_three(tmp_path):
    save(tmp_path / "x.png", np.full((4, 4), 9, np.uint8))
    assert loaded(tmp_path, "x.png").shape == (1, 4, 4)
    save(tmp_path / "y.png", np.full((4, 4, 3), 9, np.uint8))
    assert loaded(tmp_path, "x.png").tolist() == np.full((3, 4, 4), 9).tolist()
    assert loaded(tmp_path, "y.png", channels=1).tolist() == np.full((1, 4, 4), 9).tolist()


def test_size_is_the_median_with_a_shorter_side_of_at_most_224(tmp_path, caplog):
    for name, (height, width) in {"a": (300, 400), "b": (600, 800), "c": (900, 1200)}.items():
        save(tmp_path / f"{name}.png", np.zeros((height, width), np.uint8))
    assert loaded(tmp_path, "a.png").shape == (1, 224, 299)
    assert "3 images, 3 grey, 0 in colour, height x width 300x400 to 900x1200; they become size=[224, 299] by" in (
        caplog.text
    )


def test_stretch_keeps_the_whole_image_and_crop_its_middle(tmp_path):
    columns = np.repeat(np.array([[0, 50, 100, 150, 200, 250]], np.uint8), 2, axis=0)  # 2 x 6
    save(tmp_path / "x.png", columns)
    assert loaded(tmp_path, "x.png", size=2, resize="crop").tolist() == [[[100, 150], [100, 150]]]
    stretched = loaded(tmp_path, "x.png", size=[2, 3])[0, 0].astype(int)
    assert stretched[0] < 50 and stretched[1] == pytest.approx(125, abs=1) and stretched[2] > 200


def test_large_jpeg_is_close_to_its_average(tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 640, dtype=np.uint8)[None], 480, axis=0)
    save(tmp_path / "x.jpg", ramp, quality=95)
    expected = ramp.reshape(48, 10, 64, 10).mean((1, 3))
    assert np.abs(loaded(tmp_path, "x.jpg", size=[48, 64])[0] - expected).max() < 4


BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"hello", "not an image in a known format"),
    "truncated": (None, "truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_or_dropped_by_name(case, tmp_path, caplog):
    write_images(tmp_path, images=9)
    content, why = BROKEN[case]
    whole = (tmp_path / "ant" / "000.png").read_bytes()
    (tmp_path / "bee" / "bad.png").write_bytes(whole[:-60] if content is None else content)
    with pytest.raises(UsageError, match=rf"1 image cannot be read: bee/bad.png \(.*{why}.*\); missing=drop drops"):
        ImageFolder(str(tmp_path)).setup()
    data = ready(ImageFolder(str(tmp_path), missing="drop"))
    assert f"1 image cannot be read: bee/bad.png ({why}" in caplog.text.replace("image file is ", "")
    clean = tmp_path / "bee" / "bad.png"
    clean.unlink()
    other = ready(ImageFolder(str(tmp_path)))
    assert torch.equal(data.dataset("train").inputs, other.dataset("train").inputs)
    assert data.fitted["digest"] == other.fitted["digest"]


def test_folder_in_which_no_image_can_be_read_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no image is left: .*a\.png"):
        ImageFolder(str(tmp_path), missing="drop").load()


def test_image_of_32_bits_is_refused_with_the_reason(tmp_path):
    save(tmp_path / "x.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"x.tif \(pixels of 32 bits \(mode F\) have no known range: save them"):
        ImageFolder(str(tmp_path)).load()


def test_hidden_and_other_files_are_left_out_and_named(tmp_path, caplog):
    write_images(tmp_path, images=4)
    for name in (".hidden.png", "ant/notes.txt", "ant/Thumbs.db", "top.png"):
        (tmp_path / name).write_bytes((tmp_path / "ant" / "000.png").read_bytes())
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    samples = ImageFolder(str(tmp_path)).load()
    assert len(samples.inputs) == 12
    assert "5 files left out: no image, hidden or no class: .hidden.png, ant/Thumbs.db, ant/notes.txt, ..." in (
        caplog.text
    )


def test_link_to_a_folder_above_does_not_repeat_images(tmp_path):
    write_images(tmp_path, images=4)
    (tmp_path / "ant" / "again").symlink_to(tmp_path)
    assert len(ImageFolder(str(tmp_path)).load().inputs) == 12


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="nowhere is missing: it must be a folder of images"):
        ImageFolder(str(tmp_path / "nowhere")).load()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds no image: 1 file, none with a suffix of .apng,"):
        ImageFolder(str(tmp_path)).load()
    with pytest.raises(UsageError, match=r"a.txt is not a folder"):
        ImageFolder(str(tmp_path / "a.txt")).load()


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "testing")])
def test_folders_of_splits_are_kept(names, tmp_path):
    for name, images in zip(names, (6, 4, 2), strict=True):
        write_images(tmp_path / name, images=images)
    data = ready(ImageFolder(str(tmp_path)))
    assert data.class_names == ["ant", "bee", "cat"]
    for split, name, images in zip(("train", "val", "test"), names, (6, 4, 2), strict=True):
        kinds = [file.split("/")[:2] for file in data.names(split)]
        assert kinds == [[name, kind] for kind in data.class_names for _ in range(images)]
        assert data.dataset(split).targets.tolist() == np.repeat([0, 1, 2], images).tolist()


def test_split_without_a_folder_is_taken_from_the_training_images(tmp_path, caplog):
    for name, images in {"train": 20, "val": 4}.items():
        write_images(tmp_path / name, images=images)
    data = ready(ImageFolder(str(tmp_path), test_fraction=0.2))
    assert {split: len(rows) for split, rows in data.indices.items()} == {"train": 48, "val": 12, "test": 12}
    assert all(file.startswith("train/") for file in data.names("test"))
    assert all(file.startswith("val/") for file in data.names("val"))
    assert "has no folder test: test_fraction=0.2 of the training images are the test split" in caplog.text


def test_folders_of_splits_beside_folders_of_classes_are_refused(tmp_path):
    for name in ("train", "val", "extra"):
        write_images(tmp_path / name, images=2)
    with pytest.raises(UsageError, match="holds the folders train, val, which are splits, and extra: it must hold"):
        ImageFolder(str(tmp_path)).load()


def test_class_may_be_named_as_a_split(tmp_path):
    write_images(tmp_path, ("train", "car"), images=2)
    assert ImageFolder(str(tmp_path)).load().class_names == ["car", "train"]


def test_folders_whose_names_differ_in_spaces_or_unicode_form_are_one_class(tmp_path, caplog):
    for split, names in {
        "train": ("caf\u00e9", "tea"),
        "val": ("cafe\u0301", " tea"),
        "test": ("caf\u00e9", "tea"),
    }.items():
        write_images(tmp_path / split, names, images=3)
    data = ready(ImageFolder(str(tmp_path)))
    assert data.class_names == ["caf\u00e9", "tea"]
    assert data.dataset("val").targets.bincount().tolist() == [3, 3]
    assert "different values" not in caplog.text
    assert read_layout(["cafe\u0301/0.png", " tea/0.png"], ["caf\u00e9", "tea"], "")[0] == ["caf\u00e9", "tea"]


def test_folders_whose_names_look_alike_are_told(tmp_path, caplog):
    write_images(tmp_path, ("cat", "Cat"), images=2)
    assert ImageFolder(str(tmp_path)).load().class_names == ["Cat", "cat"]
    assert "has Cat and cat, which count as different values" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size": 0}, r"size=\[0, 0\]: each must be at least 1"),
        ({"size": [2, 3, 4]}, r"size=\[2, 3, 4\]: it must be one number, or height and width"),
    ],
)
def test_wrong_size_is_refused(option, message):
    with pytest.raises(UsageError, match=message):
        ImageFolder("folder", **option)


def test_checkpoint_scores_images_of_other_sizes_and_colours_as_it_was_trained(tmp_path):
    trained = ready(ImageFolder(write_images(tmp_path / "a", side=8)))
    write_images(tmp_path / "b", ("cat", "bee"), images=3, side=16, colour=False)
    data = ImageFolder(str(tmp_path / "b"))
    data.load_state_dict(trained.state_dict())
    samples = data.dataset("test")
    assert samples.inputs.shape == (6, 3, 8, 8)
    assert samples.targets.tolist() == [1, 1, 1, 2, 2, 2]
    other = ImageFolder(str(tmp_path / "b"), size=16)
    other.load_state_dict(trained.state_dict())
    with pytest.raises(UsageError, match=r"trained on images of size=\[8, 8\], but ImageFolder was given size=\[16, 1"):
        other.dataset("test")
    write_images(tmp_path / "b", ("dog",), images=1)
    unknown = ImageFolder(str(tmp_path / "b"))
    unknown.load_state_dict(trained.state_dict())
    with pytest.raises(UsageError, match="has the folder dog, but the checkpoint was trained on the classes ant, bee"):
        unknown.dataset("test")


@pytest.mark.parametrize("inside", ["", "2026/may"])
def test_images_without_classes_can_only_be_predicted(inside, tmp_path):
    trained = ready(ImageFolder(write_images(tmp_path / "a")))
    write_images(tmp_path / "b" / inside, ("",), images=9)
    fresh = ImageFolder(str(tmp_path / "b"))
    with pytest.raises(UsageError, match=r"holds images, but no folder for each class|all samples have the class 2026"):
        fresh.setup()
    data = ImageFolder(str(tmp_path / "b"))
    data.load_state_dict(trained.state_dict())
    assert [len(inputs) for inputs, _ in data.predict_dataloader()] == [9]
    with pytest.raises(UsageError, match=r"only predict works without targets: .* no folder (for each|of a) class"):
        data.test_dataloader()


def test_same_images_elsewhere_are_recognised_and_other_pixels_are_not(tmp_path):
    first = ready(ImageFolder(write_images(tmp_path / "a")))
    assert ready(ImageFolder(write_images(tmp_path / "b"))).fitted["digest"] == first.fitted["digest"]
    save(tmp_path / "b" / "ant" / "000.png", np.zeros((8, 8, 3), np.uint8))
    assert ready(ImageFolder(str(tmp_path / "b"))).fitted["digest"] != first.fitted["digest"]


def test_checkpoint_holds_neither_the_folder_nor_names_of_files(tmp_path):
    data = ready(ImageFolder(write_images(tmp_path / "secret")))
    assert "secret" not in repr(data.state_dict()) and "000.png" not in repr(data.state_dict())


def test_folder_is_trained_on_and_predictions_name_the_files(tmp_path):
    for name, value in {"dark": 40, "light": 200}.items():
        for index in range(20):
            pixels = np.random.default_rng(index).normal(value, 20, (10 + index, 12)).clip(0, 255)
            save(tmp_path / "images" / name / f"{index}.png", pixels.astype(np.uint8))
    network = ["--model.network=ConvNet", "--model.network.widths=[8]"]
    options = ["--config", str(ROOT / "configs" / "image_folder.yaml"), "--trainer.max_epochs=3", *network]
    called(
        "run", "--report=false", *options, "--data.path=images", "--data.channels=1", "--data.size=null", cwd=tmp_path
    )
    for index, value in enumerate((10, 250)):
        save(tmp_path / "new" / "of" / "may" / f"{index}.png", np.full((30, 30, 3), value, np.uint8))
    run = newest(tmp_path, "image_folder")
    called("predict", "--run", str(run), "--data.path=new", cwd=tmp_path)
    (predictions,) = run.rglob("predictions.csv")
    rows = list(csv.DictReader(predictions.read_text().splitlines()))
    assert list(rows[0])[:2] == ["index", "file"]
    assert [(row["index"], row["file"]) for row in rows] == [("0", "of/may/0.png"), ("1", "of/may/1.png")]
    assert [row["prediction"] for row in rows] == ["dark", "light"]
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert "path" not in checkpoint["datamodule_hyper_parameters"]


def batches(folder, **options):
    """Return two epochs of training batches and one of each other split, and the fitted state."""
    torch.manual_seed(0)
    data = ready(ImageFolder(folder, batch_size=16, **options))
    training = data.train_dataloader()
    found = [*training, *training, *data.val_dataloader(), *data.test_dataloader(), *data.predict_dataloader()]
    return [data.on_after_batch_transfer(batch, 0) for batch in found], data


@pytest.mark.parametrize("workers", [0, 2, None])
def test_images_on_disk_give_the_same_batches_as_in_memory(workers, tmp_path, caplog):
    folder = write_images(tmp_path, side=12)
    save(tmp_path / "ant" / "large.jpg", np.full((20, 30), 70, np.uint8))
    (tmp_path / "bee" / "broken.png").write_bytes(b"")
    expected, memory = batches(folder, missing="drop", in_memory=True)
    found, disk = batches(folder, missing="drop", in_memory=False, num_workers=workers)
    assert memory.dataset("train").in_memory and not disk.dataset("train").in_memory
    assert memory.num_workers == 0
    assert disk.num_workers == (min(8, os.cpu_count()) if workers is None else workers)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert repr(memory.fitted) == repr(disk.fitted)
    assert memory.names("test") == disk.names("test")


def test_images_stay_in_memory_if_they_take_a_quarter_of_what_is_free(tmp_path, caplog, monkeypatch):
    folder = write_images(tmp_path, images=9, side=8)
    needed = 27 * 3 * 8 * 8
    monkeypatch.setattr("firstlight.data.base.free_memory", lambda: 4 * needed)
    assert ready(ImageFolder(folder)).dataset("train").in_memory
    monkeypatch.setattr("firstlight.data.base.free_memory", lambda: 4 * needed - 1)
    assert not ready(ImageFolder(folder)).dataset("train").in_memory
    assert "GiB in memory, more than 1/4 of the free" in caplog.text


def test_file_that_is_lost_while_it_is_used_is_named(tmp_path):
    folder = write_images(tmp_path, images=9)
    data = ready(ImageFolder(folder, in_memory=False, num_workers=0))
    (tmp_path / data.names("val")[0]).unlink()
    with pytest.raises(UsageError, match=f"{data.names('val')[0]} was changed while it was used: No such file"):
        list(data.val_dataloader())
