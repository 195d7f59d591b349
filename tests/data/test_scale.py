import numpy as np
import pytest
import torch

from firstlight.errors import UsageError
from tests.data.helpers import Arrays, images, ready

SPLITS = ("train", "val", "test")


def test_constant_column_has_deviation_one():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    inputs[:, 1] = 0.1
    data = ready(Arrays(inputs, np.arange(40) % 2, ["a", "b"]))
    assert data.state_dict()["std"][1] == 1
    for split in SPLITS:
        scaled = data.dataset(split).inputs
        torch.testing.assert_close(scaled[:, 1], torch.zeros(len(scaled)), atol=1e-12, rtol=0)
        assert scaled[:, [0, 2]].std() > 0.1


def test_constant_channel_has_deviation_one():
    data = images()
    data.samples.inputs[:, 1] = 7
    ready(data)
    assert data.state_dict()["std"].flatten()[1] == 1
    assert (data.prepare_batch(data.dataset("val").inputs)[:, 1].abs() < 1e-6).all()


def test_column_constant_only_in_training_is_not_divided():
    inputs = np.zeros((40, 2))
    inputs[:, 0] = np.arange(40)
    probe = ready(Arrays(inputs, np.zeros(40)))
    inputs[probe.indices["test"], 1] = 7
    scaled = ready(Arrays(inputs, np.zeros(40))).dataset("test").inputs
    assert scaled[:, 1].tolist() == [7] * len(scaled)


def test_pixels_are_scaled_per_channel_like_a_float_copy():
    data = ready(images())
    raw = data.samples.inputs / 255
    train = raw[data.indices["train"]]
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    for split in SPLITS:
        stored = data.dataset(split).inputs
        assert stored.dtype == torch.uint8
        expected = (raw[data.indices[split]] - mean) / std
        np.testing.assert_allclose(data.prepare_batch(stored), expected, atol=1e-5)


def test_float_images_are_scaled_per_channel():
    raw = np.random.default_rng(0).normal([[[0]], [[9]]], [[[1]], [[5]]], (40, 2, 6, 6))
    train = ready(Arrays(raw, np.zeros(40))).dataset("train").inputs
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_large_numbers_keep_their_differences():
    module = ready(Arrays(1.7e9 + np.arange(200.0)[:, None], np.arange(200) % 2, "ab"))
    assert len(module.dataset("train").inputs.unique()) == len(module.indices["train"])


def test_column_without_any_value_is_refused():
    inputs = np.column_stack([np.arange(40.0), np.full(40, np.nan)])
    with pytest.raises(UsageError, match="Arrays: column 1 has no value"):
        Arrays(inputs, np.zeros(40), options={"missing": "mean"}).setup()
