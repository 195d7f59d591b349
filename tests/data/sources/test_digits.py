import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from firstlight.data import Digits
from firstlight.errors import UsageError
from tests.data.helpers import in_batches, ready


def test_digits_equal_those_of_scikit_learn():
    data = ready(Digits())
    images, labels = load_digits(return_X_y=True)
    for split in ("train", "val", "test"):
        dataset = data.dataset(split)
        np.testing.assert_array_equal(dataset.inputs.flatten(1), 15 * images[data.indices[split]])
        assert dataset.targets.tolist() == labels[data.indices[split]].tolist()
    assert data.class_names == list("0123456789")


@pytest.mark.parametrize("size", [8, 28])
def test_digits_have_the_requested_size(size):
    data = ready(Digits(size=size, batch_size=7))
    inputs, targets = in_batches(data, data.train_dataloader())[0]
    assert (inputs.shape, inputs.dtype) == ((7, 1, size, size), torch.float32)
    assert (targets.shape, targets.dtype) == ((7,), torch.int64)


def test_enlarged_digits_equal_those_of_pillow():
    small, large = Digits().load().inputs[:20, 0], Digits(size=28).load().inputs[:20, 0]
    for image, enlarged in zip(small, large, strict=True):
        expected = Image.fromarray(image.astype(np.float32)).resize((28, 28), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(enlarged, expected, atol=0.51)


def test_size_below_8_is_refused():
    with pytest.raises(UsageError, match="Digits was given size=7: it must be at least 8"):
        Digits(size=7)
