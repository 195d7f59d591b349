import tracemalloc

import numpy as np
import pytest
import torch

from firstlight.data import Arrays, Tensors
from firstlight.errors import UsageError
from tests.data.helpers import ready, write_arrays

GENERATOR = np.random.default_rng(0)
NUMBERS = GENERATOR.normal(3, 5, (60, 4)).astype(np.float32)
LABELS = np.arange(60) % 3
KINDS = {
    "numbers": (NUMBERS, LABELS),
    "large numbers": (GENERATOR.normal(1e6, 1, (60, 2)), LABELS),
    "numbers of the other byte order": (NUMBERS.astype(">f4"), LABELS.astype(">i8")),
    "half precision": (NUMBERS.astype(np.float16), LABELS),
    "pixels": (GENERATOR.integers(0, 256, (60, 3, 6, 5), np.uint8), LABELS),
    "tokens": (GENERATOR.integers(1, 256, (60, 7), np.int16), LABELS),
    "numbers for a regression": (NUMBERS, GENERATOR.normal(9, 3, 60)),
    "booleans": (NUMBERS, LABELS == 0),
}


def saved(folder, inputs, targets, form):
    """Save arrays in one of the forms, and return the arguments that name them."""
    if form == "npy":
        np.save(folder / "inputs.npy", inputs)
        np.save(folder / "targets.npy", targets)
        return {"path": str(folder / "inputs.npy"), "targets_path": str(folder / "targets.npy")}
    return {"path": write_arrays(folder, form == "compressed", inputs=inputs, targets=targets)}


def batches(data):
    """Return two epochs of training batches and one of each other split, as the network gets them."""
    torch.manual_seed(0)
    ready(data)
    training = data.train_dataloader()
    found = [*training, *training, *data.val_dataloader(), *data.test_dataloader(), *data.predict_dataloader()]
    return [data.on_after_batch_transfer(batch, 0) for batch in found]


@pytest.mark.parametrize("form", ["npz", "npy", "compressed"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_from_disk_and_from_memory_equal_those_of_tensors(kind, form, tmp_path):
    inputs, targets = KINDS[kind]
    native = [each.astype(each.dtype.newbyteorder("=")) for each in (inputs, targets)]
    expected = batches(Tensors(*native, batch_size=16))
    for in_memory in (True, False):
        data = Arrays(**saved(tmp_path, inputs, targets, form), batch_size=16, in_memory=in_memory)
        found = batches(data)
        assert data.dataset("train").in_memory == (in_memory or form == "compressed")
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            assert one[0].dtype == other[0].dtype and one[1].dtype == other[1].dtype


def test_statistics_and_batches_do_not_depend_on_the_chunks_in_which_a_file_is_read(tmp_path, monkeypatch):
    inputs = np.where(GENERATOR.random((60, 3)) < 0.3, np.nan, GENERATOR.normal(5, 2, (60, 3)))
    inputs[:50, 2] = np.nan  # Whole chunks without a value.
    inputs[50:, 2] = range(10)
    where = saved(tmp_path, inputs, LABELS, "npy")
    monkeypatch.setattr("firstlight.data.stored._CHUNK_VALUES", 21)
    disk = Arrays(**where, in_memory=False, missing="mean", split_seed=3)
    memory = Arrays(**where, in_memory=True, missing="mean", split_seed=3)
    for one, other in zip(batches(disk), batches(memory), strict=True):
        assert torch.equal(one[0], other[0])
    train = inputs[disk.rows("train")]
    np.testing.assert_allclose(disk.fitted["mean"].flatten(), np.nanmean(train, axis=0), rtol=1e-12)
    np.testing.assert_allclose(disk.fitted["std"].flatten(), np.nanstd(train, axis=0), rtol=1e-12)


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_with_missing_numbers_are_refused_or_dropped_alike(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("firstlight.data.stored._CHUNK_VALUES", 40)
    inputs = NUMBERS.copy()
    inputs[[5, 40], 1] = np.nan, np.inf
    where = saved(tmp_path, inputs, LABELS, "npy")
    found = (
        r"2 rows with missing or invalid values: row 5 column 1 \(nan\), row 40 column 1 \(inf\); missing=drop drops"
    )
    with pytest.raises(UsageError, match=found):
        Arrays(**where, in_memory=in_memory).setup()
    with pytest.raises(UsageError, match=r"1 row with .*: row 40 column 1 \(inf\); missing=drop drops such rows$"):
        Arrays(**where, in_memory=in_memory, missing="mean").setup()
    data = ready(Arrays(**where, in_memory=in_memory, missing="drop"))
    rows = np.concatenate([data.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows) == sorted({*range(60)} - {5, 40})
    scale = (torch.from_numpy(inputs[data.rows("val")]).double() - data.fitted["mean"]) / data.fitted["std"]
    assert torch.equal(data.dataset("val").inputs, scale.float())


def test_tokens_on_disk_are_judged_as_in_memory(tmp_path):
    tokens = KINDS["tokens"][0].copy()
    tokens[7] = 0
    where = saved(tmp_path, tokens, LABELS, "npy")
    with pytest.raises(UsageError, match="1 row with missing or invalid values: row 7 without a token"):
        Arrays(**where, in_memory=False).setup()
    tokens[7, 3] = -2
    where = saved(tmp_path, tokens, LABELS, "npy")
    with pytest.raises(UsageError, match="row 7 column 3 is -2: tokens must be at least 0"):
        Arrays(**where, in_memory=False).setup()


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("channels", [None, 3])
def test_pixels_get_their_channels_before_height_and_width(channels, in_memory, tmp_path, caplog):
    pixels = GENERATOR.integers(0, 256, (60, 6, 5) if channels is None else (60, 6, 5, channels), np.uint8)
    data = ready(Arrays(**saved(tmp_path, pixels, LABELS, "npy"), in_memory=in_memory))
    expected = pixels[:, None] if channels is None else pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(data.dataset("val").inputs.numpy(), expected[data.rows("val")])
    assert "they become (N, C, H, W)" in caplog.text


@pytest.mark.parametrize(("names", "chosen"), [(("X", "y"), "X"), (("images", "labels"), "images")])
def test_usual_names_are_recognised_and_said(names, chosen, tmp_path, caplog):
    path = write_arrays(tmp_path, **dict(zip(names, (NUMBERS, LABELS), strict=True)), more=NUMBERS)
    ready(Arrays(path))
    assert f"the inputs are {chosen}, the targets {names[1]}" in caplog.text


AMBIGUOUS = {
    "several": ({"X": NUMBERS, "y": LABELS, "data": NUMBERS, "labels": LABELS}, "several pairs of the usual names"),
    "none": ({"a": NUMBERS, "b": LABELS}, r"holds a \(60, 4\), b \(60,\), and none of the usual names"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_names_are_not_guessed_if_they_are_ambiguous(case, tmp_path):
    arrays, message = AMBIGUOUS[case]
    path = write_arrays(tmp_path, **arrays)
    with pytest.raises(UsageError, match=rf"{message}.*: give targets_name"):
        Arrays(path).setup()
    inputs, targets = list(arrays)[:2]
    assert len(ready(Arrays(path, inputs_name=inputs, targets_name=targets)).dataset("train")) == 42
    with pytest.raises(UsageError, match=r"holds no Z: it holds"):
        Arrays(path, inputs_name="Z", targets_name=targets).setup()


def test_of_two_arrays_the_one_that_is_not_named_is_the_other(tmp_path):
    path = write_arrays(tmp_path, a=NUMBERS, b=LABELS)
    for names in ({"targets_name": "b"}, {"inputs_name": "a"}):
        data = ready(Arrays(path, **names))
        assert np.array_equal(data.dataset("val").targets.numpy(), LABELS[data.rows("val")])


def in_splits(named, **options):
    """Return the arrays of 60 samples by split, 30 train, 10 val and 20 test, with names as `named` says."""
    inputs, targets = options.get("inputs", NUMBERS), options.get("targets", LABELS)
    parts = {"train": slice(0, 30), "val": slice(30, 40), "test": slice(40, 60)}
    names = named.split()
    pairs = zip(names[::2], names[1::2], strict=True)
    found = {}
    for of_inputs, of_targets in pairs:
        part = next(parts[each] for each in parts if each in of_inputs)
        found |= {of_inputs: inputs[part], of_targets: targets[part]}
    return found


@pytest.mark.parametrize("form", ["npz", "compressed"])
@pytest.mark.parametrize("kind", ["numbers", "pixels", "numbers of the other byte order"])
@pytest.mark.parametrize(
    "names", ["x_train y_train x_val y_val x_test y_test", "train_images train_labels val_images val_labels "
              "test_images test_labels", "X_train y_train X_test y_test"],
)  # fmt: skip
def test_arrays_of_each_split_are_that_split(names, kind, form, tmp_path, caplog):
    inputs, targets = KINDS[kind]
    path = write_arrays(tmp_path, form == "compressed", **in_splits(names, inputs=inputs, targets=targets))
    has_val = "val" in names
    rows = np.r_[0:60] if has_val else np.r_[0:30, 40:60]
    split = ["train"] * 30 + ["val"] * 10 * has_val + ["test"] * 20
    reference = Tensors(inputs[rows].astype(inputs.dtype.newbyteorder("=")), targets[rows].astype(int), split=split)
    for in_memory in (True, False):
        data = Arrays(path, in_memory=in_memory, batch_size=8)
        reference.batch_size = 8
        for one, other in zip(batches(data), batches(reference), strict=True):
            assert all(map(torch.equal, one, other))
    assert f"the splits are train, {'val, ' * has_val}test" in caplog.text


def test_checkpoint_of_split_arrays_predicts_inputs_alone(tmp_path):
    data = ready(Arrays(write_arrays(tmp_path, False, **in_splits("x_train y_train x_test y_test"))))
    expected = data.dataset("test").inputs
    again = Arrays(data.path)
    again.load_state_dict(data.state_dict())
    (tmp_path / "new").mkdir()
    assert again.prepare(write_arrays(tmp_path / "new", False, x=NUMBERS[40:]))[0].inputs.equal(expected)
    assert again.prepare(NUMBERS[40:])[0].inputs.equal(expected)
    assert len(again.prepare(data.path)[0]) == 50


GRAY = GENERATOR.integers(0, 256, (60, 8, 8), np.uint8)


def trained_on(folder, inputs):
    """Return `Arrays` with the fitted state of a training on inputs, and without samples; it reads a new file."""
    folder.mkdir()
    data = ready(Arrays(write_arrays(folder, False, X=inputs, y=LABELS)))
    again = Arrays(str(folder.parent / "arrays.npz"))
    again.load_state_dict(data.state_dict())
    return again


@pytest.mark.parametrize(
    ("trained", "new", "message"),
    [
        (GRAY, GRAY[:, None].astype(np.float32), "float32, but the network was trained on integers from 0 to 255"),
        (GRAY, GRAY[:, None].astype(np.int64) + 1, "int64, but the network was trained on integers from 0 to 255"),
        (GRAY, GRAY[:, :7], r"have the shape \(60, 1, 7, 8\): they must be \(N, 1, 8, 8\)"),
        (GRAY[:, None] / 255, GRAY, "uint8, but the network was trained on numbers, floats: convert the pixels"),
        (GRAY[:, 0] + 1, NUMBERS.repeat(2, 1), "float32, but the network was trained on integers from 0 to 255"),
        (GRAY[:, 0].astype(int) + 1, NUMBERS.repeat(2, 1), "float32, but the network was trained on .*, tokens"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_new_file_of_another_type_or_shape_is_refused(trained, new, message, in_memory, tmp_path):
    data = trained_on(tmp_path / "old", trained)
    data.in_memory = in_memory
    path = write_arrays(tmp_path, False, X=new, y=LABELS)
    for score in (lambda: data.dataset("test"), lambda: data.prepare(path)):
        with pytest.raises(UsageError, match=rf"arrays\.npz: the inputs .*{message}"):
            score()


@pytest.mark.parametrize(
    ("trained", "new"),
    [
        (GRAY, GRAY.astype(np.int64)),
        (GRAY, GRAY[..., None].astype(np.int16)),
        (GRAY[:, None] / 1.0, GRAY[:, None].astype(np.int64)),
        (GRAY[:, 0] / 1.0, GRAY[:, 0]),
        (GRAY[:, None] / 1.0, GRAY.astype(np.float32)),
    ],
)
def test_new_file_whose_values_have_another_exact_type_or_axes_gives_the_same_batches(trained, new, tmp_path):
    data = trained_on(tmp_path / "old", trained)
    expected = data.prepare(write_arrays(tmp_path, False, X=trained, y=LABELS))[0].inputs
    path = write_arrays(tmp_path, False, X=new, y=LABELS)
    assert data.prepare(path)[0].inputs.equal(expected)
    assert data.dataset("test").inputs.equal(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": LABELS[:29], "y_test": LABELS[:21]}, "x_train and y_train differ in length"),
        ({"x_test": NUMBERS[40:, :3]}, "splits of different shapes or types"),
        ({"x_test": NUMBERS[40:].astype(np.uint8)}, "splits of different shapes or types"),
    ],
)
def test_splits_that_do_not_fit_are_refused(change, message, tmp_path):
    arrays = in_splits("x_train y_train x_test y_test") | change
    with pytest.raises(UsageError, match=message):
        Arrays(write_arrays(tmp_path, False, **arrays)).setup()


def test_texts_are_the_names_of_classes(tmp_path):
    names = np.array(["cat", "ant", "bee"])
    data = ready(Arrays(**saved(tmp_path, NUMBERS, names[LABELS], "npz")))
    assert data.class_names == ["ant", "bee", "cat"]
    assert [data.class_names[label] for label in data.dataset("val").targets] == names[
        LABELS[data.rows("val")]
    ].tolist()


@pytest.mark.parametrize("dtype", ["U6", "S6"])
def test_labels_that_differ_in_spaces_are_one_class_and_missing_ones_have_none(dtype, tmp_path, caplog):
    labels = np.array(["cat", " cat ", "dog", "NA", "", "Dog"], dtype)[np.arange(60) % 6]
    path = write_arrays(tmp_path, X=NUMBERS, y=labels)
    with pytest.raises(UsageError, match=r"20 rows with missing or invalid values: row 3 target \(NA\).*=drop drops"):
        Arrays(path).setup()
    data = ready(Arrays(path, missing_targets="drop"))
    assert data.class_names == ["Dog", "cat", "dog"]
    assert "Dog and dog, which count as different values" in caplog.text
    expected = {0: 1, 1: 1, 2: 2, 5: 0}
    for split in ("train", "val", "test"):
        assert data.dataset(split).targets.tolist() == [expected[row % 6] for row in data.rows(split)]
    again = Arrays(write_arrays(tmp_path, X=NUMBERS[:3], y=np.array(["dog ", "cat", " Dog"])))
    again.load_state_dict(data.state_dict())
    assert again.dataset("test").targets.tolist() == [2, 1, 0]


def test_labels_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"arrays\.npz holds bytes as targets that are not UTF-8: .* 0xff"):
        Arrays(write_arrays(tmp_path, X=NUMBERS, y=np.array([b"a", b"\xff"])[LABELS % 2])).setup()


def test_checkpoint_predicts_a_file_with_inputs_alone(tmp_path):
    trained = ready(Arrays(write_arrays(tmp_path, features=NUMBERS, labels=LABELS)))
    data = Arrays(write_arrays(tmp_path, features=NUMBERS[:5]))
    data.load_state_dict(trained.state_dict())
    assert [len(inputs) for inputs, _ in data.predict_dataloader()] == [5]
    with pytest.raises(UsageError, match=r"only predict works without targets: .*arrays.npz holds no targets"):
        data.test_dataloader()


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


@pytest.mark.parametrize("form", ["npz", "npy", "compressed"])
def test_pickled_objects_are_refused_and_not_run(form, tmp_path):
    objects = np.array([Harmful()] * 60, object).reshape(60, 1)
    with pytest.raises(
        UsageError, match=r"Object arrays cannot be loaded when allow_pickle=False|holds Python objects"
    ):
        Arrays(**saved(tmp_path, objects, LABELS, form)).setup()


@pytest.mark.parametrize("in_memory", [True, False])
def test_array_in_fortran_order_is_read(in_memory, tmp_path):
    where = saved(tmp_path, np.asfortranarray(NUMBERS), LABELS, "npy")
    data = ready(Arrays(**where, in_memory=in_memory))
    other = ready(Arrays(**saved(tmp_path, NUMBERS, LABELS, "npy")))
    assert torch.equal(data.dataset("train").inputs, other.dataset("train").inputs)
    assert data.fitted["digest"] == other.fitted["digest"]


@pytest.mark.parametrize("form", ["npz", "npy", "compressed"])
def test_truncated_files_are_refused(form, tmp_path):
    where = saved(tmp_path, NUMBERS, LABELS, form)
    path = tmp_path / ("inputs.npy" if form == "npy" else "arrays.npz")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UsageError, match=f"{path}"):
        Arrays(**where).setup()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    for content, why in ((b"", "is not an array of numpy"), (b"hello, world", "is not an array of numpy")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=why):
            Arrays(str(path)).setup()
    with pytest.raises(UsageError, match=r"cannot read .*b.npy: No such file"):
        Arrays(str(tmp_path / "b.npy")).setup()
    np.save(path, np.float32(3))
    with pytest.raises(UsageError, match="has no axis"):
        Arrays(str(path)).setup()


def test_file_that_changes_while_it_is_used_is_refused(tmp_path):
    where = saved(tmp_path, NUMBERS, LABELS, "npy")
    data = ready(Arrays(**where, in_memory=False))
    np.save(where["path"], NUMBERS[:10])
    with pytest.raises(UsageError, match=r"inputs.npy was changed while it was used"):
        next(iter(data.train_dataloader()))


def test_data_that_takes_more_than_a_quarter_of_the_free_memory_stays_on_disk(tmp_path, monkeypatch, caplog):
    where = saved(tmp_path, NUMBERS, LABELS, "npy")
    needed = NUMBERS.size * 8
    monkeypatch.setattr("firstlight.data.base.free_memory", lambda: 4 * needed)
    assert ready(Arrays(**where)).dataset("train").in_memory
    monkeypatch.setattr("firstlight.data.base.free_memory", lambda: 4 * needed - 1)
    assert not ready(Arrays(**where)).dataset("train").in_memory
    assert "more than 1/4 of the free" in caplog.text


@pytest.mark.parametrize("kind", ["pixels", "numbers", "tokens"])
def test_preparing_data_on_disk_takes_the_memory_of_a_chunk(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("firstlight.data.stored._CHUNK_VALUES", 2**16)
    dtype = {"pixels": np.uint8, "numbers": np.float32, "tokens": np.int16}[kind]
    large = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype, (2000, 1, 100, 100))  # 20 to 80 MB
    large[:] = 1
    large.flush()
    np.save(tmp_path / "y.npy", np.arange(2000) % 3)
    data = Arrays(str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), in_memory=False)
    tracemalloc.start()
    try:
        data.setup()
        next(iter(data.train_dataloader()))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
